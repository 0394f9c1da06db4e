"""Compares every step of our passes with transformers, layer by layer, and names the first that differs.

The engine runs first and its activations are kept. Then transformers runs twice over the same tokens. First it runs by
itself: `drift` is how far the two are apart after each step. Then it runs on our activations: each of its modules gets
our inputs, and its outputs are compared with ours, so that `step` is the difference which this step alone makes.
Additions of the residual have to agree in every bit, in every dtype, since only another order can change them. `drift`
is judged in float32 alone: in other dtypes rounding adds up to it.

Usage: python -m scripts.check_numerics --model demo --prompt "Return the" --max-tokens 8
       python -m scripts.check_numerics --model PATH --token-ids 5 17 3 --dtype bfloat16
The exit status is 1 if a step differs. It runs at tp_size 1, without graphs; reference and engine are never in memory
together.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from penstock.engine.commands.flags import Parser
from penstock.engine.compute.context import PassContext
from penstock.engine.compute.inputs import PassInputs
from penstock.engine.config import EngineConfig
from penstock.engine.llm import LLM
from penstock.engine.output import without_errors
from penstock.engine.planning.find_model import find_model
from penstock.engine.runtime.watch import Watch
from penstock.engine.text.model_text import load_tokenizer
from penstock.engine.weights.gguf_file import is_gguf
from penstock.scheduler.batching.batch import Batch
from penstock.scheduler.batching.request import SamplingParams
from penstock.scheduler.passes.pass_plan import Compute, Instruction
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from scripts.bench.entry import run_script

Key = tuple[int, str]  # layer_idx, step
States = dict[Key, Tensor]  # (T, width), in our layout: q, k, v joined; gate and up joined
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}  # of one step: a few roundings of the largest value
HEADING = "layer  step              drift       step  bits\n" + 48 * "-"
EXACT = ("embedding", "attn_residual", "ffn_residual")


@dataclass(frozen=True)
class Row:
    """The comparison of one step. `drift` and `step_error` are max|difference| / max|reference|; `fault` is what is
    wrong."""

    layer_idx: int
    step: str
    drift: float
    step_error: float
    bits_equal: bool  # of the step alone
    fault: str | None

    def __str__(self) -> str:
        errors = f"{self.drift:9.2e}  {self.step_error:9.2e}  {'yes' if self.bits_equal else 'no':4}"
        return f"{self.layer_idx:5}  {self.step:13}  {errors}  {self.fault or ''}".rstrip()


def compare(
    model: str,
    token_ids: list[int],
    dtype: str = "float32",
    max_tokens: int = 1,
    tolerance: float | None = None,
    mutate: Callable[[LLM], None] = lambda llm: None,
    **options,
) -> list[Row]:
    """Makes a row for each step, in the order of the pass, over the prompt and all but the last of `max_tokens`
    generated tokens. `mutate` may change the engine before it runs; `options` are LLM's."""
    with LLM(model, dtype=dtype, tensor_parallel_size=1, enforce_eager=True, **options) as llm:
        mutate(llm)
        ours = _watch(llm)
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        generated = without_errors(llm.generate([token_ids], params))[0].outputs[0].token_ids
        device = llm.engine.topology.device
    states = {key: torch.cat(parts) for key, parts in ours.items()}
    loading = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    reference = AutoModelForCausalLM.from_pretrained(find_model(model), **loading).to(device).eval()
    tokens = torch.tensor([token_ids + generated[:-1]], device=device)
    alone, stepwise = _run(reference, tokens, Watcher()), _run(reference, tokens, Watcher(states))
    return _rows(states, alone, stepwise, tolerance or TOLERANCES[dtype], dtype == "float32")


def first_fault(rows: list[Row]) -> Row | None:
    return next((row for row in rows if row.fault), None)


def _up(ctx: PassContext) -> Tensor:
    parts = ctx.act["ffn"].chunk(2 if ctx.model.spec.gated else 1, dim=1)
    return torch.cat([part[:, : ctx.model.spec.ffn_size] for part in parts], dim=1)  # the rest is padding


# What is kept of our activations after each step, in the layout of transformers: an activation, or a function.
OURS: dict[str, str | Callable[[PassContext], Tensor]] = {
    **dict.fromkeys(("embedding", "attn_residual", "ffn_residual"), "x"),
    **dict.fromkeys(("attn_norm", "attn_output", "ffn_norm", "ffn_down", "final_norm"), "x_"),
    **dict.fromkeys(("attn_qkv", "rope"), "attn"),
    "attn_output_beside": "y",
    "attention": lambda ctx: ctx.heads()[:, : ctx.model.num_heads].flatten(1),
    "ffn_up": _up,
    "activation": lambda ctx: ctx.act["ffn"][:, : ctx.model.spec.ffn_size],
    "logits_gather": lambda ctx: ctx.act["logits"][:, : ctx.model.spec.vocab_size],
}


