"""A sequence on its way through the engine, with the times of its way; metrics and request logs read it."""

from dataclasses import dataclass

from penstock.engine.output import Sequence
from penstock.engine.server.outbox import Finish, Outbox, Piece


@dataclass
class Journey:
    """One sequence, of the event loop. Times are time.perf_counter's: when it came, got its first row, its
    first and its newest token, and ended; None while that has not happened. `gap_s` is the time between its two newest
    tokens."""

    sequence: Sequence
    outbox: Outbox
    choice: int
    came_s: float
    row_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    ended_s: float | None = None
    gap_s: float | None = None
    finish: Finish | None = None
    num_tokens: int = 0

    def take(self, text: str, is_last: bool, now_s: float) -> Piece:
        """Notes what a pass gave, and makes the client's piece of it."""
        sequence, num_before = self.sequence, self.num_tokens
        self.num_tokens = len(sequence.request.output_token_ids)
        self.gap_s = None
        if self.num_tokens > num_before:
            self.gap_s = None if self.last_token_s is None else now_s - self.last_token_s
            self.first_token_s = now_s if self.first_token_s is None else self.first_token_s
            self.last_token_s = now_s
        if is_last:
            self.ended_s, self.finish = now_s, finish_of(sequence)
        logprobs = sequence.logprobs[num_before:]
        return Piece(self.choice, [text], logprobs, self.num_tokens, self.finish, is_first=num_before == 0)


def finish_of(sequence: Sequence) -> Finish:
    """The end of a sequence that has ended."""
    request = sequence.request
    stop_reason = sequence.special_stops.get(request.stop_reason, request.stop_reason)
    return Finish(request.finish_reason.value, stop_reason, sequence.error)
