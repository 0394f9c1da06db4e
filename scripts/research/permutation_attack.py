"""The nearest-neighbour attack on what the device side of a split execution saw, and how much of a prompt it recovers.

The attacker is the device side. It knows the weights (norms too) and which tensor belongs to which call; it knows
neither the prompt nor the key. Token by token it computes, for every token of the vocabulary behind the tokens that it
has found so far, what a site would have seen, and takes the one that is nearest to what the site did see (D hidden,
H/K query/KV heads, E head dim; below T tokens of the prompt, V of the vocabulary, N rows to match):

    QKV input          x_ (D) of a token          in attn_qkv
    attention states   q, k and v (H + 2K, E)     in attention, after RoPE
    MLP input          x_ (D) of a token          in ffn_up

    L1                 |candidate - row i|, for position i
    sorted L1          of each head's numbers in ascending order: no permutation of head_dim changes them
    any row            to whichever row it is nearest of those that are not taken: no order of rows is needed
    rows in order      L1, with the rows in the order of attention's values: the device side made these values itself,
                       in the rows of its answer in attn_qkv, and recognises them by their sorted numbers

Source: "Hidden No More: Attacking and Defending Private Third-Party LLM Inference" (ICML 2025, arXiv:2505.18332).

    python -m scripts.research.permutation_attack --prompt "Return the number of items"

`positions` are the tokens found at their own index, `multiset` those found at any index, as shares of all tokens. The
attack takes a pass over the whole vocabulary for each token and each of the found prefixes that differ. The last line
is one JSON object.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from penstock.engine.commands.flags import Parser
from penstock.engine.compute.context import PassContext
from penstock.engine.config import EngineConfig
from penstock.engine.llm import LLM
from penstock.engine.planning.find_model import find_model
from penstock.engine.runtime.watch import Watch
from penstock.engine.split.channel import InProcess
from penstock.engine.split.device_side import DeviceSide
from penstock.engine.split.llm import SplitLLM
from penstock.engine.split.permutation import NOTICE, PermutedChannel
from penstock.engine.split.transfers import FUSED, PERMUTED, SplitConfig
from penstock.engine.text.model_text import load_tokenizer
from penstock.engine.weights.read_model import read_model
from penstock.parallel.ledger import Site
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.request import SamplingParams
from penstock.scheduler.passes.pass_plan import Compute, Instruction
from torch import Tensor

from scripts.bench.entry import run_script
from scripts.bench.record import add_output_argument, keep, machine
from scripts.report.markdown_table import Row, table, text

QKV, ATTENTION, MLP = "attn_qkv", "attention", "ffn_up"  # operations of the device side, and steps of a pass
SITES = {QKV: "QKV input", ATTENTION: "attention states", MLP: "MLP input"}
L1, SORTED, ANY_ROW, IN_ORDER = "L1", "sorted L1", "any row", "rows in order"
MATCHINGS = {QKV: (L1, ANY_ROW, IN_ORDER), ATTENTION: (L1, SORTED), MLP: (L1, ANY_ROW)}  # of what is permuted
PROMPTS = (
    "Return the number of items, or None if there is no such table",
    "Raise an error if the given path is not an absolute path of a file",
)
States = dict[Site, Tensor]  # what came in at each site, a row a token
Candidates = Callable[[tuple[int, ...]], States]
Attacked = tuple[Site, bool, str]  # is it permuted, and how rows are matched


@dataclass
class Seen:
    """Tensors that the device side saw in a prompt's prefill, in the order in which it saw their rows."""

    inputs: States = field(default_factory=dict)
    values: States = field(default_factory=dict)  # (T, K, E) each, of attention
    qkv: States = field(default_factory=dict)  # (T, (H + 2K) E) each: its own answers

    def add(self, site: Site, tensors: Sequence[Tensor], answer: Tensor) -> None:
        if site.operation in SITES:
            self.inputs[site] = torch.cat([tensor.clone() for tensor in tensors], dim=1)  # q, k and v joined
        if site.operation == ATTENTION:
            self.values[site] = tensors[2].clone()
        if site.operation == QKV:
            self.qkv[site] = answer.clone()

    def in_order(self, layer_idx: int) -> Tensor:
        """The QKV input (T, D) with its rows in the order in which attention had their values."""
        values = self.values[Site(ATTENTION, layer_idx)]
        made = self.qkv[Site(QKV, layer_idx)][:, -values[0].numel() :].view(values.shape)
        return self.inputs[Site(QKV, layer_idx)][distances(values, made, in_heads=True).argmin(dim=1)]