def _watch(llm: LLM) -> dict[Key, list[Tensor]]:
    """Keeps the activations of every pass from now on, by step, without padding, which is behind the last token; a
    single request's passes are in order of position. Where the last layer leaves out tokens that do not sample, those
    of the others are kept."""
    kept: dict[Key, list[Tensor]] = {}
    last = llm.engine.plan.spec.num_layers - 1

    class KeepStates(Watch):
        batch: Batch | None = None  # of the pass that runs

        def begin_pass(self, batch: Batch | None) -> None:
            self.batch = batch

        def around(self, instruction: Instruction, ctx: PassContext | None, run: Callable[[], None]) -> None:
            run()
            for key, step in _keys(instruction) if isinstance(instruction, Compute) else ():
                take = OURS[step]
                state = ctx.act[take] if isinstance(take, str) else take(ctx)
                kept.setdefault(key, []).append(self.own(state, ctx.inputs, key).cpu().clone())

        def own(self, state: Tensor, inputs: PassInputs, key: Key) -> Tensor:
            if key == (last, "attention") and getattr(inputs.context, "of_lasts", None) and inputs.select is not None:
                state = state[inputs.select]
            return state[: self.batch.num_tokens if len(state) == len(inputs.tokens) else self.batch.num_sampled]

    llm.engine.watches.add(KeepStates())
    return kept


def _keys(instruction: Compute) -> Iterator[tuple[Key, str]]:
    """Yields the parts of a step, fused or not, whose results are there when it ends. A layer's last residual may be
    fused with the next layer's first norm."""
    parts = instruction.parts
    for part in parts:
        before = part == "ffn_residual" and parts[-1] in ("attn_norm", "final_norm")
        if part in OURS:
            yield (instruction.layer_idx - before, part.removesuffix("_beside")), part


@dataclass
class Watcher:
    """Keeps what transformers computes at each step. Where `forced` has our value, transformers goes on with that."""

    forced: States = field(default_factory=dict)
    states: States = field(default_factory=dict)

    def at(self, key: Key, theirs: Tensor, columns: slice = slice(None)) -> Tensor:
        """Keeps `theirs` (T, width), which are all columns of a step or the next ones of several parts; returns what
        transformers goes on with."""
        self.states[key] = torch.cat([self.states[key], theirs.cpu()], -1) if key in self.states else theirs.cpu()
        ours = self.forced.get(key)
        if ours is None:
            return theirs
        taken = theirs.clone()
        taken[-len(ours) :] = ours[:, columns]  # at the end ours are those of sampled tokens alone, which come last
        return taken


@torch.inference_mode()
def _run(model: PreTrainedModel, tokens: Tensor, watcher: Watcher) -> States:
    plain, handles = ALL_ATTENTION_FUNCTIONS["sdpa"], list(_hooks(model, watcher))
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _watched_attention(plain, watcher)
    try:
        model(tokens, use_cache=False)
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain
        for handle in handles:
            handle.remove()
    return watcher.states


def _watched_attention(attend: Callable, watcher: Watcher) -> Callable:
    """Wraps the attention of transformers, which gets q, k and v after their rotation: (1, heads, T, E) each."""

    def watched(module, *qkv_and_mask, **settings):
        *qkv, mask = qkv_and_mask
        joined = torch.cat([heads[0] for heads in qkv]).transpose(0, 1)  # (T, H + 2K, E)
        joined = watcher.at((module.layer_idx, "rope"), joined.flatten(1)).view(joined.shape)
        parts = joined.transpose(0, 1)[None].split([heads.shape[1] for heads in qkv], dim=1)
        return attend(module, *(part.contiguous() for part in parts), mask, **settings)

    return watched


