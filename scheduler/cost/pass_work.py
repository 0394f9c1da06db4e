"""The work of a pass, whatever its speed: its shape, and the bytes, FLOPs and reduces of its steps.

Torch-free. `engine/planning/step_cost.py` fills StepWork in from a model's layout; `time_model.py` turns it into
seconds.
"""

from dataclasses import dataclass

KV_SHARE = 0.72  # decode attention reads keys and values at this share of the memory rate; measured at 32k tokens
ATTENTION_SHARE = 0.6  # prefill attention's share of the GEMM rate; measured: 0.48 at 2000 tokens, 0.65 at 8000
# Passes with a prompt in them copy the keys and values that their rows attend to before they attend, entry by entry, at
# this share of the memory rate.
GATHER_SHARE = 0.25
LEAST_WHOLE_TOKENS = 1024  # a row that starts in a pass with so many tokens attends to its own keys and copies none


@dataclass(frozen=True)
class PassShape:
    """What a pass computes: tokens, rows, and the tokens whose KV is cached already, summed over rows.

    `num_pairs` counts the pairs of a query and a token that it attends to, itself or an earlier one; `num_gathered`
    counts the tokens whose keys and values are copied if the pass is no decode pass. None means that all rows are
    alike.
    """

    num_tokens: int
    num_rows: int
    context_tokens: int
    num_pairs: int | None = None
    num_gathered: int | None = None

    @property
    def attended_pairs(self) -> float:
        if self.num_pairs is not None:
            return self.num_pairs
        queries_a_row = self.num_tokens / max(self.num_rows, 1)
        return self.context_tokens * queries_a_row + self.num_tokens * (queries_a_row + 1) / 2

    @property
    def gathered_tokens(self) -> int:
        """Tokens whose keys and values are copied: none in a decode pass, else those of all rows that are not whole."""
        if self.is_decode:
            return 0
        if self.num_gathered is not None:
            return self.num_gathered
        is_whole = not self.context_tokens and self.num_tokens >= LEAST_WHOLE_TOKENS * self.num_rows
        return 0 if is_whole else self.context_tokens + self.num_tokens

    @property
    def is_decode(self) -> bool:
        """Whether each row has one token; such a pass runs as a graph, where there are graphs."""
        return self.num_tokens == self.num_rows


@dataclass(frozen=True)
class StepWork:
    """What one rank does in one step, for any shape of pass: bytes of weights, of activations a token and a sampled row
    (each read and write counts), and of KV a token; FLOPs a token, a row, and a pair of query and context token;
    bytes a token of the step's all-reduce, 0 where the step contains no all-reduce."""

    step: str
    weight_bytes: int = 0
    token_bytes: int = 0
    row_bytes: int = 0
    kv_token_bytes: int = 0
    token_flops: int = 0
    row_flops: int = 0
    attention_flops: int = 0
    reduce_token_bytes: int = 0

    @property
    def is_idle(self) -> bool:
        """Whether the step launches nothing, as an all-reduce of one rank does."""
        return self == StepWork(self.step)

    def nbytes(self, shape: PassShape) -> int:
        """Bytes read and written in device memory."""
        moved_bytes = shape.num_tokens * self.token_bytes + shape.num_rows * self.row_bytes
        return self.weight_bytes + moved_bytes + self._kv_bytes(shape) + self._gathered_bytes(shape)

    def _kv_bytes(self, shape: PassShape) -> int:
        return (shape.context_tokens + shape.num_tokens) * self.kv_token_bytes

    def _gathered_bytes(self, shape: PassShape) -> int:
        """Bytes read and written by the copies."""
        return 2 * shape.gathered_tokens * self.kv_token_bytes

    def memory_bytes(self, shape: PassShape) -> float:
        """Bytes that would take as long as the step's at the full memory rate."""
        slow_bytes = (1 / KV_SHARE - 1) * self._kv_bytes(shape) + (1 / GATHER_SHARE - 1) * self._gathered_bytes(shape)
        return self.nbytes(shape) + slow_bytes

    def flops(self, shape: PassShape) -> float:
        linear_flops = shape.num_tokens * self.token_flops + shape.num_rows * self.row_flops
        return linear_flops + shape.attended_pairs * self.attention_flops

    def gemm_flops(self, shape: PassShape) -> float:
        """FLOPs of a GEMM that would take as long as the step."""
        extra = (1 / ATTENTION_SHARE - 1) * shape.attended_pairs * self.attention_flops
        return self.flops(shape) + extra


@dataclass(frozen=True)
class PassWork:
    """What one rank does in a pass, for any shape: bytes of the weights that cross the link and of those that stay, as
    they are kept; the number of decompressed groups and of the bytes they become; and the steps that launch something,
    each with the number of times that it occurs."""

    streamed_bytes: int
    resident_bytes: int
    steps: tuple[tuple[StepWork, int], ...]
    num_decompressed: int = 0
    decompressed_bytes: int = 0

    @property
    def num_steps(self) -> int:
        return sum(count for _, count in self.steps)

    @property
    def num_reduces(self) -> int:
        return sum(count for work, count in self.steps if work.reduce_token_bytes)

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return sum(count * work.kv_token_bytes for work, count in self.steps)

    def read_bytes(self, shape: PassShape) -> int:
        """The bytes that a pass must read: each weight once, and keys and values of context and new tokens."""
        kv_bytes = (shape.context_tokens + shape.num_tokens) * self.kv_token_bytes
        return self.streamed_bytes + self.resident_bytes + kv_bytes

    def flops(self, shape: PassShape) -> float:
        """FLOPs of the linears and of causal attention."""
        return sum(count * work.flops(shape) for work, count in self.steps)
