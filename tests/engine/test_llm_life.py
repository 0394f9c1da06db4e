"""The life of an LLM on one rank: seeds, calls after one another, interruptions, closing."""

import itertools
import weakref

import pytest
from penstock.engine.runtime.watch import Watch

from penstock import LLM, SamplingParams
from tests.support.held import assert_no_more_than, held
from tests.support.llm_runs import LONG, OPTIONS, REQUESTS, run_requests, tokens_of
from tests.support.watches import After

GREEDY = SamplingParams(temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", **OPTIONS) as llm:
        yield llm


def test_a_seed_gives_the_same_tokens_in_any_company(llm):
    """Alone, in other rows, among other requests, whole or in chunks: fp32, so that no near-tie flips."""
    params = SamplingParams(seed=21, max_tokens=12)
    alone = tokens_of(llm.generate([LONG], params))
    others = ["def", [5, 6, 7], LONG, "Raise an error if"]
    for index in range(5):
        batch = [*others[:index], LONG, *others[index:]]
        outputs = llm.generate(batch, [params if i == index else SamplingParams() for i in range(5)])
        assert [outputs[index].outputs[0].token_ids] == alone
    assert tokens_of(llm.generate([LONG], SamplingParams(seed=22, max_tokens=12))) != alone


def test_calls_do_not_disturb_each_other(llm):
    before = tokens_of(llm.generate(["Return the", LONG], GREEDY))
    llm.generate(
        [LONG] * 4, SamplingParams(repetition_penalty=2.0, presence_penalty=2.0, frequency_penalty=2.0, logprobs=5)
    )
    assert tokens_of(llm.generate(["Return the", LONG], GREEDY)) == before
    llm.loop.scheduler.check_integrity()
    assert llm.loop.scheduler.num_free_pages == llm.loop.scheduler.pool.num_usable


@pytest.mark.parametrize(
    ("where", "error"),
    [("on_text", KeyboardInterrupt), ("pass", ZeroDivisionError), ("pass", KeyboardInterrupt)],
)
def test_an_interruption_leaves_the_engine_usable(llm, error, where):
    expected = tokens_of(llm.generate([LONG, "Return the"], GREEDY))
    calls = itertools.count()

    def interrupt_late(*_) -> None:
        if next(calls) == 7:
            raise error

    watch = After(interrupt_late) if where == "pass" else Watch()
    with llm.engine.watched_by(watch), pytest.raises(error):
        llm.generate([LONG] * 6, GREEDY, on_text=interrupt_late if where == "on_text" else None)
    assert llm.loop.scheduler.num_running == llm.loop.scheduler.num_waiting == 0
    assert tokens_of(llm.generate([LONG, "Return the"], GREEDY)) == expected


def test_one_engine_after_another_repeats_itself():
    """The engine's own seed decides for requests without one; another seed gives other tokens."""
    runs = []
    for seed in (0, 0, 1):
        with LLM("demo", **OPTIONS, seed=seed) as one:
            runs.append([*run_requests(one), *tokens_of(one.generate("Test"))])
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][-1] != runs[0][len(REQUESTS) - 1]["outputs"][0]["token_ids"]  # the same prompt, a later request


def test_leaving_frees_everything():
    with LLM("demo", **OPTIONS):
        pass  # what the process keeps from a first engine (thread pools of torch) does not count
    before = held()
    with LLM("demo", **OPTIONS) as llm:
        llm.generate("Return the", GREEDY)
        parts = [
            weakref.ref(llm.engine.worker),
            weakref.ref(llm.engine.worker.executor),
            weakref.ref(llm.engine.worker.executor.ring),
        ]
        arena = [weakref.ref(span) for span in llm.engine.worker.weights.host_spans.values()]
        assert arena
    assert [ref() for ref in parts + arena] == [None] * len(parts + arena)
    assert_no_more_than(before)


def test_a_closed_engine_says_so():
    llm = LLM("demo", **OPTIONS)
    llm.close()
    llm.close()
    for use in (lambda: llm.generate("Return the"), lambda: llm.check("Return the"), llm.measure, llm.__enter__):
        with pytest.raises(RuntimeError, match="this LLM is closed"):
            use()
