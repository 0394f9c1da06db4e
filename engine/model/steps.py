"""The steps of a pass, as data: which instruction touches which activation with which group's weights.

Torch-free. A family with another topology is another list of the same instructions. The letters of `effects` are those
of the step table: + create, r read, w write, x destroy. The residual is added once, after the reduce, and in
transformers' order of additions.
"""

from dataclasses import replace

from penstock.engine.model.shard import local_ffn_size, local_vocab_size, pad_to, shard_heads
from penstock.engine.model.spec import DTYPE_BYTES, ModelSpec
from penstock.scheduler.passes.pass_plan import Compute, GroupId

KEYS_AT_ONCE = 4096  # tokens whose keys, cached un-rotated, are rotated at a time: it bounds the temporaries
SCORE = "score_prompts"
SELECT, SELECT_ATTENDED = "select_rows", "select_attended"  # steps that leave the rows whose logits are wanted
COPIED_ROWS = 256  # rows whose logits are copied as float32 at a time, for penalties and filters: it bounds them too
SCORED_ROWS = 128  # tokens of prompts whose logits are there at a time, for their log probabilities


def model_steps(spec: ModelSpec) -> list[Compute]:
    """All steps of a pass, from the embedding to the sampled tokens."""
    layer = _parallel_layer if spec.parallel_residual else _serial_layer
    steps = [_step("embedding", -1, None, x="+w"), _step("embed_allreduce", -1, None, x="rw")]
    for layer_idx in range(spec.num_layers):
        steps += layer(spec, layer_idx)
    head = GroupId(spec.num_layers, "head")
    return [
        *steps,
        _step("final_norm", head.layer_idx, head, x="rx", x_="+w"),
        _step(SCORE, head.layer_idx, head, x_="r", prompt_logits="+rwx"),
        _step(SELECT, head.layer_idx, None, x_="rw"),
        *_of_rows(
            _step("head", head.layer_idx, head, x_="rx", part="+w"),
            _step("logits_gather", head.layer_idx, None, part="rx", logits="+w"),
        ),
        _step("sample", head.layer_idx, None, logits="rx"),  # which notes all tokens too
    ]


def select_early(steps: list[Compute]) -> list[Compute]:
    """The same steps with the rows whose logits are wanted selected behind the last attention: nobody reads more of
    other tokens than the keys and values that they have in each layer."""
    last = max(index for index, step in enumerate(steps) if step.step == "attention")
    select = _step(SELECT_ATTENDED, steps[last].layer_idx, None, attn="rw", x="rw")
    *behind, sample = steps[last + 1 :]
    return [*steps[: last + 1], select, *_of_rows(*behind), sample]


def _of_rows(*steps: Compute) -> list[Compute]:
    return [replace(step, of_rows=True) for step in steps]


def sums_over_ranks(step: Compute) -> bool:
    """Tells whether the step is an all-reduce or contains one."""
    return any(part.endswith("allreduce") for part in step.parts)


def _step(step: str, layer_idx: int, group: GroupId | None, **effects: str) -> Compute:
    return Compute(step, layer_idx, group, tuple(effects.items()))


def _attention(spec: ModelSpec, layer_idx: int, attn: GroupId) -> list[Compute]:
    return [
        _step("attn_norm", layer_idx, attn, x="r", x_="+w"),
        _step("attn_qkv", layer_idx, attn, x_="rx", attn="+w"),
        _step("rope", layer_idx, attn if spec.qk_norm else None, attn="rw"),
        _step("attention", layer_idx, None, attn="rw"),
    ]


def _ffn(layer_idx: int, ffn: GroupId) -> list[Compute]:
    return [
        _step("ffn_norm", layer_idx, ffn, x="r", x_="+w"),
        _step("ffn_up", layer_idx, ffn, x_="rx", ffn="+w"),
        _step("activation", layer_idx, None, ffn="rw"),
        _step("ffn_down", layer_idx, ffn, x_="+w", ffn="rx"),
    ]


def _serial_layer(spec: ModelSpec, layer_idx: int) -> list[Compute]:
    attn, ffn = GroupId(layer_idx, "attn"), GroupId(layer_idx, "ffn")
    return [
        *_attention(spec, layer_idx, attn),
        _step("attn_output", layer_idx, attn, x_="+w", attn="rx"),
        _step("attn_allreduce", layer_idx, None, x_="rw"),
        _step("attn_residual", layer_idx, None, x="rw", x_="rx"),
        *_ffn(layer_idx, ffn),
        _step("ffn_allreduce", layer_idx, None, x_="rw"),
        _step("ffn_residual", layer_idx, None, x="rw", x_="rx"),
    ]


def _parallel_layer(spec: ModelSpec, layer_idx: int) -> list[Compute]:
    """The steps of a GPT-NeoX layer: attention and FFN read the same x, x becomes `(ffn + attn) + x`, and there is one
    reduce."""
    attn, ffn = GroupId(layer_idx, "attn"), GroupId(layer_idx, "ffn")
    return [
        *_attention(spec, layer_idx, attn),
        _step("attn_output_beside", layer_idx, attn, y="+w", attn="rx"),
        *_ffn(layer_idx, ffn),
        _step("parallel_add", layer_idx, None, x_="rw", y="rx"),
        _step("ffn_allreduce", layer_idx, None, x_="rw"),
        _step("ffn_residual", layer_idx, None, x="rw", x_="rx"),
    ]


def activation_widths(spec: ModelSpec, tp_size: int) -> dict[str, tuple[str, int]]:
    """Says what the rows of each activation are ("tokens" of the batch, "rows" that are sampled, or "scored rows" of
    prompts, some at a time), and its width in elements on one rank."""
    shard = shard_heads(spec.num_heads, spec.num_kv_heads, tp_size, 0)
    vocab = local_vocab_size(spec.vocab_size, tp_size)
    return {
        "x": ("tokens", spec.hidden_size),
        "x_": ("tokens", spec.hidden_size),
        "y": ("tokens", spec.hidden_size),
        "attn": ("tokens", (shard.num_heads + 2 * len(shard.kv_heads)) * spec.head_dim),
        "ffn": ("tokens", local_ffn_size(spec.ffn_size, tp_size, spec.ffn_multiple) * (2 if spec.gated else 1)),
        "part": ("rows", vocab),
        "logits": ("rows", vocab * tp_size),
        "prompt_logits": ("scored rows", vocab * tp_size),
    }


def most_rows(max_num_batched_tokens: int, max_num_seqs: int) -> dict[str, int]:
    """Says how many rows activations have at most, by what their rows are."""
    scored = min(SCORED_ROWS, max_num_batched_tokens)
    return {"tokens": max_num_batched_tokens, "rows": max_num_seqs, "scored rows": scored}


def activation_bytes(
    spec: ModelSpec, dtype: str, tp_size: int, max_num_batched_tokens: int, max_num_seqs: int
) -> dict[str, int]:
    """Bytes of each activation at its largest, rounded up to 256."""
    most = most_rows(max_num_batched_tokens, max_num_seqs)
    widths = activation_widths(spec, tp_size)
    return {name: pad_to(most[unit] * width * DTYPE_BYTES[dtype], 256) for name, (unit, width) in widths.items()}
