"""The same requests at different residencies, rings and lane orders, and all that can be counted about them; in this
process, or on ranks, each with

    -m tests.support.streaming_runs FOLDER

FOLDER holds a checkpoint for each of MODELS; each rank writes FOLDER/rankN.json, {case: facts}.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from penstock.engine.compute.context import PassContext
from penstock.engine.config import EngineConfig
from penstock.engine.llm import LLM
from penstock.engine.model.families import read_config, read_spec
from penstock.engine.planning.device_profile import plan_rates
from penstock.engine.planning.engine_plan import make_engine_plan
from penstock.engine.runtime.executor import Executor
from penstock.scheduler.batching.request import SamplingParams
from penstock.scheduler.passes.build import default_ring_bytes, minimum_ring_bytes
from penstock.scheduler.passes.pass_plan import Compute, Instruction
from torch import Tensor

from tests.support.watches import After

MODELS = ("llama_gqa", "neox_parallel")
OPTIONS = {"device": "cpu", "dtype": "float32", "max_num_batched_tokens": 48, "max_num_seqs": 3}
OPTIONS["debug"] = {"poison": True}
# Three rows, a prompt in chunks, rows that end at different times, and a request that waits for one of them.
LENGTHS, MAX_TOKENS = (5, 37, 70, 20), (9, 4, 5, 6)
PROMPTS = [torch.randint(0, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]
PARAMS = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in MAX_TOKENS]
RINGS = ("minimum", "between", "default", "everything")
# (resident, ring, lanes): on several ranks each of them runs for each of MODELS
RANK_CASES = (
    ("all", "default", "earliest"),
    ("none", "minimum", "latest"),
    ("none", "default", "random"),
    (0.5, "between", "random"),
    (0.8, "everything", "latest"),
)


@dataclass
class Run:
    """The results of one `generate`: logits of every pass that sampled, tokens by prompt, and the KV addresses of each
    pass."""

    logits: list[Tensor]
    tokens: list[list[int]]
    addresses: list[Tensor]

    def same_bits(self, other: "Run") -> bool:
        pairs = zip(self.logits, other.logits, strict=True)
        return self.tokens == other.tokens and all(torch.equal(a, b) for a, b in pairs)

    def digest(self) -> str:
        """A digest of every bit of the logits, and of the tokens."""
        rows = b"".join(part.view(torch.uint8).numpy().tobytes() for part in self.logits)
        return hashlib.sha256(rows + repr(self.tokens).encode()).hexdigest()


def fill_alike(llm: LLM) -> None:
    """Lets passes be filled as if nothing streamed, so that those of all runs are the same ones."""
    llm.loop.scheduler.composer.filling = None


def generate(llm: LLM, prompts: list[list[int]] = PROMPTS, params: list[SamplingParams] = PARAMS) -> Run:
    """All passes of a run, none of which another run has spared it."""
    run = Run([], [], [])
    llm.reset_prefix_cache()
    fill_alike(llm)

    def note(instruction: Instruction, ctx: PassContext | None) -> None:
        if isinstance(instruction, Compute) and instruction.step == "logits_gather":
            run.logits.append(ctx.act["logits"].clone())
            run.addresses.append(ctx.inputs.addresses.clone())

    with llm.engine.watched_by(After(note)):
        run.tokens = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    return run


def ring_bytes(model: str, ring: str, resident: str | float, tp_size: int = 1) -> int | None:
    """Bytes of a ring by its name, None where nothing streams; planned, without loading."""
    config = EngineConfig(model, resident=resident, **OPTIONS)
    spec = read_spec(read_config(model), model)
    plan = make_engine_plan(config, spec, tp_size, None, plan_rates(config, tp_size, "cpu"))
    streamed = list(plan.residency.streamed)
    if not streamed:
        return None
    least, usual = minimum_ring_bytes(streamed), default_ring_bytes(streamed)
    sizes = {"minimum": least, "between": (least + usual) // 2, "default": usual}
    return sizes.get(ring, sum(nbytes for _, nbytes in streamed))


@contextlib.contextmanager
def recorded_gemms() -> Iterator[Counter]:
    """Counts matrix products by (in, out) of the weight."""
    shapes: Counter[tuple[int, int]] = Counter()
    plain = {"mm": torch.mm, "addmm": torch.addmm}

    def counted(name: str, weight: int) -> Callable:
        def product(*args, **kwargs):
            shapes[tuple(args[weight].shape)] += 1
            return plain[name](*args, **kwargs)

        return product

    torch.mm, torch.addmm = counted("mm", 1), counted("addmm", 2)
    try:
        yield shapes
    finally:
        torch.mm, torch.addmm = plain["mm"], plain["addmm"]


def copied_bytes(executor: Executor) -> dict[str, int]:
    """Bytes that were copied, by group; nothing came back."""
    ledger = executor.copied
    assert ledger.total.received_bytes == 0
    sites = {group: site for group, site in executor.copy_sites.items() if site in ledger.sites}
    return {str(group): ledger.at(site).sent_bytes for group, site in sites.items()}


def facts_of(model: str, resident: str | float, ring: str, lanes: str) -> dict[str, Any]:
    tp_size = int(os.environ["WORLD_SIZE"])
    own = {
        "resident": resident,
        "ring": ring_bytes(model, ring, resident, tp_size),
        "debug": {"lanes": lanes, "poison": True},
    }
    with LLM(model, **OPTIONS | own) as llm, recorded_gemms() as gemms:
        digest = generate(llm).digest()
        worker = llm.engine.worker
        counters, executor = worker.executor.counters, worker.executor
        return {
            "digest": digest,
            "num_passes": counters.num_passes,
            "num_tokens": counters.num_tokens,
            "copied": copied_bytes(executor),
            "wrapped": llm.engine.plan.residency.ring.num_wrapped,
            "host_bytes": worker.weights.host_bytes,
            "resident_bytes": worker.weights.resident_bytes,
            "gemms": sorted([*shape, count] for shape, count in gemms.items()),
            "reduces": {site.operation: moved.num_calls for site, moved in executor.reduced.sites.items()},
            "reduced_bytes": {site.operation: moved.sent_bytes for site, moved in executor.reduced.sites.items()},
            "ledger": llm.engine.ledger.to_dict(),
            "transfers": llm.engine.transfers,
        }


def main(folder: Path) -> None:
    facts = {
        f"{model}-{resident}-{ring}-{lanes}": facts_of(str(folder / model), resident, ring, lanes)
        for model in MODELS
        for resident, ring, lanes in RANK_CASES
    }
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
