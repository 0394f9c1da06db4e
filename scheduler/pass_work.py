"""What a pass computes, and what one rank has to move and to calculate for it: bytes and FLOPs, without any rate.

PURE. The time model predicts from it, benchmarks take their bounds from it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PassShape:
    """What a pass computes: tokens, rows, and the tokens of KV that its rows attend to, all rows together.

    `num_pairs` are the pairs of a token and one that it attends to (causally, itself included); None stands for rows
    that are all alike.
    """

    num_tokens: int
    num_rows: int
    context_tokens: int
    num_pairs: int | None = None

    @property
    def attended_pairs(self) -> float:
        if self.num_pairs is not None:
            return self.num_pairs
        queries_a_row = self.num_tokens / max(self.num_rows, 1)
        return self.context_tokens * queries_a_row + self.num_tokens * (queries_a_row + 1) / 2


@dataclass(frozen=True)
class PassWork:
    """What one rank does in a pass, apart from the shape. Bytes are weights read; FLOPs per token of the layers, per
    row of the head, per pair of query and context token of attention; bytes per token of KV and of one reduce."""

    streamed_bytes: int
    resident_bytes: int
    token_flops: int
    row_flops: int
    attention_flops: int
    kv_token_bytes: int
    num_reduces: int
    reduce_token_bytes: int
    num_steps: int

    def read_bytes(self, shape: PassShape) -> int:
        """From the device's memory: each weight once, and keys and values of context and new tokens."""
        kv_bytes = (shape.context_tokens + shape.num_tokens) * self.kv_token_bytes
        return self.streamed_bytes + self.resident_bytes + kv_bytes

    def flops(self, shape: PassShape) -> float:
        """Of the linears and of causal attention."""
        linears = shape.num_tokens * self.token_flops + shape.num_rows * self.row_flops
        return linears + shape.attended_pairs * self.attention_flops
