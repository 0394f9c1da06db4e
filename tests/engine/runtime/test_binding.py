"""An engine's device is the current one while the engine works, whichever a user's thread has set."""

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from penstock.engine.compute.sampler import Asked, PendingSample
from penstock.engine.llm import LLM
from penstock.engine.runtime import build, probe
from penstock.engine.runtime.binding import bound_to
from penstock.engine.runtime.engine import Engine
from penstock.engine.runtime.graph import PendingLetter
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.request import RowSampling
from torch.utils._python_dispatch import TorchDispatchMode

OWN, ANOTHER = torch.device("cuda", 1), torch.device("cuda", 0)
OPTIONS = {"device": "cpu", "dtype": "float32", "resident": "none", "max_num_seqs": 2, "max_num_batched_tokens": 16}
GREEDY = RowSampling(0.0, 1.0, 0, 0.0, 1.0, 0.0, 0.0, 0, -1)
PENALISED = replace(GREEDY, repetition_penalty=1.5, num_logprobs=1)


class CurrentDevice(threading.local):
    """The current device of each thread, as torch keeps it: the one that was set last, or the first."""

    device = ANOTHER

    def bind(self, device: torch.device) -> "Bound":
        return Bound(self, device)


class Bound:
    def __init__(self, current: CurrentDevice, device: torch.device):
        self.current, self.device = current, device

    def __enter__(self) -> None:
        self.before, self.current.device = self.current.device, self.device

    def __exit__(self, *exc) -> None:
        self.current.device = self.before


class OnDevice(TorchDispatchMode):
    """Notes operations that run while another device is the current one."""

    def __init__(self, current: CurrentDevice):
        super().__init__()
        self.current, self.num_run, self.elsewhere = current, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_run += 1
        if self.current.device != OWN:
            self.elsewhere.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def current(monkeypatch) -> CurrentDevice:
    current = CurrentDevice()
    monkeypatch.setattr(torch.cuda, "device", current.bind)
    return current


@pytest.fixture(params=["plain", "padded"])
def engine(request, current) -> Iterator[Engine]:
    """An engine on the CPU that binds the second GPU as its device."""
    with LLM("demo", **OPTIONS, debug={"as_on_gpu": request.param == "padded"}) as llm:
        runner = llm.engine.worker.runner
        runner.device = runner.executor.device = OWN
        yield llm.engine
        runner.device = runner.executor.device = torch.device("cpu")


def a_prompt(sampling: RowSampling) -> Batch:
    return Batch((BatchRow(0, (5, 6, 7), 0, (1,), True, sampling),))


def a_token(start: int) -> Batch:
    return Batch((BatchRow(0, (8,), start, (1,), True, None),))


def run_passes(engine: Engine) -> None:
    """Every way of a pass: with a prompt, of one token, announced, with penalties and logprobs, given up."""
    for sampling in (GREEDY, PENALISED):
        engine.submit(a_prompt(sampling))
        engine.collect()
        engine.submit(a_token(3))
        engine.collect()
        engine.announce(a_token(4))
        engine.run_announced(a_token(4))
        engine.forget()


def test_passes_run_on_the_engines_own_device(engine, current):
    with OnDevice(current) as noted:
        run_passes(engine)
    assert noted.num_run > 100 and noted.elsewhere == []
    assert current.device == ANOTHER, "the user's own choice stays"


def test_so_do_passes_of_another_thread(engine, current):
    noted = []

    def run() -> None:
        with OnDevice(current) as mode:
            run_passes(engine)
        noted.append(mode)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert noted[0].num_run > 100 and noted[0].elsewhere == []


def test_a_plan_that_is_run_by_itself_too(engine, current):
    """Scores of a given text run one by itself."""
    executor = engine.worker.executor
    inputs = engine.worker.runner.binder.bind(a_prompt(GREEDY))
    executor.ring_is_filled = False
    for run in (executor.fill_ring, lambda: executor.run(inputs, Asked(), lambda output: None)):
        with torch.inference_mode(), OnDevice(current) as noted:
            run()
        assert noted.num_run > 0 and noted.elsewhere == []


def test_the_token_is_waited_for_on_it(engine, current, monkeypatch):
    waited = []
    for kind in (PendingSample, PendingLetter):
        wait = kind.wait
        monkeypatch.setattr(kind, "wait", lambda *given, wait=wait: waited.append(current.device) or wait(*given))
    for batch in (a_prompt(GREEDY), a_token(3)):
        engine.submit(batch)
        engine.collect()
    assert waited == [OWN, OWN]


def test_measuring_runs_on_it(engine, current, monkeypatch):
    """The rates themselves are measured elsewhere in the tests."""
    seen = []
    monkeypatch.setattr(probe, "measure_rates", lambda *args: seen.append(current.device) or engine.rates)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(device))
    engine.measure()
    assert seen == [OWN, OWN]


def test_an_engine_is_built_and_freed_on_it(current, monkeypatch):
    seen = []

    def noted(name: str) -> None:
        plain = getattr(build, name)

        def run(*args):
            seen.append((name, current.device))
            return plain(*args)

        monkeypatch.setattr(build, name, run)

    for name in ("load", "build_executor"):
        noted(name)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("binding", "build"):
            patch.setattr(f"penstock.engine.runtime.{module}.bound_to", lambda device: current.bind(OWN))
        with LLM("demo", **OPTIONS) as llm:
            weights = llm.engine.worker.weights
            close = weights.close
            weights.close = lambda: seen.append(("close", current.device)) or close()
    assert seen == [("load", OWN), ("build_executor", OWN), ("close", OWN)]
    assert current.device == ANOTHER


def test_a_cpu_binds_nothing(current):
    with bound_to(torch.device("cpu")):
        assert current.device == ANOTHER
    with bound_to(OWN):
        assert current.device == OWN
    assert current.device == ANOTHER
