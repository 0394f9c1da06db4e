"""Jobs for `penstock batch`: inputs, the command on an engine that is there already, in this process or in a fork that
may die, and an engine without a model for jobs of many rows."""

import contextlib
import itertools
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from penstock.engine.commands.cli import main
from penstock.engine.compute.sampler import SampleOutput
from penstock.engine.config import EngineConfig
from penstock.engine.loop import Loop
from penstock.engine.runtime.pass_times import PassTimes
from penstock.engine.text.model_prompts import ModelPrompts
from penstock.scheduler.batching.batch import Batch
from penstock.scheduler.batching.filling import Filling
from penstock.scheduler.batching.request import Request
from penstock.scheduler.batching.scheduler import Scheduler
from penstock.scheduler.cost.pass_work import PassWork, StepWork
from penstock.scheduler.cost.time_model import Rates
from penstock.scheduler.units import GB

from tests.support.fake_engine import FakeEngine

MODEL = ("--model", "demo", "--device", "cpu", "--dtype", "float32", "--max-model-len", "64")
FORK_S = 120
RATES = Rates(link_gb_s=1, memory_gb_s=1, gemm_tflops=1, reduce_latency_s=0, reduce_gb_s=1, source="none")
TOKEN, STOP, VOCAB_SIZE = 5, 7, 2**16  # those that the engine without a model gives, and how many there are


def line(custom_id: str, url: str = "/v1/completions", method: str = "POST", **body) -> str:
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body})


def mixed_lines(num_rows: int, seed: int = 0) -> list[str]:
    """Rows of texts and of token ids, greedy and drawn, with and without a seed, of uneven lengths. Each fourth has a
    prompt that no other has."""
    chosen, lines = random.Random(seed), []
    for number in range(num_rows):
        prompt = [5 + number, 7, 9] if number % 4 == 3 else f"def name_{number % 7}("
        body = {"prompt": prompt, "max_tokens": chosen.randint(1, 9), "temperature": number % 3 / 2}
        lines.append(line(f"row {number}", **body | ({"seed": number} if number % 5 == 0 else {})))
    return lines


def write_lines(file: Path, lines: list[str]) -> Path:
    file.write_text("".join(f"{each}\n" for each in lines))
    return file


def rows_of(file: Path) -> list[dict]:
    return [json.loads(each) for each in file.read_bytes().splitlines()]


def same_job(first: Path, other: Path) -> None:
    """Lets another output belong to the job of the first: its rows are then the same, `created` too."""
    (other.parent / f"{other.name}.job").write_bytes((first.parent / f"{first.name}.job").read_bytes())


def run_here(llm, given: Path, output: Path, *more: str) -> int:
    """The command's exit status, on an engine that is there."""
    with mock.patch("penstock.engine.llm.LLM", lambda **options: contextlib.nullcontext(llm)):
        return main(["batch", *MODEL, "-i", str(given), "-o", str(output), *map(str, more)])


def begin_in_fork(work: Callable[[], int]) -> int:
    """The process id of a fork that exits with what `work` returns."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            signal.alarm(FORK_S)
            status = work()
        finally:
            os._exit(status)
    return pid


def status_of(pid: int) -> int:
    """The exit status of a fork, once it has ended; negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_in_a_pass(number: int) -> None:
    """This process is killed before its pass of that number, from 0 on."""
    advance, passes = Loop.advance, itertools.count()

    def advancing(loop):
        if next(passes) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return advance(loop)

    Loop.advance = advancing


def kill_in_a_write(number: int, share: float) -> None:
    """This process is killed inside a write of rows, the one of that number, of which such a share was written."""
    write, writes = os.write, itertools.count()

    def writing(descriptor, data):
        if bytes(data).startswith(b'{"id": "batch_req_') and next(writes) == number:
            write(descriptor, bytes(data)[: max(int(len(data) * share), 1)])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, data)

    os.write = writing


class Clock:
    """A clock that only passes move."""

    def __init__(self):
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


class StubEngine(FakeEngine):
    """Its passes compute nothing, and take as long as predicted for this work at these rates. A request gets TOKEN, or
    STOP where it `stops`."""

    device = torch.device("cpu")

    def __init__(self, stops: Callable[[Request], bool], work: PassWork, rates: Rates):
        super().__init__(TOKEN)
        self.times, self.clock, self.stops, self.work, self.rates = PassTimes(), Clock(), stops, work, rates
        self.scheduler: Scheduler | None = None

    def submit(self, batch: Batch) -> None:
        super().submit(batch)
        self.times.submitted()
        self.times.foresee(batch.shape, self.work, self.rates)

    def collect(self) -> tuple[Batch, SampleOutput]:
        batch, _ = super().collect()
        self.times.ended()
        self.clock.now_s += self.times.last.predicted.total_s
        requests = {request.row: request for request in self.scheduler.seated}
        stops = [row.index in requests and self.stops(requests[row.index]) for row in batch.rows if row.samples]
        return batch, SampleOutput(torch.where(torch.tensor(stops, dtype=torch.bool), STOP, TOKEN), None)

    def forget(self) -> None:
        while self.num_under_way:
            self.collect()


class StubLLM:
    """An LLM as a job needs it, with such an engine. Without `work` its passes take `link_s`, or longer if they have
    more tokens than `hidden_tokens`."""

    tokenizer = None

    def __init__(
        self,
        max_num_seqs: int = 256,
        stops: Callable[[Request], bool] = lambda request: False,
        scheduler: Scheduler | None = None,
        work: PassWork | None = None,
        rates: Rates = RATES,
        link_s: float = 0.2,
        hidden_tokens: int = 400,
    ):
        linear = StepWork("linear", token_flops=int(RATES.gemm_tflops * 1e12 * link_s / hidden_tokens))
        work = work or PassWork(int(RATES.link_gb_s * GB * link_s), 0, ((linear, 1),))
        self.config, self.engine = EngineConfig(), StubEngine(stops, work, rates)
        self.clock = self.engine.clock
        scheduler = scheduler or Scheduler(max_num_seqs, 4096, 256, page_size=16, num_pages=16 * max_num_seqs + 1)
        scheduler.composer.filling = Filling.of(work, rates)
        self.engine.scheduler = scheduler
        self.loop = Loop(scheduler, self.engine)
        self.prompts = ModelPrompts(self.config, self.tokenizer, VOCAB_SIZE, scheduler.limits)

    def lead(self) -> None:
        pass


def write_many(file: Path, num_rows: int) -> Path:
    """A file of short rows of token ids."""
    with open(file, "w") as stream:
        for number in range(num_rows):
            body = f'{{"prompt": [{number % 97}, {number % 89}], "max_tokens": {1 + number % 3}}}'
            stream.write(f'{{"custom_id": "{number}", "method": "POST", "url": "/v1/completions", "body": {body}}}\n')
    return file
