"""Engines for a Loop: one without a model, and those during whose passes or rests something happens."""

import contextlib
from collections import deque
from collections.abc import Callable

import torch
from penstock.engine.compute.sampler import SampleOutput
from penstock.engine.runtime.engine import Engine
from penstock.scheduler.batching.batch import Batch


class FakeEngine:
    """Gives every row that samples the token `token`, and computes nothing."""

    must_wait, lookahead = False, 0

    def __init__(self, token: int):
        self.token = token
        self._under_way: deque[Batch] = deque()

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    def together(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def submit(self, batch: Batch) -> None:
        self._under_way.append(batch)

    def collect(self) -> tuple[Batch, SampleOutput]:
        batch = self._under_way.popleft()
        return batch, SampleOutput(torch.full((batch.num_sampled,), self.token), None)


class BusyEngine:
    """An engine that calls `happens` while a pass is under way, and counts those that it announced and ran."""

    def __init__(self, engine: Engine, happens: Callable[[], None]):
        self._engine, self._happens = engine, happens
        self.num_announced = self.num_run = 0

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def announce(self, batch: Batch) -> None:
        self.num_announced += 1
        self._engine.announce(batch)

    def run_announced(self, batch: Batch) -> None:
        self.num_run += 1
        self._engine.run_announced(batch)

    def collect(self) -> tuple[Batch, SampleOutput | None]:
        self._happens()
        return self._engine.collect()


class RestingEngine:
    """An engine that calls `happens` while it rests, and counts how often that was."""

    def __init__(self, engine: Engine, happens: Callable[[], None]):
        self._engine, self._happens = engine, happens
        self.num_rests = 0

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def rest(self) -> None:
        self.num_rests += 1
        self._happens()
