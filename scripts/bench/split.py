"""Measures what each way of a split execution costs beside the plain engine, and how far its outputs are from that
engine's.

The engine computes on the CPU, in float32, with everything resident. Every way generates the same greedy texts several
times. A row has the calls and bytes of one of these runs, the seconds a call of the median one, how many texts are the
plain engine's to the last token, and the largest difference of a log probability before texts part. The bound of a way
is the plain engine, which computes the same in the same run. The last line is one JSON object.

    python -m scripts.bench.split --model demo --max-tokens 64
"""

import argparse
import itertools
import statistics
import sys
import time
from dataclasses import asdict, astuple
from typing import Any

from penstock.engine.commands.flags import Parser
from penstock.engine.llm import LLM
from penstock.engine.output import CompletionOutput, without_errors
from penstock.engine.split.llm import FIXED, SplitLLM
from penstock.engine.split.transfers import ATTENTION_WAYS, PERMUTED, WIRE_DTYPES, SplitConfig
from penstock.parallel.ledger import Transfer
from penstock.scheduler.batching.request import SamplingParams

from scripts.bench.engine_record import describe
from scripts.bench.entry import run_script
from scripts.bench.record import add_output_argument, keep
from scripts.bench.workload import positive

PROMPTS = ("Return the", "Raise an error", "def main(", "import os", "This class")
WAYS = [SplitConfig(*way) for way in itertools.product(WIRE_DTYPES, ATTENTION_WAYS, (False, True))]
WAYS += [SplitConfig(attention=attention, permute=tuple(PERMUTED)) for attention in ATTENTION_WAYS]
NUM_RUNS = 5  # that count, behind one to warm up


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="checkpoint directory, GGUF file, or 'demo' (default)")
    parser.add_argument("--prompt", action="append", help=f"repeatable (default: {len(PROMPTS)} short ones)")
    text = "tokens to generate from each (default: 64)"
    parser.add_argument("--max-tokens", type=positive, default=64, metavar="N", help=text)
    add_output_argument(parser)
    args = parser.parse_args()
    prompts = args.prompt or list(PROMPTS)
    options = {"dtype": "float32", "max_num_seqs": len(prompts)}
    with LLM(args.model, **options, **FIXED) as llm:
        plain, plain_s = generate(llm, prompts, args.max_tokens)
        if (shortest := min(len(output.token_ids) for output in plain)) < args.max_tokens:
            raise ValueError(f"--max-tokens {args.max_tokens}: {args.model} has room for {shortest} behind a prompt")
        report = describe(llm, "split") | {"prompts": prompts, "output_len": args.max_tokens, "plain_s": plain_s}
    report["rows"] = [row_of(args, way, prompts, options, plain, plain_s) for way in WAYS]
    keep(report, args.output_json)


def generate(llm: LLM, prompts: list[str], max_tokens: int) -> tuple[list[CompletionOutput], float]:
    """Greedy outputs, and the seconds of the median run."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
    seconds = []
    for _ in range(1 + NUM_RUNS):
        start = time.perf_counter()
        outputs = without_errors(llm.generate(prompts, params))
        seconds.append(time.perf_counter() - start)
    return [output.outputs[0] for output in outputs], statistics.median(seconds[1:])


def row_of(args: argparse.Namespace, way: SplitConfig, prompts, options, plain, plain_s: float) -> dict[str, Any]:
    """The figures of one way."""
    with SplitLLM(args.model, way, **options) as llm:
        outputs, seconds = generate(llm, prompts, args.max_tokens)
        moved = llm.counted.total
    moved = Transfer(*(number // (1 + NUM_RUNS) for number in astuple(moved)))  # every run moves the same
    return {
        "wire_dtype": way.wire_dtype,
        "attention": way.attention,
        "process": way.process,
        "permute": ",".join(way.permute),
        **asdict(moved),
        "seconds": seconds,
        "call_s": seconds / moved.num_calls,
        "over_plain": seconds / plain_s,
        "same_texts": sum(one.token_ids == other.token_ids for one, other in zip(outputs, plain)),
        "num_texts": len(plain),
        "logprob_difference": max(map(logprob_difference, outputs, plain)),
    }


def logprob_difference(output: CompletionOutput, plain: CompletionOutput) -> float:
    """The largest difference of a log probability, up to the first token that differs."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(output.token_ids, plain.token_ids))
    num_same = sum(1 for _ in same)
    pairs = zip(output.logprobs[:num_same], plain.logprobs[:num_same], output.token_ids)
    return max((abs(ours[token].logprob - theirs[token].logprob) for ours, theirs, token in pairs), default=0.0)


if __name__ == "__main__":
    sys.exit(run_script(main))
