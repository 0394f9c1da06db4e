"""One LLM and several threads: calls take turns; a call from inside another is refused and harms nobody."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from penstock.engine.turns import Turns

from penstock import LLM, SamplingParams
from tests.support.llm_runs import LONG, OPTIONS, tokens_of

GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=10)
PROMPTS = ["Return the", LONG, "def", [5, 6, 7]]
REFUSED = r"^{}\(\) was called inside another call of the same object, such as in its on_text; call it when"


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(llm):
    return [tokens_of(llm.generate(prompt, GREEDY)) for prompt in PROMPTS]


def assert_at_rest(llm: LLM) -> None:
    llm.loop.scheduler.check_integrity()
    assert llm.loop.scheduler.num_running == llm.loop.scheduler.num_waiting == 0


def test_every_thread_gets_its_own_answers(llm, expected):
    start = threading.Barrier(len(PROMPTS))

    def answers(prompt) -> list:
        start.wait()
        return [tokens_of(llm.generate(prompt, GREEDY)) for _ in range(4)]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = list(pool.map(answers, PROMPTS))
    assert found == [[own] * 4 for own in expected]
    assert_at_rest(llm)


def test_a_thread_that_fails_disturbs_no_other(llm, expected):
    """Refused prompts, an on_text that raises, an interrupted call: beside right ones, which stay right."""

    def raises(*_) -> None:
        raise KeyboardInterrupt

    def bad_prompt() -> None:
        with pytest.raises(ValueError, match="token id 99999 is not in"):
            llm.generate([[99999]])

    def bad_on_text() -> None:
        with pytest.raises(ZeroDivisionError):
            llm.generate(LONG, GREEDY, on_text=lambda *_: 1 / 0)

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            llm.generate([LONG] * 6, GREEDY, on_text=raises)

    with ThreadPoolExecutor(4) as pool:
        bad = [pool.submit(call) for _ in range(3) for call in (bad_prompt, bad_on_text, interrupted)]
        good = [pool.submit(llm.generate, prompt, GREEDY) for _ in range(3) for prompt in PROMPTS]
        assert [tokens_of(one.result()) for one in good] == expected * 3
        assert [one.result() for one in bad] == [None] * 9
    assert_at_rest(llm)


@pytest.mark.parametrize("name", ["generate", "measure", "close"])
def test_a_call_inside_a_call_is_refused_at_once(llm, expected, name):
    """The outer call's answer is whole; only to check a prompt is free."""
    inner = {"generate": lambda: llm.generate("def"), "measure": llm.measure, "close": llm.close}[name]
    told = []

    def on_text(prompt: int, index: int, text: str | None) -> None:
        with pytest.raises(RuntimeError, match=REFUSED.format(name)):
            inner()
        llm.check("def")
        told.append(text)

    (output,) = llm.generate(LONG, GREEDY, on_text=on_text)
    assert tokens_of([output]) == expected[1]
    assert "".join(told[:-1]) == output.outputs[0].text and told[-1] is None
    assert tokens_of(llm.generate(LONG, GREEDY)) == expected[1]


def test_a_refusal_that_on_text_does_not_catch_ends_its_prompt_alone(llm, expected):
    def on_text(prompt: int, index: int, text: str | None) -> None:
        if prompt == 0:
            llm.generate("def")

    with pytest.raises(RuntimeError, match=REFUSED.format("generate")) as caught:
        llm.generate(PROMPTS, GREEDY, on_text=on_text)
    first, *others = caught.value.outputs
    assert first.outputs[0].finish_reason == "abort"
    assert [tokens_of([output]) for output in others] == expected[1:]
    assert_at_rest(llm)


def test_closing_waits_for_the_call_that_runs(expected):
    """A later caller is told that it is closed."""
    llm, started, go_on = LLM("demo", **OPTIONS), threading.Event(), threading.Event()

    def on_text(*_) -> None:
        started.set()
        assert go_on.wait(60)

    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(llm.generate, LONG, GREEDY, on_text=on_text)
        assert started.wait(60)
        closing = pool.submit(llm.close)
        wait_until(llm.turns._line.locked)
        waiting = pool.submit(llm.generate, "def", GREEDY)
        assert llm.engine is not None and not running.done() and not closing.done()
        go_on.set()
        assert tokens_of(running.result(60)) == expected[1] and closing.result(60) is None
        error = waiting.exception(60)  # or it had its turn before the one that closes
        assert "this LLM is closed" in str(error) if error else tokens_of(waiting.result()) == expected[2]
        with pytest.raises(RuntimeError, match="this LLM is closed"):
            pool.submit(llm.generate, "def").result(60)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_turn_ends_however_its_call_ends():
    turns, order = Turns(), []
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            turns.take("one", lambda error=error: raise_(error))
    assert turns.take("one", lambda: 5) == 5
    with ThreadPoolExecutor(1) as pool:  # another thread can have it: nothing is held
        assert pool.submit(turns.take, "other", lambda: order.append(1)).result(60) is None


def raise_(error: type[BaseException]) -> None:
    raise error
