"""The engine as it tells of itself to the front: what stays as it is once it is loaded, what changes with passes, and
the pass that ended last."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from penstock.engine.runtime.pass_times import Timed
from penstock.scheduler.cost.pass_work import PassShape
from penstock.scheduler.cost.time_model import PassTime


@dataclass(frozen=True)
class EngineFacts:
    """The limits of requests and passes; bytes of weights of one rank that stay on its device and that stream in a
    pass; and what /status shows as it is."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_pages: int  # of the KV cache, for requests
    vocab_size: int
    caches_prefixes: bool
    resident_bytes: int
    streamed_bytes: int
    shown: dict[str, Any]


class EngineState(NamedTuple):
    """The requests that hold rows and those that wait, and for what; pages that nobody holds, and those of them that
    hold nothing; the scheduler's counts; and the seconds that a pass of the rows that there are is predicted to take,
    of one row at least."""

    num_running: int = 0
    num_waiting: int = 0
    why_waiting: str | None = None
    num_available_pages: int = 0
    num_free_pages: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_asked_tokens: int = 0
    num_hit_tokens: int = 0
    num_free_tokens: int = 0
    num_free_tokens_used: int = 0
    pass_s: float = 0.0


def pass_told(timed: Timed, num_sampled: int) -> list[Any]:
    """A pass that ended, and the tokens that it gave, as a message carries them."""
    shape, predicted = dataclasses.astuple(timed.shape), dataclasses.astuple(timed.predicted)
    return [num_sampled, shape, timed.measured_s, predicted, timed.host_s]


def pass_heard(told: list[Any]) -> tuple[Timed, int]:
    """The inverse of `pass_told`."""
    num_sampled, shape, measured_s, predicted, host_s = told
    return Timed(PassShape(*shape), measured_s, PassTime(*predicted), host_s), num_sampled
