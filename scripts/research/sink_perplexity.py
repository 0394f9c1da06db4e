"""Perplexity far past a model's trained length: with attention sinks, with a plain window, and with full attention.

Every token of one long text is scored by the engine given those before it (teacher_forcing.py), once in each of these
ways, always over the same tokens:
  - sinks        the first --sinks tokens and a window of --window recent ones are cached
  - window       as many tokens are cached, all of them recent ones
  - recomputed   the tokens that `window` caches, computed anew for each chunk: a window whose states have not seen what
                 was evicted, at many times the work
  - full         everything is cached, and positions go past those of training (in a copy of the model whose
                 config.json, or GGUF header, allows them)
A small model need not have sinks. So the attention that its queries give to the first tokens is measured as well
(attention_mass.py), where nothing is evicted: it says what losing them can cost.

The text is what train_demo_model.py holds out, cleaned as for training: pydoc's topics and the docstrings of the
standard library of the Python that runs this, module after module behind one BOS. (A BOS between them, as in training,
would bring new first tokens into every window.) Where a Python has fewer of them than --num-tokens, modules follow that
the demo model was trained on, and its record says so. What others were trained on is not known here.

    python -m scripts.research.sink_perplexity --output-json benchmarks/sink_perplexity.json \\
      --plot docs/sink_perplexity.png
    python -m scripts.research.sink_perplexity --model SmolLM2-135M-Instruct.Q4_1.gguf --num-tokens 10000

The first takes about a minute on one CPU core; the picture needs matplotlib (pip install penstock[plot]). The last line
is one JSON object.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from penstock.engine.commands.flags import Parser
from penstock.engine.config import EngineConfig
from penstock.engine.llm import LLM
from penstock.engine.planning.find_model import find_model
from penstock.engine.text.model_text import load_tokenizer
from penstock.engine.weights.gguf_file import is_gguf
from penstock.engine.weights.read_model import read_model
from penstock.scheduler.batching.batch import BatchRow
from torch import Tensor

from scripts.bench.entry import run_script
from scripts.bench.record import add_output_argument, keep, machine
from scripts.research.attention_mass import summarise, verdict, watched_masses
from scripts.research.sink_plot import check_installed, draw
from scripts.research.teacher_forcing import cached_row, logprobs_of, recomputed_row
from scripts.train_demo_model import HELD_OUT_PERCENT, collect_docs, is_held_out

DEVICE = "cpu"  # which is enough for a small model
PAGE_SIZE = 4  # small, so that with and without sinks about as many tokens are evicted at a time
PASS_TOKENS = 256
FAR = 4  # queries from this part of the trained length on, a quarter, are far from the first tokens
BLOCK_TOKENS = 500  # of the running perplexity


@dataclass(frozen=True)
class Variant:
    """A way to attend; if `window` is None, to all tokens. It is scored in rows that `row_of` makes."""

    name: str
    sinks: int
    window: int | None
    row_of: Callable[..., BatchRow] = cached_row

    @property
    def most_cached(self) -> int | None:
        return None if self.window is None else self.sinks + self.window


def variants(sinks: int, window: int) -> list[Variant]:
    total = sinks + window
    return [
        Variant("sinks", sinks, window),
        Variant("window", 0, total),
        Variant("recomputed", 0, total, recomputed_row),
        Variant("full", 0, None),
    ]


def read_text(encode: Callable[[str], list[int]], num_tokens: int) -> tuple[list[int], str, int]:
    """Reads the first token (BOS, where the tokenizer sets one) and `num_tokens` more; returns them, says what text
    they are, and how many of them the demo model was trained on."""
    tokens = encode("")
    num_special, num_held_out, modules = len(tokens), 0, 0
    docs = collect_docs()
    for module in sorted(docs, key=lambda module: not is_held_out(module, HELD_OUT_PERCENT)):
        if len(tokens) > num_tokens:
            break
        tokens += encode("\n\n".join(text for _, text in docs[module]) + "\n\n")[num_special:]
        num_held_out = len(tokens) - num_special if is_held_out(module, HELD_OUT_PERCENT) else num_held_out
        modules += 1
    if len(tokens) <= num_tokens:
        raise ValueError(f"--num-tokens {num_tokens}: this Python's documentation has {len(tokens) - 1}")
    source = f"docstrings of {modules} modules (pydoc's topics among them) of Python {platform.python_version()}"
    return tokens[: num_tokens + 1], source, max(num_tokens - num_held_out, 0)


@contextmanager
def longer_model(model: str, num_positions: int) -> Iterator[str]:
    """Yields a folder with the model's weights and a config.json that allows so many positions, or a GGUF file whose
    header does."""
    source = find_model(model)
    with tempfile.TemporaryDirectory() as folder:
        if is_gguf(source):
            yield longer_file(source, Path(folder) / source.name, num_positions)
            return
        for path in source.iterdir():
            (Path(folder) / path.name).symlink_to(path.resolve())
        config = Path(folder) / "config.json"
        fields = json.loads(config.read_text()) | {"max_position_embeddings": num_positions}
        config.unlink()
        config.write_text(json.dumps(fields))
        yield folder


def longer_file(source: Path, target: Path, num_positions: int) -> str:
    """Copies a GGUF file, all but the number of its positions: after its key come four bytes of the type, uint32."""
    data, key = bytearray(source.read_bytes()), b".context_length"
    at = data.index(key) + len(key) + 4
    data[at : at + 4] = num_positions.to_bytes(4, "little")
    target.write_bytes(data)
    return str(target)


@contextmanager
def engine_of(variant: Variant, model: str, trained: int, num_tokens: int) -> Iterator[LLM]:
    """Yields an engine that attends as the variant says, and whose passes may sample from every token."""
    longest = variant.most_cached or num_tokens
    pass_tokens = max(PASS_TOKENS, variant.most_cached or 0)
    options: dict[str, Any] = {"max_num_seqs": pass_tokens, "max_num_batched_tokens": pass_tokens}
    options |= {"page_size": PAGE_SIZE, "num_pages": longest // PAGE_SIZE + 4}  # one sequence's, of partly filled pages
    options |= {"attention_sinks": variant.sinks, "attention_window": variant.window}
    options |= {"max_model_len": num_tokens} if variant.window is None else {}
    longer = variant.window is None and num_tokens > trained
    with longer_model(model, num_tokens) if longer else nullcontext(model) as path:
        with LLM(path, 1, device=DEVICE, dtype="float32", enforce_eager=True, **options) as llm:
            yield llm


def perplexity(logprobs: Tensor) -> float | None:
    return round((-logprobs.double().mean()).exp().item(), 3) if len(logprobs) else None


def measure(variant: Variant, model: str, trained: int, tokens: list[int]) -> tuple[dict, list[float]]:
    """A row of the record, and the perplexity of each block of the text."""
    with engine_of(variant, model, trained, len(tokens) - 1) as llm:
        began_s = time.perf_counter()
        logprobs = logprobs_of(llm, tokens, variant.row_of)
        seconds = time.perf_counter() - began_s
        evicted = getattr(llm.engine.plan.retention, "eviction_tokens", None)
    row = {"variant": variant.name, "sinks": variant.sinks, "window": variant.window, "evicted_at_a_time": evicted}
    row |= {"perplexity_within": perplexity(logprobs[:trained]), "perplexity_past": perplexity(logprobs[trained:])}
    return row | {"seconds": round(seconds, 1)}, [perplexity(block) for block in logprobs.split(BLOCK_TOKENS)]


def measure_mass(model: str, trained: int, tokens: list[int], num_first: int) -> list[dict[str, Any]]:
    """The attention that far queries of the first `trained` tokens give to the first ones, by layer."""
    tokens = tokens[: trained + 1]
    with engine_of(Variant("full", 0, None), model, trained, len(tokens) - 1) as llm:
        with watched_masses(llm, num_first) as passes:
            logprobs_of(llm, tokens, cached_row)
    return summarise([torch.cat(parts) for parts in passes], (len(tokens) - 1) // FAR)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all variants, prints each row as it comes, and returns the record."""
    path = find_model(args.model)
    trained = read_model(path).spec.max_position
    tokenizer = load_tokenizer(EngineConfig(args.model))
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer, and so cannot read a text")
    tokens, text, trained_on = read_text(tokenizer.encode, args.num_tokens)
    if args.model == "demo":
        text += f", {trained_on or 'none'} of {args.num_tokens} tokens trained on"
    print(f"{text}\nperplexity:   sinks  window   within {trained}      past it        s")
    rows, running = [], {}
    for variant in variants(args.sinks, args.window):
        row, running[variant.name] = measure(variant, args.model, trained, tokens)
        rows.append(row)
        cells = (*(row[name] for name in ("variant", "sinks")), row["window"] or "all")
        figures = (row["perplexity_within"], row["perplexity_past"] or "", row["seconds"])
        print("{:12}{:>7}{:>8}{:>13}{:>13}{:>9}".format(*cells, *figures), flush=True)
    mass = measure_mass(args.model, trained, tokens, args.sinks or 1)
    record = {"benchmark": "sink_perplexity", **machine(torch.device(DEVICE)), "model": Path(args.model).stem}
    record |= {"dtype": "float32", "text": text, "num_tokens": args.num_tokens, "trained_length": trained}
    record |= {"num_first": args.sinks or 1, "far_from": min(trained, args.num_tokens) // FAR}
    record |= {"attention": verdict(mass), "attention_mass": mass, "block_tokens": BLOCK_TOKENS, "running": running}
    return record | {"rows": rows}


def print_mass(record: dict[str, Any]) -> None:
    first = record["num_first"]
    print(f"attention that queries from {record['far_from']} on give to the first {first} tokens, in %:")
    print("layer    all heads   largest head   equal shares   to the very first")
    for row in record["attention_mass"]:
        shares = (row[name] * 100 for name in ("mass", "largest_head", "uniform", "of_the_first"))
        print("{:5}{:13.2f}{:15.2f}{:15.2f}{:20.2f}".format(row["layer"], *shares))
    print(record["attention"])


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="demo", help="directory of safetensors with a tokenizer, GGUF file, or 'demo' (default)"
    )
    parser.add_argument("--num-tokens", type=int, default=20_000, help="tokens of the text that are scored")
    parser.add_argument("--sinks", type=int, default=4, help="first tokens that stay cached")
    parser.add_argument("--window", type=int, default=252, help="recent tokens beside them")
    parser.add_argument("--plot", metavar="FILE", help="draw the running perplexity there")
    add_output_argument(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.num_tokens < 1:
        raise ValueError(f"--num-tokens {args.num_tokens}: expected a positive number")
    if args.plot:
        check_installed()
    record = run(args)
    print_mass(record)
    keep(record, args.output_json)
    if args.plot:
        draw(record, args.plot)


if __name__ == "__main__":
    sys.exit(run_script(main))
