"""Predicts what a split execution will move, from a model's steps and the rows of a pass. Torch-free.

The host side walks the plan. Norms, RoPE, residuals, the KV cache, activations, softmax and sampling are its own; each
embedding, linear layer, attention matmul (or fused attention) and head is a call to the device side:

    embedding          token ids (T)                        -> x (T, D)
    attn_qkv           x_ (T, D)                            -> q, k and v (T, (H + 2K) E)
    attention_scores   q (T, H, E), k (C, K, E)             -> scores (H, T, C)       for each row
    attention_values   probabilities (H, T, C), v (C, K, E) -> heads (T, H, E)        for each row
    attention          q, k and v                           -> heads (T, H, E)        fused, for each row
    attn_output        heads (T, H E)                       -> x_ (T, D)
    ffn_up             x_ (T, D)                            -> gate and up (T, 2I)
    ffn_down           gated (T, I)                         -> x_ (T, D)
    head               the sampled rows (N, D)              -> logits (N, V)

T tokens of the pass or of a row of it, C context tokens of the row, N sampled rows, D hidden, H/K query/KV heads, E
head dim, I FFN width, V vocab. Token ids cross as int64, all else in the wire dtype.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from penstock.engine.model.shard import local_ffn_size
from penstock.engine.model.spec import DTYPE_BYTES, ModelSpec
from penstock.engine.model.steps import activation_widths
from penstock.engine.planning.step_cost import MATRICES
from penstock.parallel.ledger import Site, TransferLedger
from penstock.scheduler.batching.batch import BatchRow
from penstock.scheduler.passes.pass_plan import Compute

WIRE_DTYPES = ("float32", "bfloat16")
SCORES, FUSED, REPEATED = "scores", "fused", "repeated"
ATTENTION_WAYS = {
    SCORES: "scores cross to the host side for their softmax and back",
    FUSED: "the device side attends",
    REPEATED: "as scores, with K and V repeated to all query heads before they cross",
}
ATTENTION_OPERATIONS = ("attention_scores", "attention_values", "attention")
TOKEN_ID_BYTES = 8
ROWS, HEAD_DIM = "rows", "head_dim"
PERMUTED = {
    ROWS: "token rows, for the embedding and the linear layers",
    HEAD_DIM: "the dims of heads, for attention",
}
LEAST_KEY_BYTES = 16
MOST_TIMEOUT_S = 10**6


@dataclass(frozen=True)
class SplitConfig:
    """Holds how tensors of a split execution cross. With `process` the device side is a process of its own, which has
    `timeout_s` seconds for each answer beside what its work takes on the slowest machine (deadline.py). `permute` names
    some of PERMUTED, in a sequence or in a string with commas; the device side sees these in another order.
    `permute_key` is the key of the permutations in hex; with None one is drawn.

    Raises ValueError, naming the field, for a value that is not known."""

    wire_dtype: str = WIRE_DTYPES[0]
    attention: str = SCORES
    process: bool = False
    permute: tuple[str, ...] | str = ()
    permute_key: str | None = field(default=None, repr=False)  # a secret
    timeout_s: float = 60.0

    def __post_init__(self):
        for name, known in (("wire_dtype", WIRE_DTYPES), ("attention", tuple(ATTENTION_WAYS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(known)}")
        if not isinstance(self.process, bool):
            raise ValueError(f"process={self.process!r}: expected True or False")
        is_number = isinstance(self.timeout_s, int | float) and not isinstance(self.timeout_s, bool)
        if not is_number or not 0 < self.timeout_s <= MOST_TIMEOUT_S:
            raise ValueError(f"timeout_s={self.timeout_s!r}: expected seconds, above 0 and at most {MOST_TIMEOUT_S}")
        names = self.permute.split(",") if isinstance(self.permute, str) else self.permute
        if not isinstance(names, list | tuple) or not all(name in tuple(PERMUTED) for name in names):
            raise ValueError(f"permute={self.permute!r}: expected {' or '.join(PERMUTED)}, or both with a comma")
        object.__setattr__(self, "permute", tuple(name for name in PERMUTED if name in names))
        if self.permute_key is not None:
            self._check_key()

    def _check_key(self) -> None:
        """Raises ValueError for a bad key, without showing it: it is a secret."""
        if not self.permute:
            raise ValueError("permute_key: nothing is permuted without permute")
        try:
            num_bytes = len(bytes.fromhex(self.permute_key))
        except (TypeError, ValueError):
            raise ValueError("permute_key: expected hex digits, an even number of them") from None
        if num_bytes < LEAST_KEY_BYTES:
            raise ValueError(f"permute_key: {num_bytes} bytes, expected at least {LEAST_KEY_BYTES}")


class Remedy(NamedTuple):
    """A way to cross, and the tokens of the chunks in which the prompt is prefilled; with None it is one chunk."""

    config: SplitConfig
    chunk_tokens: int | None = None


# The original way, and remedies for it. With fused attention K and V need not be repeated.
REMEDIES = {
    "original": Remedy(SplitConfig("float32", REPEATED)),
    "K, V not repeated": Remedy(SplitConfig("float32", SCORES)),
    "K, V not repeated, chunks of 256": Remedy(SplitConfig("float32", SCORES), 256),
    "bfloat16 wire": Remedy(SplitConfig("bfloat16", REPEATED)),
    "fused attention": Remedy(SplitConfig("float32", FUSED)),
    "bfloat16 wire, fused attention": Remedy(SplitConfig("bfloat16", FUSED)),
}


class PassRow(NamedTuple):
    """A row of a pass: the tokens that it computes, those it attends to (its own among them), whether it samples."""

    num_tokens: int
    num_context: int
    samples: bool

    @staticmethod
    def of(row: BatchRow) -> "PassRow":
        return PassRow(len(row.tokens), row.num_cached + len(row.tokens), row.samples)


def is_call(step: Compute) -> bool:
    """Tells whether the device side computes this step."""
    return step.step in ("embedding", "attention") or step.step in MATRICES


def linear_activations(spec: ModelSpec, step: Compute) -> tuple[str, int, str]:
    """The activation that a linear step reads, how many of its first columns, and the activation that it writes."""
    reads = next(name for name, letters in step.effects if "r" in letters)
    writes = next(name for name, letters in step.effects if "w" in letters)
    leading = {"attn": spec.num_heads * spec.head_dim, "ffn": local_ffn_size(spec.ffn_size, 1, spec.ffn_multiple)}
    return reads, leading.get(reads, spec.hidden_size), writes


def prefill(num_tokens: int, chunk_tokens: int | None = None) -> list[list[PassRow]]:
    """The passes of one prompt, each with its row."""
    chunk_tokens = chunk_tokens or num_tokens
    ends = [min(start + chunk_tokens, num_tokens) for start in range(0, num_tokens, chunk_tokens)]
    return [[PassRow(end - start, end, end == num_tokens)] for start, end in zip([0, *ends], ends)]


def predict(
    steps: Sequence[Compute], spec: ModelSpec, passes: Iterable[Sequence[PassRow]], config: SplitConfig
) -> TransferLedger:
    """The ledger of passes over these rows. `steps` are those of a plan without fused steps."""
    ledger = TransferLedger()
    for rows in passes:
        add_pass(ledger, steps, spec, rows, config)
    return ledger


def add_pass(
    ledger: TransferLedger, steps: Iterable[Compute], spec: ModelSpec, rows: Sequence[PassRow], config: SplitConfig
) -> None:
    """Adds the calls of one pass to a ledger."""
    element = DTYPE_BYTES[config.wire_dtype]
    widths = activation_widths(spec, tp_size=1)
    lengths = {"tokens": sum(row.num_tokens for row in rows), "rows": sum(row.samples for row in rows)}
    for step in filter(is_call, steps):
        if step.step == "embedding":
            num_tokens = lengths["tokens"]
            ledger.add(site(step), num_tokens * TOKEN_ID_BYTES, num_tokens * spec.hidden_size * element)
        elif step.step == "attention":
            for row in rows:
                for operation, sent, received in _attention(spec, row, config.attention):
                    ledger.add(Site(operation, step.layer_idx), sent * element, received * element)
        else:
            _, width, writes = linear_activations(spec, step)
            unit, out_width = widths[writes]
            if lengths[unit]:
                ledger.add(site(step), lengths[unit] * width * element, lengths[unit] * out_width * element)


def site(step: Compute) -> Site:
    return Site(step.step, step.layer_idx)


def _attention(spec: ModelSpec, row: PassRow, way: str) -> list[tuple[str, int, int]]:
    """Operation, elements sent and elements received of each call for one row."""
    q = row.num_tokens * spec.num_heads * spec.head_dim
    kv = row.num_context * spec.head_dim * (spec.num_heads if way == REPEATED else spec.num_kv_heads)
    scores = row.num_tokens * row.num_context * spec.num_heads
    if way == FUSED:
        return [("attention", q + 2 * kv, q)]
    return [("attention_scores", q + kv, scores), ("attention_values", scores + kv, q)]
