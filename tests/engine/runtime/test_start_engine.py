"""The start and the end of an engine: what was made is undone once, the last first, after any error too."""

import pytest
from penstock.engine.config import EngineConfig
from penstock.engine.planning.engine_plan import EnginePlan
from penstock.engine.runtime.build import Ingredients
from penstock.engine.runtime.engine import Engine
from penstock.engine.runtime.start_engine import start_engine
from penstock.engine.weights.checkpoint import Checkpoint
from penstock.parallel.collectives import Solo
from penstock.parallel.launch import Launch

CONFIG = EngineConfig("demo", device="cpu", debug={"lookahead": 1})
ALL = ["close the files", "close the worker", "leave the group", "end the launch"]


class NoWorker:
    """A worker that says when it is closed, and computes nothing."""

    def __init__(self, plan: EnginePlan, said: list[str]):
        self.plan, self._said = plan, said

    def close(self) -> None:
        self._said.append("close the worker")


@pytest.fixture
def said(monkeypatch) -> list[str]:
    said: list[str] = []

    def say_before(owner: type, name: str, text: str) -> None:
        do = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: (said.append(text), do(*given))[1])

    say_before(Checkpoint, "close", ALL[0])
    say_before(Solo, "close", ALL[2])
    say_before(Launch, "close", ALL[3])
    return said


def start(said: list[str]) -> Engine:
    return start_engine(CONFIG, Launch("solo"), lambda given, source: NoWorker(given.plan, said))


def test_an_engine_takes_what_was_built_and_undoes_it_once(said):
    engine = start(said)
    assert said == ALL[:1] and engine.lookahead == 1 and engine.plan is engine.worker.plan
    engine.close()
    engine.close()
    assert said == ALL and engine.worker is None and engine.collectives is None


def test_an_error_behind_the_worker_undoes_all(said, monkeypatch):
    monkeypatch.setattr(Solo, "barrier", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start(said)
    assert said == ALL


def test_an_error_in_the_constructor_undoes_all(said, monkeypatch):
    monkeypatch.setattr("penstock.engine.runtime.engine.pass_work", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start(said)
    assert said == ALL


def test_an_error_before_there_is_a_worker_undoes_the_rest(said):
    def fail(given: Ingredients, source: Checkpoint) -> NoWorker:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        start_engine(CONFIG, Launch("solo"), fail)
    assert said == [ALL[0], *ALL[2:]]
