"""The rows of real traffic that scripts/bench/traffic.py measures, as data."""

from dataclasses import dataclass, field
from typing import Any

from penstock.scheduler.batching.request import SamplingParams

from scripts.bench.workload import Job, greedy, random_jobs

FIRST_TOKEN, TOKEN, JOB = "first token", "token", "job"  # what a row measures
FULL, URGENT, ENDING = "full engine", "urgent request", "job with unknown ends"  # full_engine.py measures these
SHORT_OUTPUT = 2  # tokens of the run that a token's time leaves out: prompts, and what starts
REPEATS = {FIRST_TOKEN: 3, TOKEN: 2, JOB: 1}  # the shortest counts


@dataclass(frozen=True)
class Row:
    """Requests of one kind.

    FIRST_TOKEN: seconds of prompts with one token of output each. TOKEN: seconds a token of a batch in which all decode
    `output_len` tokens: a run with so many more, less a run with SHORT_OUTPUT, over `output_len`. JOB: seconds of all
    requests, more than run at once. FULL: a token of as many rows as the KV cache holds, with `input_len` tokens each,
    over `output_len` passes. URGENT: seconds to the first token of one more request, when others of `input_len` tokens
    have taken all rows or pages, and wait for more. ENDING: a JOB whose requests may have `most_len` tokens of output
    and end after those that were drawn, which the scheduler does not know. Rows of these three, which want an engine of
    their own, run if they are named.

    `differ` are fields of workload's Vary; the first prompt has `first_len` tokens, if that is set. All are generated
    greedily but for the fields `all`, and `fourth` in every fourth request.
    """

    name: str
    measures: str
    num: int
    input_len: int
    output_len: int
    differ: dict[str, Any] = field(default_factory=dict)
    first_len: int | None = None
    most_len: int | None = None
    all: dict[str, Any] = field(default_factory=dict)
    fourth: dict[str, Any] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest request that may be drawn; of the mean one where lengths have no range."""
        stretch = 1 + self.differ.get("range_ratio", 0.0)
        prompt = max(int(self.input_len * stretch), self.first_len or 0) + self.differ.get("prefix_len", 0)
        output = self.most_len or int(self.output_len * stretch)
        return prompt + output + (SHORT_OUTPUT if self.measures == TOKEN else 0)

    @property
    def is_usual(self) -> bool:
        """Tells whether the row is one of those that run if none is named, and that vLLM can run too."""
        return self.measures in REPEATS

    def jobs(self, output_len: int, vocab_size: int, seed: int, max_len: int) -> list[Job]:
        """The requests, drawn by the seed, with outputs around `output_len`."""
        differ = {"max_len": max_len} | self.differ
        jobs = random_jobs(self.num, self.input_len, output_len, vocab_size, seed, **differ)
        if self.first_len is not None:
            jobs[:1] = random_jobs(1, self.first_len, output_len, vocab_size, seed)
        return jobs

    def params(self, jobs: list[Job]) -> list[SamplingParams]:
        """Says how each request is sampled."""
        every = [self.all | (self.fourth if index % 4 == 3 else {}) for index in range(len(jobs))]
        return [greedy(job, **changes) for job, changes in zip(jobs, every)]


UNEVEN, LONG, AMONG = {"range_ratio": 0.8}, 65_000, 63 * 512
DRAWN = {"temperature": 1.0, "top_p": 0.9}
ROWS = (
    *(Row(f"first-token-{length}", FIRST_TOKEN, 1, length, 1) for length in (128, 512, 2000, 8000)),
    Row("uneven", JOB, 512, 512, 128, UNEVEN),
    Row("long-prompts", JOB, 64, 4096, 128),
    Row("short", JOB, 1000, 128, 64),
    Row("long-tailed", JOB, 512, 512, 128, {"sigma": 1.0}),
    Row("shared-prefix", JOB, 300, 64, 32, {"prefix_len": 2000}),
    Row("unknown-ends", ENDING, 2000, 128, 200, {"range_ratio": 0.8}, most_len=4096),
    Row("full-at-640", FULL, 0, 640, 8),
    Row("urgent", URGENT, 1, 640, 1),
    Row("token-64-rows-at-2100", TOKEN, 64, 2048, 128),
    *(Row(f"token-batch-{batch}", TOKEN, batch, 32, 128) for batch in (1, 8, 64, 256)),
    *(Row(f"token-batch-{batch}-brief", TOKEN, batch, 32, 16) for batch in (1, 64)),  # for passes of streamed weights
    Row("token-batch-256-drawn", TOKEN, 256, 32, 128, all=DRAWN),
    Row("token-batch-256-penalties", TOKEN, 256, 32, 128, all=DRAWN, fourth={"frequency_penalty": 0.5}),
    Row("token-batch-256-logprobs", TOKEN, 256, 32, 128, fourth={"logprobs": 5}),
    Row("token-one-long-row", TOKEN, 64, 512, 128, first_len=LONG),
    Row("token-same-kv-evenly", TOKEN, 64, (LONG + AMONG) // 64, 128),
)
