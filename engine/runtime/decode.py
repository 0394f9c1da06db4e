"""Decode passes: padded to a bucket, and replayed as a graph.

A pass over rows of one token each runs the same plan as any other, on a bucket's fixed inputs. It is captured with the
sampling that its rows ask for: greedy, plain and filtered draws and penalties are graphs of their own, so that a greedy
pass never sorts. Only log probabilities are computed after the graph, from the logits that it leaves. Without graphs
the same padded pass runs eagerly, so that both have the same bits.
"""

import torch
from penstock.engine.compute.sampler import Asked, PendingSample, SampleOutput
from penstock.engine.runtime.bucket import Bucket, bucket_sizes
from penstock.engine.runtime.executor import Executor
from penstock.engine.runtime.graph import Graphs, Mailbox, PendingLetter
from penstock.scheduler.batching.batch import Batch


class DecodePasses:
    """Runs decode batches for an executor. Buckets and graphs, which only a CUDA device has, are made when first
    needed."""

    def __init__(self, executor: Executor, max_num_seqs: int, max_context: int, use_graphs: bool):
        assert max_num_seqs <= min(executor.arena.most.values()), "a bucket would be larger than the activations"
        self.executor, self.max_context, self.device = executor, max_context, executor.device
        self.sizes = bucket_sizes(max_num_seqs)
        self.buckets: dict[int, Bucket] = {}
        self.mailbox = Mailbox(max_num_seqs, self.device, executor.context.collectives.check)
        self.graphs = Graphs(self.device, executor.tracer) if use_graphs else None

    def run(self, batch: Batch) -> PendingLetter | PendingSample:
        """Enqueues the pass; the result's `wait` gives its tokens."""
        num_rows = len(batch.rows)
        size = self._size(num_rows)
        asked = self.executor.context.sampler.asked([row.index for row in batch.rows])
        if self.graphs is not None:
            self._capture_up_to(size, asked.stages)
        bucket = self._bucket(size)
        bucket.load(batch)
        if self.graphs is None:
            self._run_plan(bucket, asked.stages)
        else:
            self.executor.ring_is_filled = False
            self.graphs.replay((size, asked.stages))
            self.executor.ring_is_filled = True
        letter = self.mailbox.expect(num_rows)
        return letter if asked.num_logprobs < 0 else self._score(bucket, letter, asked.num_logprobs)

    def _size(self, num_rows: int) -> int:
        return next(size for size in self.sizes if size >= num_rows)

    def _bucket(self, size: int) -> Bucket:
        if size not in self.buckets:
            self.buckets[size] = Bucket(size, self.max_context, self.executor.context)
        return self.buckets[size]

    def _capture_up_to(self, size: int, stages: frozenset[str]) -> None:
        """Captures the graphs that are missing of this bucket and all smaller ones, which are needed as rows end; the
        largest first, so that the others' temporaries fit into its memory."""
        if (size, stages) in self.graphs.passes:
            return
        for smaller in reversed(self.sizes[: self.sizes.index(size) + 1]):
            if (smaller, stages) in self.graphs.passes:
                break  # the smaller ones were captured with it
            bucket = self._bucket(smaller)
            bucket.load(Batch(()))  # padding alone: capturing computes nothing that anybody reads

            def run(bucket: Bucket = bucket) -> None:
                self._run_plan(bucket, stages)

            def warm_up(bucket: Bucket = bucket) -> None:
                bucket.derive()
                with self.executor.context.collectives.for_graphs():
                    self.executor.run_plan(bucket.inputs, Asked(stages), lambda output: None, copies=False)

            self.graphs.capture((smaller, stages), warm_up, run, self.executor.counted)

    def _run_plan(self, bucket: Bucket, stages: frozenset[str]) -> None:
        bucket.derive()
        self.executor.run_plan(bucket.inputs, Asked(stages), self._send)

    def _send(self, output: SampleOutput) -> None:
        self.mailbox.send(output.tokens)

    def _score(self, bucket: Bucket, letter: PendingLetter, num_logprobs: int) -> PendingSample:
        """The pass's tokens with their log probabilities. These are computed after the pass's last copies, so where
        weights stream the link idles until the host has them."""
        sampler, num_padded = self.executor.context.sampler, bucket.num_rows
        logits = self.executor.arena.cut(num_padded, num_padded)["logits"][: letter.num_tokens]
        tokens = letter.on_device
        return PendingSample(SampleOutput(tokens, sampler.score(logits, tokens, num_logprobs)))

    def close(self) -> None:
        if self.graphs is not None:
            torch.cuda.synchronize(self.device)
            self.graphs.close()
