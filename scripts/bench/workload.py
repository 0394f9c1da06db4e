"""The workload of a benchmark, random prompts or stretches of a text, by flags with vLLM's names and meaning where it
has them, and its result."""

import argparse
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.engine.text.tokenizer import Tokenizer
from penstock.engine.user_files import read_bytes
from penstock.scheduler.batching.request import SamplingParams


@dataclass(frozen=True)
class Job:
    """One prompt, as token ids, and how many tokens to generate from it."""

    prompt: list[int]
    output_len: int


@dataclass(frozen=True)
class Vary:
    """Says how jobs differ from each other.

    Lengths are drawn evenly from [length * (1 - range_ratio), length * (1 + range_ratio)]; with a `sigma`, which is
    that of their logarithms, from a log-normal distribution with the length as its mean: many short ones, a few very
    long. Jobs of more than `max_len` tokens are then drawn again. `prefix_len` tokens, the same in all, stand in front
    of every prompt.
    """

    range_ratio: float = 0.0
    sigma: float = 0.0
    prefix_len: int = 0
    max_len: float = math.inf

    def length(self, rng: random.Random, middle: int) -> int:
        """Draws a length, at least 1."""
        if self.sigma:
            return max(round(rng.lognormvariate(math.log(middle) - self.sigma**2 / 2, self.sigma)), 1)
        return max(rng.randint(int(middle * (1 - self.range_ratio)), int(middle * (1 + self.range_ratio))), 1)

    def lengths(self, rng: random.Random, input_len: int, output_len: int) -> tuple[int, int]:
        """Draws the lengths of a prompt, without its prefix, and of its output."""
        while True:
            drawn = self.length(rng, input_len), self.length(rng, output_len)
            if not self.sigma or self.prefix_len + sum(drawn) <= self.max_len:
                return drawn


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
    names, text = ("--input-len", "--random-input-len"), "tokens of a prompt (default: 32)"
    parser.add_argument(*names, type=positive, default=32, metavar="N", help=text)
    names, text = ("--output-len", "--random-output-len"), f"tokens to generate from each (default: {output_len})"
    parser.add_argument(*names, type=positive, default=output_len, metavar="N", help=text)
    parser.add_argument("--n", type=positive, default=1, help="sequences generated from each prompt (default: 1)")


def add_text_argument(parser: argparse.ArgumentParser) -> None:
    text = "a text in UTF-8, stretches of which are the prompts (default: random tokens)"
    parser.add_argument("--text", type=Path, default=None, metavar="FILE", help=text)


def read_text(file: Path) -> str:
    """The text of a file. Raises ValueError, naming it, if it is not UTF-8 or has no words."""
    try:
        text = read_bytes(file).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {file}: is not UTF-8: byte {error.start}") from error
    if not text.split():
        raise ValueError(f"--text {file}: has no words")
    return text


def text_tokens(tokenizer: Tokenizer | None, file: Path | None) -> list[int] | None:
    """The tokens of a text; None without a file. Raises ValueError as read_text does, and without a tokenizer."""
    if file is None:
        return None
    if tokenizer is None:
        raise ValueError(f"--text {file}: the model has no tokenizer")
    return tokenizer.encode(read_text(file), add_special=False)


def stretch(rng: random.Random, parts: Sequence, length: int) -> list:
    """Parts of a text from a random one on; the first follow the last."""
    start = rng.randrange(len(parts))
    return [parts[index % len(parts)] for index in range(start, start + length)]


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive integer")
    return int(text)


def ratio(text: str) -> float:
    """An argparse type: a number from 0, below 1."""
    return _number(text, lambda value: 0.0 <= value < 1.0, "a number from 0, below 1")


def natural(text: str) -> int:
    """An argparse type: an integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least 0")
    return int(text)


def deviation(text: str) -> float:
    """An argparse type: a number from 0 to 3."""
    return _number(text, lambda value: 0.0 <= value <= 3.0, "a number from 0 to 3")


def above_zero(text: str) -> float:
    """An argparse type: a number above 0, or inf."""
    return _number(text, lambda value: value > 0, "a number above 0")


def _number(text: str, allowed: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    return value


def random_jobs(
    num_prompts: int,
    input_len: int,
    output_len: int,
    vocab_size: int,
    seed: int,
    text: Sequence[int] | None = None,
    **differ,
) -> list[Job]:
    """Makes jobs with random prompts, or stretches of a text's tokens, all of these lengths, unless they `differ` by
    the fields of Vary."""
    rng, ids, vary = random.Random(seed), range(vocab_size), Vary(**differ)

    def tokens(length: int) -> list[int]:
        return rng.choices(ids, k=length) if text is None else stretch(rng, text, length)

    prefix, jobs = tokens(vary.prefix_len), []
    for _ in range(num_prompts):
        own_len, num_outputs = vary.lengths(rng, input_len, output_len)
        jobs.append(Job(prefix + tokens(own_len), num_outputs))
    return jobs


def greedy(job: Job, n: int = 1, **changes) -> SamplingParams:
    """Asks for exactly the job's number of tokens, the likeliest ones, which can be compared with another engine's;
    `changes` are fields that differ."""
    return SamplingParams(**{"n": n, "temperature": 0.0, "max_tokens": job.output_len, "ignore_eos": True} | changes)
