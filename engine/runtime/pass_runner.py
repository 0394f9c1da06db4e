"""Runs batches through an executor, and chooses how: as a graph, padded, or as they are.

A decode pass, over rows of one token each, may run on the fixed inputs of a bucket, padded to its size, so that it can
be captured as a CUDA graph with the sampling that its rows ask for: greedy, plain and filtered draws and penalties are
graphs of their own, so that a greedy pass never sorts. Only log probabilities are computed after the graph, from the
logits that it leaves. Without graphs the same padded pass runs eagerly, so that both have the same bits.

A pass of few tokens with prompts that start in it is padded too, and where nothing streams it is a graph: eager, its
launches would take longer than its work. A long one, and one with a chunk that continues, runs as it is.

`submit` enqueues a pass and `collect` waits for the oldest one's tokens: two calls, so that a later pass can be
prepared and enqueued between.
"""

from collections import deque
from collections.abc import Hashable
from enum import Enum
from functools import partial

import torch
from penstock.engine.compute.attention import takes_padding, whole_tokens
from penstock.engine.compute.bind import make_binder
from penstock.engine.compute.sampler import Asked, PendingSample, SampleOutput
from penstock.engine.runtime.binding import on_own_device
from penstock.engine.runtime.bucket import Bucket, bucket_sizes
from penstock.engine.runtime.executor import Executor
from penstock.engine.runtime.graph import Graphs, Mailbox, PendingLetter
from penstock.engine.runtime.prompt_bucket import PromptBucket, find_size
from penstock.scheduler.batching.batch import Batch, is_decode

MOST_PROMPT_GRAPHS = 40


class DecodeAs(Enum):
    """Names how decode passes run: as other passes do, padded to a bucket, or as the graphs of such passes."""

    EAGER = "eager"
    PADDED = "padded"
    GRAPHS = "graphs"


