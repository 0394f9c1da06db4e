"""The work of a pass, whatever its speed: its shape, and the bytes, FLOPs and reduces of its steps.

Torch-free. `engine/planning/step_cost.py` fills StepWork in from a model's layout; `time_model.py` turns it into
seconds.
"""

import functools
from dataclasses import dataclass

# Decode attention reads keys and values at this share of the memory rate: 64 rows of 1,519 tokens at 1.0 of it, of
# 2,100 at 0.88, one of 65,000 among 63 of 512 at 0.85, 8 of 32,000 at 0.73.
KV_SHARE = 0.8
# And at this one what several rows share, each time but the first: it is in the GPU's own cache by then. 290 rows
# behind the same 2,000 tokens, 8 MB in a layer, read them at 1.7. Nobody measured more than that cache holds.
SHARED_KV_SHARE = 1.7
ATTENTION_SHARE = 0.65  # the share of the GEMM rate that prefill attention has in long prompts: 0.65 at 8000 tokens
# What a token of a prompt costs attention beside its pairs, in pairs: tiles that reach over the diagonal, and starts of
# programs. Measured in passes of 8192 tokens: 707 in prompts of 512, 225 in one of 2000.
TOKEN_PAIRS = 500
# In long passes chunks that continue copy the keys and values that they attend to before they attend, at this share of
# the memory rate. (Short ones may read them where they lie, which is not foreseen here: of 125 of 64 tokens three such
# passes took 7 % less.) Measured where a token has 2 KiB of each: 0.6 of 4,000 tokens, 0.75 of 10,000, 0.9 of 35,000.
GATHER_SHARE = 0.7
# Tokens of a pass with prompts that is padded and captured: eager, its launches would take longer than its work.
MOST_PADDED_TOKENS = 2048
MOST_PADDED_CHUNKS = 32  # prompts, or parts of them, in such a pass
SMALL_STEP, SMALL, STEP = 64, 512, 128  # it is padded to a multiple of a step, of the small one up to SMALL
GATHERED_TOKENS = 8192  # of contexts that are copied at a time for several chunks; for one that has more, all


