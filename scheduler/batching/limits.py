"""The limits of one sequence, whatever runs beside it."""

from dataclasses import dataclass

from penstock.scheduler.batching.request import Request
from penstock.scheduler.batching.retention import Retention


def most_pages(request: Request, retention: Retention, max_model_len: int) -> int:
    """Pages of a request at its longest. Its last token is sampled and never computed, so it has no KV."""
    return retention.num_pages(request.most_tokens(max_model_len) - 1)


@dataclass(frozen=True)
class Limits:
    """A sequence has at most `max_model_len` tokens, prompt and output, and what `retention` keeps of them has room in
    the `num_pages` of the KV cache."""

    max_model_len: int
    num_pages: int
    retention: Retention

    def check(self, request: Request) -> None:
        """Raises ValueError if the prompt is empty or leaves no room for an output token, or if the request at its
        longest needs more pages than there are."""
        request.check_length(self.max_model_len)
        num_pages = most_pages(request, self.retention, self.max_model_len)
        if num_pages > self.num_pages:
            raise ValueError(
                f"prompt {request.id}: {request.most_tokens(self.max_model_len)} tokens (prompt and max_tokens) need"
                f" {num_pages} pages of {self.retention.page_size} tokens, and there are {self.num_pages}"
            )