class PassRunner:
    """Owns the passes under way, and where they are padded the buckets, the mailbox and the graphs, which are made when
    first needed. `max_context` is the most tokens that a row attends to."""

    def __init__(self, executor: Executor, decode_as: DecodeAs, max_num_seqs: int, max_context: int):
        assert max_num_seqs <= min(executor.arena.most.values()), "a bucket would be larger than the activations"
        self.executor, self.decode_as, self.max_context = executor, decode_as, max_context
        self.device, self.model, self.watches = executor.device, executor.model, executor.watches
        whole = whole_tokens(self.model.spec, executor.arena.dtype, self.device)
        self.binder = make_binder(self.model, max_num_seqs, max_context, whole)
        self.sizes = bucket_sizes(max_num_seqs)
        self.buckets: dict[int, Bucket] = {}
        self.pads_prompts = takes_padding(executor.arena.dtype, self.device)
        self.prompt_buckets: dict[tuple[int, int], PromptBucket] = {}
        pads = decode_as is not DecodeAs.EAGER
        self.mailbox = Mailbox(max_num_seqs, self.device, self.model.collectives.check) if pads else None
        self.graphs = Graphs(self.device, self.watches) if decode_as is DecodeAs.GRAPHS else None
        self.under_way: deque[PendingLetter | PendingSample | None] = deque()  # None where no row samples

    @on_own_device
    @torch.inference_mode()
    def submit(self, batch: Batch) -> None:
        """Enqueues a pass over `batch`. On a CPU it has run when this returns."""
        executor, sampler = self.executor, self.model.sampler
        new = [row for row in batch.rows if row.sampling is not None]
        sampler.set_rows({row.index: row.sampling for row in new}, {row.index: row.history for row in new})
        executor.fill_ring()
        self.watches.begin_pass(batch)
        asked = sampler.asked([row.index for row in batch.rows])
        bucket = self._bucket_of(batch)
        pending = self._run_eagerly(batch, asked) if bucket is None else self._run_padded(batch, bucket, asked)
        self.under_way.append(pending)
        executor.counters.add_pass(batch.num_tokens)
        if len(self.watches):
            num_logits = batch.num_sampled if bucket is None else bucket.num_sampled
            self.watches.end_pass(batch, self._logits(num_logits)[: batch.num_sampled])

    @on_own_device
    def collect(self) -> SampleOutput | None:
        """The tokens of the oldest pass under way, one for each row that samples, on the host; None if no row did.
        Returns when they are there: before the pass's last copies have ended, unless a decode pass has to give log
        probabilities."""
        pending = self.under_way.popleft()
        return None if pending is None else pending.wait()

    @on_own_device
    def forget(self) -> None:
        """Gives up the passes under way, after an interruption."""
        self.under_way.clear()
        if self.mailbox is not None:
            self.mailbox.catch_up()

    def size_of(self, num_rows: int) -> int:
        """Rows of the bucket for so many."""
        return next(size for size in self.sizes if size >= num_rows)

    def _run_eagerly(self, batch: Batch, asked: Asked) -> PendingSample | None:
        inputs = self.binder.bind(batch)
        pending: list[PendingSample] = []
        self.executor.run(inputs, asked, lambda output: pending.append(PendingSample(output)))
        return pending[0] if pending else None

    def _bucket_of(self, batch: Batch) -> Bucket | PromptBucket | None:
        """The bucket in which a batch runs; None where it runs as it is."""
        if self.mailbox is None:
            return None
        if is_decode(batch):
            return self._bucket(self.size_of(len(batch.rows)))
        if not self.pads_prompts:
            return None
        size = find_size(batch, self.sizes[-1], self.executor.arena.most["tokens"], self.binder.whole_tokens)
        if size is not None and size not in self.prompt_buckets:
            self.prompt_buckets[size] = PromptBucket(*size, self.sizes[-1], self.max_context, self.model)
        return self.prompt_buckets.get(size)

    def _run_padded(self, batch: Batch, bucket: Bucket | PromptBucket, asked: Asked) -> PendingLetter | PendingSample:
        key = (bucket.key, asked.stages)
        replays = self.graphs is not None and self._is_captured(bucket, asked.stages)
        bucket.load(batch)
        if replays:
            self._replay(key)
        else:
            self._run_bucket(bucket, asked.stages)
        letter = self.mailbox.expect(batch.num_sampled)
        return letter if asked.num_logprobs < 0 else self._score(bucket.num_sampled, letter, asked.num_logprobs)

    def _is_captured(self, bucket: Bucket | PromptBucket, stages: frozenset[str]) -> bool:
        """Captures what is missing. Passes with prompts stay eager where weights stream, since their launches hide
        under the link, and beyond MOST_PROMPT_GRAPHS."""
        if isinstance(bucket, Bucket):
            self._capture_up_to(bucket.num_rows, stages)
            return True
        if (bucket.key, stages) in self.graphs.passes:
            return True
        num_graphs = sum(isinstance(key, tuple) for key, _ in self.graphs.passes)
        if self.executor.pass_plan.ring.slots or num_graphs >= MOST_PROMPT_GRAPHS:
            return False
        self._capture(bucket, stages)
        return True

    def _replay(self, key: Hashable) -> None:
        captured = self.graphs.next_take(key)
        with self.executor.filling():
            captured.graph.replay()
        captured.note_replay(self.watches)

    def _bucket(self, size: int) -> Bucket:
        if size not in self.buckets:
            self.buckets[size] = Bucket(size, self.max_context, self.model)
        return self.buckets[size]

    def _capture_up_to(self, size: int, stages: frozenset[str]) -> None:
        """Captures the graphs that are missing of this bucket and all smaller ones, which are needed as rows end; the
        largest first, so that the others' temporaries fit into its memory."""
        for smaller in reversed(self.sizes[: self.sizes.index(size) + 1]):
            if (smaller, stages) in self.graphs.passes:
                break  # the smaller ones were captured with it
            self._capture(self._bucket(smaller), stages)

    def _capture(self, bucket: Bucket | PromptBucket, stages: frozenset[str]) -> None:
        bucket.load(Batch(()))  # padding alone: capturing computes nothing that anybody reads

        def warm_up() -> None:
            bucket.derive()
            with self.model.collectives.for_graphs():
                self.executor.warm_up(bucket.inputs, Asked(stages))

        run = partial(self._run_bucket, bucket, stages)
        self.graphs.capture((bucket.key, stages), warm_up, run, self.executor.counted)

    def _run_bucket(self, bucket: Bucket | PromptBucket, stages: frozenset[str]) -> None:
        bucket.derive()
        self.executor.run(bucket.inputs, Asked(stages), lambda output: self.mailbox.send(output.tokens))

    def _score(self, num_padded: int, letter: PendingLetter, num_logprobs: int) -> PendingSample:
        """The pass's tokens with their log probabilities. These are computed after the pass's last copies, so where
        weights stream the link idles until the host has them."""
        logits, tokens = self._logits(num_padded)[: letter.num_tokens], letter.on_device
        return PendingSample(SampleOutput(tokens, self.model.sampler.score(logits, tokens, num_logprobs)))

    def _logits(self, num_rows: int) -> torch.Tensor:
        """The logits that a pass over so many sampled rows leaves: (num_rows, V or more)."""
        return self.executor.arena.cut(num_rows, num_rows)["logits"]

    @on_own_device
    def close(self) -> None:
        """Waits for the device and drops the graphs; idempotent."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.graphs is not None:
            self.graphs.close()
