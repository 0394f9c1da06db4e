"""Runs batches through an executor, and chooses how: as a graph, padded, or as they are.

A decode pass, over rows of one token each, may run on the fixed inputs of a bucket, padded to its size, so that it can
be captured as a CUDA graph. There are two of each: one whose rows all take their most likely token, and one with all
that rows may ask of the sampler, in which a row pays for what it asks. Without graphs the same padded pass runs
eagerly, so that both have the same bits.

A pass of few tokens with prompts or parts of them is padded too, and where nothing streams it is a graph: eager, its
launches would take longer than its work. A long one runs as it is.

Graphs are captured at start (`capture_all`), or when they are first needed, in front of rows that wait.

`submit` enqueues a pass and `collect` waits for the oldest one's tokens: two calls, so that a later pass can be
prepared and enqueued between. `prepare` does what that takes the host for a pass which may follow.
"""

import time
from collections import deque
from enum import Enum
from functools import partial
from os import sched_getaffinity
from typing import NamedTuple

import torch
from penstock.engine.compute.attention import takes_padding
from penstock.engine.compute.bind import make_binder
from penstock.engine.compute.inputs import PassInputs
from penstock.engine.compute.sampler import EVERYTHING, Asked, PendingSample, SampleOutput
from penstock.engine.model.steps import SELECT_ATTENDED
from penstock.engine.runtime.binding import on_own_device
from penstock.engine.runtime.bucket import Bucket, Staging
from penstock.engine.runtime.bucket_sizes import BucketSize, BucketSizes
from penstock.engine.runtime.eager_prompts import eager_prompts
from penstock.engine.runtime.executor import Executor
from penstock.engine.runtime.graph import LONG_SLEEP_S, Graphs, Mailbox, PendingLetter
from penstock.engine.runtime.page_moves import PageMover
from penstock.parallel.triton_door import compiled_ahead
from penstock.scheduler.batching.batch import Batch


class RunAs(Enum):
    """Names how passes run that a bucket can take: as they are, padded, or padded and as graphs."""

    EAGER = "eager"
    PADDED = "padded"
    GRAPHS = "graphs"


class Prepared(NamedTuple):
    """A batch with the bucket in which it runs, or with its inputs where it runs as it is."""

    batch: Batch
    bucket: Bucket | None
    inputs: PassInputs | None