@dataclass
class Attack:
    """An attack by one matching at one site. `observed` (T, ...) are the rows that the site saw."""

    site: Site
    is_permuted: bool
    matching: str
    observed: Tensor
    found: list[int] = field(default_factory=list)  # token ids, in the order of positions
    left: list[int] = field(init=False)  # rows for which no token was found

    def __post_init__(self):
        self.left = list(range(len(self.observed)))

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens that the next token's states depend on, beside itself: none for the QKV input of layer 0."""
        return () if self.site == Site(QKV, 0) else tuple(self.found)

    def find_next(self, candidates: States) -> None:
        """Finds one more token. `candidates` (V, ...) at each site are the states of all tokens behind the prefix."""
        rows = self.left if self.matching == ANY_ROW else self.left[:1]
        apart = distances(candidates[self.site], self.observed[rows], in_heads=self.matching == SORTED)
        token, index = divmod(int(apart.argmin()), len(rows))
        self.found.append(token)
        del self.left[index]


def distances(states: Tensor, rows: Tensor, in_heads: bool = False) -> Tensor:
    """L1 distances (V, N) of states (V, ...) from rows (N, ...); with `in_heads` each head's numbers are sorted
    first."""
    if in_heads:
        states, rows = states.sort(dim=-1).values, rows.sort(dim=-1).values
    return torch.cdist(states.flatten(1).float(), rows.flatten(1).float(), p=1)


def observe(model: str, token_ids: list[int], permute: Sequence[str]) -> Seen:
    """Runs the prompt's prefill. Attention is fused: q, k and v are those of the other ways, in one call."""
    seen, split = Seen(), SplitConfig(attention=FUSED, permute=tuple(permute))
    length = {"max_model_len": len(token_ids) + 1, "max_num_batched_tokens": len(token_ids)}
    with SplitLLM(model, split, dtype="float32", max_num_seqs=1, **length) as llm:
        device_side = device_side_of(llm)
        run = device_side.run

        def watched(site: Site, tensors: Sequence[Tensor]) -> Tensor:
            answer = run(site, tensors)
            seen.add(site, tensors, answer)
            return answer

        device_side.run = watched
        llm.generate([token_ids], SamplingParams(temperature=0, max_tokens=1))
    return seen


def device_side_of(llm: SplitLLM) -> DeviceSide:
    channel = llm.engine.worker.channel
    inner = channel.channel if isinstance(channel, PermutedChannel) else channel
    assert isinstance(inner, InProcess)
    return inner.device_side


def attacker_llm(model: str, vocab_size: int, most_tokens: int) -> LLM:
    """The plain engine, for passes that compute every token of the vocabulary behind a prefix: each in a row and a page
    of its own, all behind the prefix's pages."""
    sizes = {"max_num_seqs": vocab_size, "max_num_batched_tokens": max(vocab_size, most_tokens)}
    pages = {"page_size": 1, "num_pages": 1 + most_tokens + vocab_size, "max_model_len": most_tokens + 1}
    whole = {"device": "cpu", "tensor_parallel_size": 1, "resident": "all", "weights_compression": "none"}
    return LLM(model, dtype="float32", **sizes, **pages, **whole)


def candidates_of(llm: LLM, vocab_size: int) -> Candidates:
    """Gives the states of all tokens behind a prefix, as the device side would see them unpermuted."""
    states: States = {}

    class KeepStates(Watch):
        def around(self, instruction: Instruction, ctx: PassContext | None, run: Callable[[], None]) -> None:
            if isinstance(instruction, Compute) and instruction.step in SITES:
                site = Site(instruction.step, instruction.layer_idx)
                states[site] = (ctx.heads() if site.operation == ATTENTION else ctx.act["x_"]).clone()
            run()

    def run(rows: Iterable[BatchRow]) -> None:
        llm.engine.submit(Batch(tuple(rows)))
        llm.engine.collect()

    def candidates(prefix: tuple[int, ...]) -> States:
        length = len(prefix)
        pages = tuple(range(1, length + 1))
        if prefix:
            run([BatchRow(0, prefix, 0, pages, False, None)])
        own = range(length + 1, length + 1 + vocab_size)
        run(BatchRow(token, (token,), length, (*pages, page), False, None) for token, page in enumerate(own))
        return dict(states)

    llm.engine.watches.add(KeepStates())
    return candidates


def attacks_on(clear: Seen, permuted: Seen, layers: Sequence[int]) -> list[Attack]:
    attacks = []
    for site in (Site(operation, layer_idx) for operation in SITES for layer_idx in layers):
        attacks.append(Attack(site, False, L1, clear.inputs[site]))
        for matching in MATCHINGS[site.operation]:
            seen = permuted.in_order(site.layer_idx) if matching == IN_ORDER else permuted.inputs[site]
            attacks.append(Attack(site, True, matching, seen))
    return attacks


