"""Checks and times the sampler's kernels at the size of a full batch of Llama-3: 256 rows of 128256 logits in bf16.

Each stage runs in a CUDA graph, with all rows asking for it, every fourth row, or none, as in a captured pass, which
has all stages. First each kernel is held to its reference, with every fourth row penalised. `stages` are kernels
alone; `passes` are calls of the whole sampler, whose `over_greedy_us` is what they add to a greedy one, and `budget_us`
what they may. The logits are those of a flat distribution, as random weights give, and of a peaked one. `padded` is a
pass in whose rows nothing is sampled. The last line is one JSON object.

    python -m scripts.bench.sampling
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from penstock.engine.commands.flags import Parser
from penstock.engine.compute.sampler import EVERYTHING, GREEDY, Asked, Sampler
from penstock.engine.kernels import argmax, draw, logprobs, occurrences, penalty
from penstock.engine.kernels import filter as filters
from penstock.engine.kernels.draw import Noise
from penstock.engine.kernels.logprobs import Logprobs
from penstock.scheduler.batching.request import RowSampling
from penstock.scheduler.units import GB, us
from torch import Tensor

from scripts.bench.entry import run_script
from scripts.bench.kernels import measure
from scripts.bench.record import add_output_argument, keep, machine

DEVICE, ROWS, VOCAB, CALLS = "cuda", 256, 128256, 8
DRAWN = replace(GREEDY, temperature=1.0, top_p=0.9)
PENALISED, SCORED = {"frequency_penalty": 0.5}, {"num_logprobs": 5}
GREEDY_PASS_US = 8370.0  # of a resident pass of Llama-3-8B over as many rows
BUDGETS = {"top_p": 0.05, "top_p, penalty in every fourth": 0.08, "logprobs in every fourth": 0.10}  # of such a pass
PASSES = {  # what each row asks for, and what every fourth one does instead
    "plain": (replace(GREEDY, temperature=1.0), {}),
    "top_p": (DRAWN, {}),
    "top_k": (replace(GREEDY, temperature=1.0, top_k=50), {}),
    "top_p, penalty in every fourth": (DRAWN, PENALISED),
    "top_p, penalty in all": (replace(DRAWN, **PENALISED), {}),
    "logprobs in every fourth": (GREEDY, SCORED),
    "logprobs in all": (replace(GREEDY, num_logprobs=20), {}),
    "everything": (replace(DRAWN, top_k=50, min_p=0.01, repetition_penalty=1.2, num_logprobs=20), {}),
}
PADDED = {"greedy": Asked(), "everything": EVERYTHING}


class Case:
    """A full batch: a sampler whose rows ask for something, and logits (ROWS, VOCAB)."""

    def __init__(self, logits: Tensor, each: RowSampling, fourth: dict):
        self.logits, self.sampler = logits, Sampler(ROWS, VOCAB, DEVICE)
        self.rows = torch.arange(ROWS, device=DEVICE)
        samplings = (replace(each, seed=row, **(fourth if row % 4 == 3 else {})) for row in range(ROWS))
        self.sampler.set_rows(dict(enumerate(samplings)))
        tokens = torch.randint(VOCAB, (ROWS * 64,), device=DEVICE)
        self.sampler.observe(self.rows.repeat_interleave(64), tokens)
        self.own = self.sampler._params_of(self.rows)
        self.noise = Noise(self.own["temperature"], self.own["seed"], self.rows + 100)
        self.filters = filters.Filters(*(self.own[name] for name in filters.Filters._fields))
        self.penalties = penalty.Penalties(*(self.own[name] for name in penalty.Penalties._fields))

    def sample(self, asked: Asked) -> None:
        self.sampler(self.logits, self.rows, self.rows + 100, asked)

    def stages(self) -> dict[str, Callable]:
        """The kernels, as they follow one another."""
        logits, size, wanted = self.logits, VOCAB, self.own["num_logprobs"]
        state, asks = self.sampler.occurrences, self.sampler.params["asks_penalty"]
        penalised = penalty.penalise_rows(logits, size, state, self.rows, self.penalties)
        limits = filters.find_limits(logits, size, self.own["temperature"], self.filters, penalised)
        tokens = draw.draw_rows(logits, size, self.noise, limits, penalised)
        packed = torch.zeros(ROWS, self.sampler.scores_width, dtype=torch.int32, device=DEVICE)
        rest = (self.own["temperature"], self.filters)
        return {
            "params": partial(self.sampler._params_of, self.rows),
            "note": partial(occurrences.note_tokens, state, asks, self.rows, tokens, True),
            "penalise": partial(penalty.penalise_rows, logits, size, state, self.rows, self.penalties),
            "filter": partial(filters.find_limits, logits, size, *rest, None),
            "filter beside penalties": partial(filters.find_limits, logits, size, *rest, penalised),
            "argmax": partial(argmax.argmax_rows, logits, size),
            "draw": partial(draw.draw_rows, logits, size, self.noise, None, None),
            "draw filtered beside penalties": partial(draw.draw_rows, logits, size, self.noise, limits, penalised),
            "score": partial(logprobs.score_rows, logits, size, tokens, wanted, packed),
        }

    def check(self) -> dict[str, int]:
        """Counts the rows that differ between kernels and references, stage by stage on the same inputs: none may, but
        draws at near ties, and mass within the error of the exponential."""
        some, size = slice(0, 64), VOCAB
        logits, rows, temperatures = self.logits[some], self.rows[some], self.own["temperature"][some]
        parts = (self.noise, self.filters, self.penalties)
        noise, asked, penalties = (type(part)(*(column[some] for column in part)) for part in parts)
        state, asks = self.sampler.occurrences, penalties.asks_penalty[:, None] > 0
        ours, theirs = (
            run(logits, size, state, rows, penalties).scores
            for run in (penalty._penalise_rows_triton, penalty.penalise_rows_reference)
        )
        differ = {"penalise": _rows((ours != theirs) & asks)}
        penalised = penalty.Penalised(penalties.asks_penalty, ours)
        kept, limits = [], None
        for run in (filters._find_limits_triton, filters.find_limits_reference):
            limits = run(logits, size, temperatures, asked, penalised)
            kept.append(limits.keep(penalised.over(logits)))
        differ |= {"filter": _rows(kept[0] != kept[1]), "filter_tokens": int((kept[0] != kept[1]).sum())}
        tokens = [
            run(logits, size, noise, limits, penalised) for run in (draw._draw_rows_triton, draw.draw_rows_reference)
        ]
        differ["draw"] = int((tokens[0] != tokens[1]).sum())
        return differ | self._check_scores(logits, tokens[0], self.own["num_logprobs"][some])

    def _check_scores(self, logits: Tensor, tokens: Tensor, wanted: Tensor) -> dict[str, int]:
        packed = []
        for run in (logprobs._score_rows_triton, logprobs.score_rows_reference):
            packed.append(torch.zeros(len(logits), self.sampler.scores_width, dtype=torch.int32, device=DEVICE))
            run(logits, VOCAB, tokens, wanted, packed[-1])
        ours, theirs = (Logprobs.of(one.cpu()) for one in packed)
        pairs = [(ours.at(i, n), theirs.at(i, n)) for i, n in enumerate(wanted.tolist()) if n >= 0]
        exact = [(a[1], [token for token, _ in a[2]]) != (b[1], [token for token, _ in b[2]]) for a, b in pairs]
        return {"score_ids": sum(exact), "score_bits": sum(a != b for a, b in pairs)}


def _rows(differ: Tensor) -> int:
    return int(differ.any(-1).sum())


def flat_logits() -> Tensor:
    return torch.randn(ROWS, VOCAB, device=DEVICE).bfloat16()


def peaked_logits() -> Tensor:
    """A few tokens have most of the mass, as in text."""
    return (
        torch.randn(ROWS, VOCAB, device=DEVICE) * 2 + 12 * (torch.rand(ROWS, VOCAB, device=DEVICE) < 5e-5)
    ).bfloat16()


def time_us(call: Callable) -> float:
    return round(us(measure([call], CALLS, 5)), 1)


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_argument(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("sampling.py needs a CUDA GPU", file=sys.stderr)
        return 2
    memory = torch.ones(1 << 28, device=DEVICE)
    read_rate = memory.nbytes / measure([partial(torch.sum, memory)], 4)
    record = {"benchmark": "sampling", **machine(torch.device(DEVICE)), "rows": ROWS, "vocab": VOCAB}
    record |= {"read_gb_s": round(read_rate / GB, 1), "logits_read_us": round(us(2 * ROWS * VOCAB / read_rate), 1)}
    del memory
    for kind, make in (("flat", flat_logits), ("peaked", peaked_logits)):
        record[kind] = measure_kind(kind, make())
    keep(record, args.output_json)
    return 0


def measure_kind(kind: str, logits: Tensor) -> dict:
    """Checks and times, printed as they come."""
    every = replace(DRAWN, top_k=40000, min_p=1e-4, num_logprobs=20)
    checked = {
        "top_p": Case(logits, DRAWN, PENALISED).check(),
        "everything": Case(logits, every, {"repetition_penalty": 1.3}).check(),
    }
    print(f"{kind}: rows that differ from the references, of 64: {checked}", flush=True)
    rows: dict[str, dict] = {"checked": checked, "stages": {}, "passes": {}}
    all_ask = replace(DRAWN, **PENALISED, **SCORED)
    fourth = {"temperature": 1.0, "top_p": 0.9, **PENALISED, **SCORED}
    for who, each, changes in (("all", all_ask, {}), ("fourth", GREEDY, fourth), ("none", GREEDY, {})):
        case = Case(logits, each, changes)
        for name, call in case.stages().items():
            rows["stages"].setdefault(name, {})[who] = time_us(call)
    for name, took in rows["stages"].items():
        print(f"{kind:8}{name:34}" + "".join(f"{who:>10} {value:8.1f} us" for who, value in took.items()), flush=True)
    greedy = time_us(partial(Case(logits, GREEDY, {}).sample, Asked()))
    for name, (each, changes) in {"greedy": (GREEDY, {}), **PASSES}.items():
        took = time_us(partial(Case(logits, each, changes).sample, EVERYTHING))
        rows["passes"][name] = {"us": took, "over_greedy_us": round(took - greedy, 1)}
        budget = ""
        if name in BUDGETS:
            rows["passes"][name]["budget_us"] = round(BUDGETS[name] * GREEDY_PASS_US, 1)
            budget = f", budget {rows['passes'][name]['budget_us']}"
        print(f"{kind:8}{name:34}{took:10.1f} us, {took - greedy:.1f} over greedy ({greedy}){budget}", flush=True)
    case = Case(logits, GREEDY, {})
    case.rows = torch.full_like(case.rows, case.sampler.pad_row)
    rows["padded"] = {name: time_us(partial(case.sample, asked)) for name, asked in PADDED.items()}
    print(f"{kind:8}padded rows alone: {rows['padded']}", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(run_script(main))