class PassRunner:
    """Owns the passes under way, and where they are padded the buckets, the mailbox and the graphs. `max_context` is
    the most tokens that a row attends to. `mover`, if there is one, moves KV pages to host memory and back."""

    def __init__(
        self,
        executor: Executor,
        run_as: RunAs,
        max_num_seqs: int,
        max_context: int,
        mover: PageMover | None = None,
    ):
        most = executor.arena.most
        assert max_num_seqs <= min(most["tokens"], most["rows"]), "a bucket would be larger than the activations"
        self.executor, self.mover = executor, mover
        self.device, self.model, self.watches = executor.device, executor.model, executor.watches
        selects_early = any(one.step == SELECT_ATTENDED for one in executor.pass_plan.steps)
        self.binder = make_binder(self.model, max_num_seqs, max_context, selects_early)
        pads_prompts = takes_padding(executor.arena.dtype, self.device)
        most_tokens, segments = executor.arena.most["tokens"] if pads_prompts else 0, self.binder.cutting.segments
        self.sizes = BucketSizes(most_tokens, max_num_seqs, segments, pages=self.model.kv.serves_chunks)
        self.buckets: dict[BucketSize, Bucket] = {}
        self.staging = self.mailbox = None
        if run_as is not RunAs.EAGER:
            self.staging = Staging(self.model, self.sizes.most_tokens, max_num_seqs, max_context)
            width, check = self.model.sampler.scores_width, self.model.collectives.check
            self.mailbox = Mailbox(max_num_seqs, width, self.device, check)
        self.graphs = Graphs(self.device, self.watches) if run_as is RunAs.GRAPHS else None
        self.under_way: deque[PendingLetter | PendingSample | None] = deque()  # None where no row samples
        self._prepared: Prepared | None = None

    @on_own_device
    @torch.inference_mode()
    def capture_all(self) -> None:
        """Captures all graphs, the largest first, so that the others' temporaries fit into its memory. The kernels of
        all passes are compiled before, several at a time; others, of libraries, are launched once."""
        self.executor.fill_ring()
        graphs = self.all_graphs
        num_threads, bind = len(sched_getaffinity(0)), partial(torch.cuda.set_device, self.device)
        with self.graphs.aside(self.executor.counted), self.watches.aside():
            with compiled_ahead(num_threads, bind):
                for size, asked in self.warmed:
                    self._warm_up(self._bucket(size), asked)
                    self.graphs.stream.synchronize()  # what the host sends has two turns: the third would overwrite it
                for batch in self.eager_prompts:
                    self._warm_up_eager(batch)
            self._warm_up(self._bucket(graphs[0][0]), graphs[0][1])  # once in earnest, where nothing is forbidden
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what warm-ups have left
        for size, asked in graphs:
            bucket = self._bucket(size)
            run = partial(self._run_bucket, bucket, asked)
            self.graphs.capture((size, asked), None, run, self.executor.counted)

    @property
    def all_graphs(self) -> list[tuple[BucketSize, Asked]]:
        """The graphs from which passes are replayed, the largest first: a pass's size, and what its rows ask."""
        with_chunks = self.sizes.with_chunks[::-1] if self._captures_prompts else []
        decode = [(size, asked) for size in self.sizes.decode[::-1] for asked in (EVERYTHING, Asked())]
        return [(size, EVERYTHING) for size in with_chunks] + decode

    @property
    def warmed(self) -> list[tuple[BucketSize, Asked]]:
        """The padded passes whose kernels are compiled at start: the graphs, and the longest with prompts, with and
        without all of the sampler: eager passes, longer ones too, launch what it does."""
        longest = [(size, asked) for size in self.sizes.with_chunks[-1:] for asked in (EVERYTHING, Asked())]
        return list(dict.fromkeys(self.all_graphs + longest))

    @property
    def eager_prompts(self) -> list[Batch]:
        """The passes that are never padded whose kernels are compiled too."""
        binder, most_tokens = self.binder, self.executor.arena.most["tokens"]
        most = min(most_tokens, binder.max_context)
        return eager_prompts(self.model.sampler.pad_row, most, binder.page_size, binder.margin)

    @on_own_device
    @torch.inference_mode()
    def prepare(self, batch: Batch) -> None:
        """Does for a batch that may be submitted next what can be done while the pass before it runs. Tokens that this
        pass will sample are read behind it on the device."""
        bucket = self._bucket_of(batch)
        self._prepared = Prepared(batch, bucket, self.binder.bind(batch) if bucket is None else None)

    @on_own_device
    @torch.inference_mode()
    def submit(self, batch: Batch) -> None:
        """Enqueues a pass over `batch`. On a CPU it has run when this returns."""
        executor, sampler = self.executor, self.model.sampler
        new = [row for row in batch.rows if row.sampling is not None] if any(batch.columns.sampling) else ()
        sampler.set_rows({row.index: row.sampling for row in new}, {row.index: row.history for row in new})
        assert self.mover is not None or not batch.moves
        if self.mover is not None:
            self.mover.run(batch.moves)
        executor.fill_ring()
        self.watches.begin_pass(batch)
        asked = sampler.asked(batch.columns.index)
        if self._prepared is None or self._prepared.batch is not batch:
            self.prepare(batch)
        (_, bucket, inputs), self._prepared = self._prepared, None
        pending = self._run_eagerly(inputs, asked) if bucket is None else self._run_padded(batch, bucket, asked)
        self.under_way.append(pending)
        executor.counters.add_pass(batch.num_tokens)
        if len(self.watches):
            num_logits = batch.num_sampled if bucket is None else bucket.size.num_sampled
            self.watches.end_pass(batch, self._logits(num_logits)[: batch.num_sampled])

    @on_own_device
    def collect(self, expected_s: float = 0.0) -> SampleOutput | None:
        """The tokens of the oldest pass under way, one for each row that samples, on the host; None if no row did.
        Returns when they are there, before the pass's last copies have ended; they are expected at that time of
        time.perf_counter."""
        pending = self.under_way.popleft()
        return None if pending is None else pending.wait(expected_s)

    def rest(self, until_s: float) -> None:
        """Sleeps until that time of time.perf_counter, or until the newest pass under way has ended; not at all behind
        one that gives no tokens, whose end nobody hears of."""
        newest = self.under_way[-1]
        while newest is not None and time.perf_counter() < until_s and not newest.has_come:
            time.sleep(LONG_SLEEP_S)

    @on_own_device
    def forget(self) -> None:
        """Gives up the passes under way, after an interruption."""
        self.under_way.clear()
        self._prepared = None
        if self.mailbox is not None:
            self.mailbox.catch_up()

    def _run_eagerly(self, inputs: PassInputs, asked: Asked) -> PendingSample | None:
        pending: list[PendingSample] = []
        self.executor.run(inputs, self._all_of(asked), lambda output: pending.append(PendingSample(output)))
        return pending[0] if pending else None

    def _all_of(self, asked: Asked) -> Asked:
        """The stages that a pass runs for rows that ask for these: where there are graphs all or none, since a start
        compiles no kernels for some of them."""
        return EVERYTHING if self.graphs is not None and asked.stages else asked

    def _bucket_of(self, batch: Batch) -> Bucket | None:
        """The bucket in which a batch runs; None where it runs as it is."""
        size = None if self.staging is None else self.sizes.find(batch)
        return None if size is None else self._bucket(size)

    def _bucket(self, size: BucketSize) -> Bucket:
        if size not in self.buckets:
            self.buckets[size] = Bucket(size, self.staging, self.model, self.binder.cutting)
        return self.buckets[size]

    def _run_padded(self, batch: Batch, bucket: Bucket, asked: Asked) -> PendingLetter:
        if self.graphs is not None and (self._captures_prompts or not bucket.size.num_chunks):
            self._replay(batch, bucket, EVERYTHING if bucket.size.num_chunks else self._all_of(asked))
        else:
            bucket.load(batch)
            self._run_bucket(bucket, self._all_of(asked))
        return self.mailbox.expect(batch.num_sampled, "logprobs" in asked.stages)

    @property
    def _captures_prompts(self) -> bool:
        """Tells whether padded passes with prompts are graphs. Where weights stream they are not, since their launches
        hide under the link."""
        return not self.executor.pass_plan.ring.slots

    def _replay(self, batch: Batch, bucket: Bucket, asked: Asked) -> None:
        if (bucket.size, asked) not in self.graphs.passes:
            self._capture(bucket, asked)
        bucket.load(batch)
        captured = self.graphs.next_take((bucket.size, asked))
        with self.executor.filling():
            captured.graph.replay()
        captured.note_replay(self.watches)

    def _capture(self, bucket: Bucket, asked: Asked) -> None:
        warm_up, run = partial(self._warm_up, bucket, asked), partial(self._run_bucket, bucket, asked)
        self.graphs.capture((bucket.size, asked), warm_up, run, self.executor.counted)

    def _warm_up(self, bucket: Bucket, asked: Asked) -> None:
        """Runs each kernel of a padded pass over padding alone, of which nobody reads anything."""
        bucket.load(Batch(()))
        bucket.derive()
        with self.model.collectives.for_graphs():
            self.executor.warm_up(bucket.inputs, asked)

    def _warm_up_eager(self, batch: Batch) -> None:
        """Runs those of a pass that is not padded."""
        with self.model.collectives.for_graphs():
            self.executor.warm_up(self.binder.bind(batch), EVERYTHING)

    def _run_bucket(self, bucket: Bucket, asked: Asked) -> None:
        bucket.derive()
        self.executor.run(bucket.inputs, asked, self.mailbox.send)

    def _logits(self, num_rows: int) -> torch.Tensor:
        """The logits that a pass over so many sampled rows leaves: (num_rows, V or more)."""
        return self.executor.arena.cut(num_rows, num_rows)["logits"]

    @on_own_device
    def close(self) -> None:
        """Waits for the device, drops the graphs and gives back the host memory of KV pages; idempotent."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.graphs is not None:
            self.graphs.close()
        if self.mover is not None:
            self.mover.close()
