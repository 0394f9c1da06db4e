"""Decides whether a request may wait: not if too many would wait then, all its sequences counted as vLLM does, nor if
the first of them would wait too long.

The wait is predicted from what the passes of this engine take (the time model, corrected by how far its passes were off
so far), from the tokens that sequences got on average, and from the prompts that wait to be read.
"""

import time

from penstock.engine.server.errors import queue_full, refused
from penstock.engine.server.remote_engine import RemoteEngine

FRESH_S = 0.05  # as long as a prediction holds
USUAL_TOKENS = 128  # of an answer, while none has ended


class Admission:
    """Predicts waits for one engine; limits are in sequences and seconds."""

    def __init__(self, engine: RemoteEngine, most_queued: int, most_wait_s: float):
        self._engine, self._most_queued, self._most_wait_s = engine, most_queued, most_wait_s
        self._predicted_s, self._predicted_at_s = 0.0, float("-inf")

    def check(self, num_own: int = 1, num_coming: int = 0) -> None:
        """Raises ApiError, with the predicted wait, if a request of so many sequences may not wait; `num_coming` were
        let in and are still being encoded. One that could never be let in is refused for good."""
        rows = self._engine.facts.max_num_seqs
        if num_own > rows + self._most_queued:
            why = f"{num_own} sequences: {rows} run here at a time, and at most {self._most_queued} may wait"
            raise refused(why, "n")
        waiting = self._engine.num_unfinished + num_coming + num_own - rows
        if waiting > self._most_queued:
            why = f"{waiting} sequences would wait with this request, and at most {self._most_queued} may"
            raise queue_full(why, self.predicted_wait_s())
        wait_s = self.predicted_wait_s()
        if wait_s > self._most_wait_s:
            raise queue_full(f"it would wait {wait_s:.0f} s, and at most {self._most_wait_s:g} s are allowed", wait_s)

    def predicted_wait_s(self) -> float:
        """The seconds that a sequence which comes now would wait for its row; 0 while nothing is loaded."""
        now_s = time.monotonic()
        if self._engine.is_ready and now_s - self._predicted_at_s > FRESH_S:
            self._predicted_s, self._predicted_at_s = self._predict(), now_s
        return self._predicted_s

    def _predict(self) -> float:
        engine, rows = self._engine, self._engine.facts.max_num_seqs
        # sequences that must end first: what was sent since the engine told its state has no row yet
        in_front = engine.num_unfinished - rows + 1
        passes = engine.mean_tokens(USUAL_TOKENS) * max(in_front, 0) / rows
        passes += engine.num_rowless_tokens() / engine.facts.max_num_batched_tokens
        times = engine.times
        off_by = times.measured_s / times.predicted_s if times.predicted_s else 1.0
        return passes * engine.state.pass_s * off_by
