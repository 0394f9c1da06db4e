"""The workload of a benchmark, random prompts by flags with vLLM's names and meaning, and its result."""

import argparse
import random
from dataclasses import dataclass

from penstock.scheduler.batching.request import SamplingParams


@dataclass(frozen=True)
class Job:
    """One prompt, as token ids, and how many tokens to generate from it."""

    prompt: list[int]
    output_len: int


@dataclass(frozen=True)
class Measured:
    """One batch as an engine ran it: prompts (of one length), the tokens of each, seconds until all had their first
    token, and of a decode pass (None if there was none)."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    first_token_s: float
    token_s: float | None


def add_workload_arguments(parser: argparse.ArgumentParser, output_len: int) -> None:
    """Adds the flags of a workload. `output_len` is a default; the seed is the engine's `--seed`."""
    parser.add_argument("--input-len", type=positive, default=32, metavar="N", help="tokens of a prompt (default: 32)")
    text = f"tokens to generate from each (default: {output_len})"
    parser.add_argument("--output-len", type=positive, default=output_len, metavar="N", help=text)
    parser.add_argument("--n", type=positive, default=1, help="sequences generated from each prompt (default: 1)")


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive integer")
    return int(text)


def ratio(text: str) -> float:
    """An argparse type: a number from 0, below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0, below 1")
    return value


def random_jobs(
    num_prompts: int, input_len: int, output_len: int, vocab_size: int, seed: int, range_ratio: float = 0.0
) -> list[Job]:
    """Makes jobs with random prompts. Both lengths are drawn from [length * (1 - range_ratio), length * (1 +
    range_ratio)], and are at least 1."""
    rng = random.Random(seed)

    def length(middle: int) -> int:
        return max(rng.randint(int(middle * (1 - range_ratio)), int(middle * (1 + range_ratio))), 1)

    return [Job(rng.choices(range(vocab_size), k=length(input_len)), length(output_len)) for _ in range(num_prompts)]


def greedy(job: Job, n: int = 1) -> SamplingParams:
    """Asks for exactly the job's number of tokens, the likeliest ones, which can be compared with another engine's."""
    return SamplingParams(n=n, temperature=0.0, max_tokens=job.output_len, ignore_eos=True)