def padded_tokens(num_tokens: int) -> int:
    """The tokens to which a pass with prompts is padded, if the budget of a pass allows as many."""
    step = _padding_step(num_tokens)
    return -(-num_tokens // step) * step


def unpadded_tokens(num_tokens: int) -> int:
    """The most tokens of a pass with prompts, up to so many, that are not padded."""
    if num_tokens > MOST_PADDED_TOKENS:
        return num_tokens
    step = _padding_step(num_tokens)
    return num_tokens // step * step


def _padding_step(num_tokens: int) -> int:
    return SMALL_STEP if num_tokens <= SMALL else STEP


@dataclass(frozen=True)
class PassShape:
    """The work of a pass: tokens, rows, and the tokens whose KV is cached already, summed over rows.

    `num_pairs` counts the pairs of a query and a token that it attends to, itself or an earlier one; `num_read` the
    tokens that rows of one token each attend to, and read where they are cached; `num_behind` those that chunks behind
    cached tokens attend to. Prompts that start in the pass attend to what they have at hand. `num_scored` counts the
    tokens of prompts whose log probabilities are asked for. Of the cached tokens, those that several rows share count
    for each of them, and in `num_shared` for each but one. `num_chunks` counts prompts and parts of them. None means
    that all rows are alike.
    """

    num_tokens: int
    num_rows: int
    context_tokens: int
    num_pairs: int | None = None
    num_read: int | None = None
    num_behind: int | None = None
    num_scored: int = 0
    num_shared: int = 0
    num_chunks: int | None = None

    @functools.cached_property
    def attended_pairs(self) -> float:
        if self.num_pairs is not None:
            return self.num_pairs
        queries_a_row = self.num_tokens / max(self.num_rows, 1)
        return self.context_tokens * queries_a_row + self.num_tokens * (queries_a_row + 1) / 2

    @functools.cached_property
    def read_tokens(self) -> int:
        """Tokens that rows of one token attend to, and read where they are cached, each for one query."""
        if self.num_read is not None:
            return self.num_read
        return self.context_tokens + self.num_tokens if self.is_decode else 0

    @functools.cached_property
    def behind_tokens(self) -> int:
        """Tokens that chunks behind cached ones attend to."""
        if self.num_behind is not None:
            return self.num_behind
        return self.context_tokens + self.num_tokens if self.context_tokens and not self.is_decode else 0

    @functools.cached_property
    def copied_tokens(self) -> int:
        """Those of them that are taken to be copied, and read from the copy: where the pass is not padded."""
        return 0 if self.is_padded else self.behind_tokens

    @functools.cached_property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values attention reads where they are cached."""
        return self.read_tokens + self.behind_tokens - self.copied_tokens

    @functools.cached_property
    def reread_tokens(self) -> int:
        """Those of them that another row reads too, for each row but one; what is copied is taken to share as much."""
        return self.num_shared * self.cached_tokens // max(self.read_tokens + self.behind_tokens, 1)

    @functools.cached_property
    def first_tokens(self) -> int:
        """The others of them: what rows share counts once."""
        return self.cached_tokens - self.reread_tokens

    @functools.cached_property
    def run_tokens(self) -> int:
        """Tokens that linears compute, padding included."""
        return padded_tokens(self.num_tokens) if self.is_padded and not self.is_decode else self.num_tokens

    @functools.cached_property
    def is_decode(self) -> bool:
        """Tells whether each row has one token; such a pass runs as a graph, where there are graphs."""
        return self.num_tokens == self.num_rows and not self.num_scored

    @functools.cached_property
    def is_padded(self) -> bool:
        """Tells whether a pass with prompts is small enough to be padded, and runs as a graph where nothing streams."""
        num_chunks = (0 if self.is_decode else self.num_rows) if self.num_chunks is None else self.num_chunks
        return not self.num_scored and self.num_tokens <= MOST_PADDED_TOKENS and num_chunks <= MOST_PADDED_CHUNKS


@dataclass(frozen=True)
class StepWork:
    """The work of one rank in one step, for any shape of pass: bytes of weights, of activations a token and a sampled
    row (each read and write counts), and of KV a token; FLOPs a token, a row, and a pair of query and context token;
    bytes and FLOPs of a token that is scored, beside those; bytes a token, or a sampled row, of the step's all-reduce,
    0 where the step contains none. In passes of 1, 2, ... tokens, for each of which `few_bytes` has an entry, it reads
    weights as they are stored, which takes as long as these bytes do at the memory rate."""

    step: str
    weight_bytes: int = 0
    token_bytes: int = 0
    row_bytes: int = 0
    kv_token_bytes: int = 0
    token_flops: int = 0
    row_flops: int = 0
    attention_flops: int = 0
    scored_bytes: int = 0
    scored_flops: int = 0
    reduce_token_bytes: int = 0
    reduce_row_bytes: int = 0
    few_bytes: tuple[int, ...] = ()

    @functools.cached_property
    def is_idle(self) -> bool:
        """Tells whether the step never launches anything, as an all-reduce of one rank does."""
        return self == StepWork(self.step)

    @functools.cached_property
    def only_weights(self) -> bool:
        """Tells whether the step does nothing but move weights."""
        return self == StepWork(self.step, weight_bytes=self.weight_bytes, few_bytes=self.few_bytes)

    @functools.cached_property
    def only_scores(self) -> bool:
        """Tells whether the step launches something only where tokens are scored."""
        return self == StepWork(self.step, scored_bytes=self.scored_bytes, scored_flops=self.scored_flops)

    def runs(self, shape: PassShape) -> bool:
        """Tells whether the step launches something in a pass."""
        if self.only_weights:
            return self._read_bytes(shape.run_tokens) > 0
        return not (self.only_scores and not shape.num_scored)

    @functools.cached_property
    def is_reduce(self) -> bool:
        """Tells whether the step contains an all-reduce, or what counts as one."""
        return bool(self.reduce_token_bytes or self.reduce_row_bytes)

    def reduce_bytes(self, shape: PassShape) -> int:
        """Bytes of its all-reduce."""
        return shape.num_tokens * self.reduce_token_bytes + shape.num_rows * self.reduce_row_bytes

    def nbytes(self, shape: PassShape) -> int:
        """Bytes read and written in device memory."""
        kv_bytes = (shape.first_tokens + 2 * shape.copied_tokens) * self.kv_token_bytes  # a copy is a read and a write
        return self.other_bytes(shape) + kv_bytes

    def _read_bytes(self, num_tokens: int) -> int:
        """Bytes of weights that are read, or those that would take as long."""
        return self.few_bytes[num_tokens - 1] if 0 < num_tokens <= len(self.few_bytes) else self.weight_bytes

    def cache_bytes(self, shape: PassShape) -> float:
        """Bytes that would take as long at the full memory rate as to read from the cache and to copy from it, which
        kernels of their own do."""
        if not self.kv_token_bytes:
            return 0.0
        read_tokens = shape.first_tokens / KV_SHARE + shape.reread_tokens / SHARED_KV_SHARE
        return (read_tokens + 2 * shape.copied_tokens / GATHER_SHARE) * self.kv_token_bytes

    def other_bytes(self, shape: PassShape) -> int:
        """Bytes of everything else; what was copied is read."""
        moved_bytes = shape.num_tokens * self.token_bytes + shape.num_rows * self.row_bytes
        moved_bytes += shape.num_scored * self.scored_bytes + shape.copied_tokens * self.kv_token_bytes
        return self._read_bytes(shape.run_tokens) + moved_bytes

    def memory_bytes(self, shape: PassShape) -> float:
        """Bytes that would take as long as the step's at the full memory rate."""
        return self.cache_bytes(shape) + self.other_bytes(shape)

    def flops(self, shape: PassShape) -> float:
        return self._linear_flops(shape, shape.num_tokens) + shape.attended_pairs * self.attention_flops

    def _linear_flops(self, shape: PassShape, num_tokens: int) -> int:
        by_row = shape.num_rows * self.row_flops + shape.num_scored * self.scored_flops
        return num_tokens * self.token_flops + by_row

    def gemm_flops(self, shape: PassShape) -> float:
        """FLOPs of a GEMM that would take as long as the step, but for the rows of one token, which memory binds."""
        linear_flops = self._linear_flops(shape, shape.run_tokens)
        pairs = shape.attended_pairs - shape.read_tokens + TOKEN_PAIRS * (shape.num_tokens - shape.num_rows)
        return linear_flops + pairs * self.attention_flops / ATTENTION_SHARE


@dataclass(frozen=True)
class PassWork:
    """The work of one rank in a pass, for any shape: bytes of the weights that cross the link and of those that stay,
    as they are kept; the number of decompressed groups and of the bytes they become; and the steps that launch
    something, each with the number of times that it occurs. Where compute takes about as long as the copies, it waits
    for `waited_bytes` of them (timeline.waited_s)."""

    streamed_bytes: int
    resident_bytes: int
    steps: tuple[tuple[StepWork, int], ...]
    num_decompressed: int = 0
    decompressed_bytes: int = 0
    waited_bytes: int = 0

    def num_steps(self, shape: PassShape) -> int:
        """The steps that launch something in a pass."""
        return sum(count for work, count in self.steps if work.runs(shape))

    @property
    def num_reduces(self) -> int:
        return sum(count for work, count in self.steps if work.is_reduce)

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return sum(count * work.kv_token_bytes for work, count in self.steps)

    def read_bytes(self, shape: PassShape) -> int:
        """The bytes that a pass must read: each weight once, and keys and values of context and new tokens, those that
        rows share once."""
        kv_bytes = (shape.context_tokens - shape.num_shared + shape.num_tokens) * self.kv_token_bytes
        return self.streamed_bytes + self.resident_bytes + kv_bytes

    def flops(self, shape: PassShape) -> float:
        """FLOPs of the linears and of causal attention."""
        return sum(count * work.flops(shape) for work, count in self.steps)
