"""Decode passes: padded to a bucket, and replayed as a graph.

A pass over rows of one token each runs the same plan as any other, on a bucket's fixed inputs. Greedy rows are sampled
in the graph; other ones right behind it, from the logits that it leaves. Without graphs the same padded pass runs
eagerly, so that both have the same bits.
"""

from dataclasses import dataclass

import torch

from engine.runtime.bucket import Bucket, bucket_sizes
from engine.runtime.executor import Executor
from engine.runtime.graph import Graphs, Mailbox
from engine.runtime.sampler import PendingSample, SampleOutput
from scheduler.batch import Batch


@dataclass
class PendingMail:
    """What collect() waits for after a greedy decode pass."""

    mailbox: Mailbox
    num_tokens: int

    def wait(self) -> SampleOutput:
        return self.mailbox.wait(self.num_tokens)


class DecodePasses:
    """Runs decode batches for an executor on a CUDA device. Buckets and graphs are made when first needed."""

    def __init__(self, executor: Executor, max_num_seqs: int, max_model_len: int, use_graphs: bool):
        self.executor, self.max_model_len = executor, max_model_len
        device = executor.context.rope.device
        self.sizes = bucket_sizes(max_num_seqs)
        self.buckets: dict[int, Bucket] = {}
        self.mailbox = Mailbox(max_num_seqs, device)
        self.graphs = Graphs(device, executor.tracer) if use_graphs else None

    def run(self, batch: Batch) -> PendingMail | PendingSample:
        """Enqueues the pass; what it returns waits for its tokens."""
        bucket = self._bucket(len(batch.rows))
        rows = [row.row for row in batch.rows]
        is_greedy = self.executor.context.sampler.is_greedy(rows)
        if self.graphs is None:
            bucket.load(batch)
            self._run_plan(bucket, is_greedy)
        else:
            self._replay(bucket, batch, is_greedy)
        if is_greedy:
            self.mailbox.num_sent += 1
            return PendingMail(self.mailbox, len(rows))
        return self._sample(bucket, rows)

    def _bucket(self, num_rows: int) -> Bucket:
        size = next(size for size in self.sizes if size >= num_rows)
        if size not in self.buckets:
            self.buckets[size] = Bucket(size, self.max_model_len, self.executor.context)
        return self.buckets[size]

    def _replay(self, bucket: Bucket, batch: Batch, is_greedy: bool) -> None:
        key = (bucket.num_rows, is_greedy)
        executor = self.executor
        if key not in self.graphs.passes:
            bucket.load(Batch(()))  # padding alone: capturing computes nothing that anybody reads
            self.graphs.capture(key, lambda: self._run_plan(bucket, is_greedy), executor.counted)
            self.mailbox.num_sent = int(self.mailbox.device_step)
        bucket.load(batch)
        executor.ring_is_filled = False
        self.graphs.replay(key)
        executor.ring_is_filled = True

    def _run_plan(self, bucket: Bucket, is_greedy: bool) -> None:
        bucket.derive()
        self.executor.run_plan(bucket.inputs, self._send if is_greedy else None)

    def _send(self, output: SampleOutput) -> None:
        self.mailbox.send(output.tokens, self.executor.context.sampler.num_nan_rows)

    def _sample(self, bucket: Bucket, rows: list[int]) -> PendingSample:
        context, inputs, num = self.executor.context, bucket.inputs, len(rows)
        for place, row in enumerate(rows):
            context.sampler.observe(row, inputs.tokens[place : place + 1])  # it may be a prompt's last
        logits = self.executor.arena.cut(bucket.num_rows, bucket.num_rows)["logits"][:num, : context.spec.vocab_size]
        output = context.sampler(logits, inputs.sampled_rows_device[:num], rows, inputs.sampled_positions[:num])
        return PendingSample(output, context.sampler.num_nan_rows)

    def close(self) -> None:
        if self.graphs is not None:
            torch.cuda.synchronize()
            self.graphs.close()