def _hooks(model: PreTrainedModel, watcher: Watcher) -> Iterator:
    def after(module, key: Key, columns: slice = slice(None)):
        return module.register_forward_hook(lambda _, __, out: watcher.at(key, out[0], columns)[None])

    def before(module, key: Key):
        return module.register_forward_pre_hook(lambda _, args: (watcher.at(key, args[0][0])[None], *args[1:]))

    body, end = model.base_model, model.config.num_hidden_layers
    yield after(model.get_input_embeddings(), (-1, "embedding"))
    for layer_idx, layer in enumerate(body.layers):
        attn = getattr(layer, "self_attn", None) or layer.attention
        out = getattr(attn, "o_proj", None) or attn.dense
        down = getattr(layer.mlp, "down_proj", None) or layer.mlp.dense_4h_to_h
        yield after(layer.input_layernorm, (layer_idx, "attn_norm"))
        yield from _qkv_hooks(attn, after, watcher, (layer_idx, "attn_qkv"))
        yield before(out, (layer_idx, "attention"))
        yield after(out, (layer_idx, "attn_output"))
        if not getattr(layer, "use_parallel_residual", False):
            yield before(layer.post_attention_layernorm, (layer_idx, "attn_residual"))
        yield after(layer.post_attention_layernorm, (layer_idx, "ffn_norm"))
        yield from _side_by_side(layer.mlp, ("gate_proj", "up_proj", "dense_h_to_4h"), after, (layer_idx, "ffn_up"))
        yield before(down, (layer_idx, "activation"))
        yield after(down, (layer_idx, "ffn_down"))
        yield after(layer, (layer_idx, "ffn_residual"))
    yield after(getattr(body, "norm", None) or body.final_layer_norm, (end, "final_norm"))
    yield after(model.get_output_embeddings(), (end, "logits_gather"))


def _qkv_hooks(attn, after: Callable, watcher: Watcher, key: Key) -> Iterator:
    yield from _side_by_side(attn, ("q_proj", "k_proj", "v_proj"), after, key)

    def by_head(module, _, out: Tensor) -> Tensor:
        """Reorders: GPT-NeoX joins them as [head][q, k, v][dim], we as [q, k, v][head][dim]."""
        heads = out[0].view(out.shape[1], -1, 3, attn.head_size).transpose(1, 2)  # (T, 3, H, E)
        return watcher.at(key, heads.flatten(1)).view(heads.shape).transpose(1, 2).flatten(1)[None]

    if hasattr(attn, "query_key_value"):
        yield attn.query_key_value.register_forward_hook(by_head)


def _side_by_side(parent, names: tuple[str, ...], after: Callable, key: Key) -> Iterator:
    stop = 0
    for module in (getattr(parent, name) for name in names if hasattr(parent, name)):
        start, stop = stop, stop + module.out_features
        yield after(module, key, slice(start, stop))


def _rows(ours: States, alone: States, stepwise: States, tolerance: float, judge_drift: bool) -> list[Row]:
    unmatched = (torch.nan, torch.nan, False)
    rows = []
    for key, state in ours.items():
        if key not in alone:
            rows.append(Row(*key, *unmatched, "transformers has no such step"))
            continue
        drift = relative_error(state, alone[key][-len(state) :])
        theirs = stepwise[key][-len(state) :]
        error, bits_equal, fault = relative_error(state, theirs), torch.equal(state, theirs), None
        if not error <= tolerance:
            fault = f"differs by more than {tolerance:g}"
        elif key[1] in EXACT and not bits_equal:
            fault = "another order of additions: the same summands give other bits"
        elif judge_drift and not drift <= tolerance:
            fault = f"has drifted by more than {tolerance:g}"
        rows.append(Row(*key, drift, error, bits_equal, fault))
    return rows + [Row(*key, *unmatched, "our plan has no such step") for key in alone if key not in ours]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max|difference| / max|reference|; NaN where either has one."""
    difference, largest = (ours.double() - theirs.double()).abs().max(), theirs.double().abs().max()
    return float(difference / largest) if difference != 0 else 0.0


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="checkpoint directory, or 'demo'")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="Return the number of items, or None if there is no")
    prompt.add_argument("--token-ids", type=int, nargs="+", help="instead of a text")
    parser.add_argument("--max-tokens", type=int, default=4, help="tokens to generate and compare after the prompt")
    parser.add_argument("--dtype", default="float32", choices=TOLERANCES)
    parser.add_argument("--tolerance", type=float, help="default: 1e-5 in float32, what a step may round otherwise")
    parser.add_argument("--resident", default="none", help="as in penstock generate")
    args = parser.parse_args()
    if is_gguf(args.model):
        told = "expected a directory of safetensors, which transformers reads too (tests/oracle compares GGUF files)"
        raise ValueError(f"--model {args.model}: {told}")
    tokenizer = load_tokenizer(EngineConfig(args.model))
    if tokenizer is None and args.token_ids is None:
        raise ValueError(f"{args.model} has no tokenizer: give --token-ids")
    token_ids = args.token_ids or tokenizer.encode(args.prompt)
    rows = compare(args.model, token_ids, args.dtype, args.max_tokens, args.tolerance, resident=args.resident)
    print(HEADING, *rows, sep="\n")
    first = first_fault(rows)
    where = f"layer {first.layer_idx}, {first.step}: {first.fault}" if first else "none"
    print(f"first layer and step that differ: {where}")
    return int(first is not None)


if __name__ == "__main__":
    sys.exit(run_script(main))