def run_attacks(attacks: Sequence[Attack], candidates: Candidates) -> None:
    """Finds all tokens of each attack. Attacks that have found the same prefix share its candidates."""
    while unfinished := [attack for attack in attacks if attack.left]:
        prefix = min((attack.prefix for attack in unfinished), key=len)
        states = candidates(prefix)
        for attack in unfinished:
            while attack.left and attack.prefix == prefix:
                attack.find_next(states)


def recovered(found: Sequence[int], token_ids: Sequence[int]) -> tuple[int, int]:
    """Counts the tokens found at their own index, and those found at any index."""
    at_index = sum(one == other for one, other in zip(found, token_ids, strict=True))
    return at_index, (Counter(found) & Counter(token_ids)).total()


def measure(model: str, prompts: Sequence[list[int]], layers: Sequence[int] | None = None) -> list[Row]:
    """Runs the attacks; returns a row for each, with shares of the tokens of all prompts. If `layers` is None, they are
    the first, the middle and the last. Raises ValueError for a layer that the model lacks."""
    spec = read_model(find_model(model)).spec
    layers = sorted({0, spec.num_layers // 2, spec.num_layers - 1}) if layers is None else layers
    for layer_idx in layers:
        if layer_idx not in range(spec.num_layers):
            raise ValueError(f"--layers {layer_idx}: {model} has layers 0 to {spec.num_layers - 1}")
    counts: dict[Attacked, list[tuple[int, int]]] = {}
    with attacker_llm(model, spec.vocab_size, max(map(len, prompts))) as llm:
        candidates = candidates_of(llm, spec.vocab_size)
        for token_ids in prompts:
            attacks = attacks_on(observe(model, token_ids, ()), observe(model, token_ids, PERMUTED), layers)
            run_attacks(attacks, candidates)
            for attack in attacks:
                key = attack.site, attack.is_permuted, attack.matching
                counts.setdefault(key, []).append(recovered(attack.found, token_ids))
    num_tokens = sum(map(len, prompts))
    return [as_row(key, *(sum(found) / num_tokens for found in zip(*each))) for key, each in counts.items()]


def as_row(key: Attacked, positions: float, multiset: float) -> Row:
    site, is_permuted, matching = key
    named = {"site": SITES[site.operation], "layer": site.layer_idx, "permuted": is_permuted, "matching": matching}
    return named | {"positions": positions, "multiset": multiset}


def attack_table(rows: Sequence[Row]) -> str:
    """A line for each site and layer: positions / multiset of each matching, as Markdown."""
    lines: dict[tuple[str, int], Row] = {}
    for row in rows:
        line = lines.setdefault((row["site"], row["layer"]), {"site": row["site"], "layer": row["layer"]})
        line[title(row)] = f"{row['positions']:.0%} / {row['multiset']:.0%}"
    return table(lines.values(), [(name, text(name)) for name in ("site", "layer", *dict.fromkeys(map(title, rows)))])


def title(row: Row) -> str:
    return f"{'permuted' if row['permuted'] else 'in the clear'}: {row['matching']}"


def main() -> None:
    args = arguments()
    prompts = args.token_ids or tokenize(args.model, args.prompt or PROMPTS)
    rows = measure(args.model, prompts, args.layers)
    print(
        f"{args.model}: {len(prompts)} prompts of {', '.join(str(len(prompt)) for prompt in prompts)} tokens, found by"
    )
    print("who knows the weights: at their index / at any index\n")
    print(attack_table(rows))
    print(f"--permute {','.join(PERMUTED)} is {NOTICE}.")
    record = {"benchmark": "permutation_attack", **machine(torch.device("cpu")), "model": args.model}
    keep(record | {"prompt_tokens": [len(prompt) for prompt in prompts], "rows": rows}, args.output_json)


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="checkpoint directory, GGUF file, or 'demo' (default)")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    told = "a prompt instead of a text; may be given several times"
    prompt.add_argument("--token-ids", type=int, nargs="+", action="append", metavar="ID", help=told)
    told = "where to look (default: the first, the middle and the last)"
    parser.add_argument("--layers", type=int, nargs="+", metavar="N", help=told)
    add_output_argument(parser)
    return parser.parse_args()


def tokenize(model: str, texts: Sequence[str]) -> list[list[int]]:
    tokenizer = load_tokenizer(EngineConfig(model))
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer: give --token-ids")
    return [tokenizer.encode(text) for text in texts]


if __name__ == "__main__":
    sys.exit(run_script(main))
