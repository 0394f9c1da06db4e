"""The loop as others use it: add, abort and advance, from any thread, and what is read before a pass is sealed."""

import threading

import pytest
from penstock.engine.compute.bind import Binder
from penstock.engine.loop import Event, Loop
from penstock.engine.output import Sequence
from penstock.engine.text.tokenizer import Tokenizer
from penstock.scheduler.batching import limits

from penstock import LLM, SamplingParams
from tests.support.fake_engine import BusyEngine, RestingEngine
from tests.support.watches import Around, BeginPass

OPTIONS = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 16}
PREPARED = {"resident": "none", "debug": {"lookahead": 1}}  # as where weights stream to a GPU
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["Return the", "def", "class", "import"]


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(llm):
    return {prompt: llm.generate(prompt, PARAMS)[0].outputs[0].text for prompt in PROMPTS}


@pytest.fixture
def sequence_of(llm):
    return lambda prompt: llm.sequences(prompt, PARAMS)[0]


def run(loop) -> list[Event]:
    events = []
    while loop.has_unfinished:
        events += loop.advance()
    return events


def text_of(events: list[Event], sequence: Sequence) -> str:
    mine = [event for event in events if event.sequence is sequence]
    assert [event.is_last for event in mine] == [False] * (len(mine) - 1) + [True]
    return "".join(event.text for event in mine)


def test_events_are_the_text_as_it_grows(llm, alone, sequence_of):
    sequences = [sequence_of(prompt) for prompt in PROMPTS]
    for sequence in sequences:
        llm.loop.add(sequence)
    events = run(llm.loop)
    assert [text_of(events, sequence) for sequence in sequences] == list(alone.values())
    assert llm.loop.advance() == []


def test_one_is_aborted_between_two_passes_and_the_others_go_on(llm, alone, sequence_of):
    first, other, waiting = map(sequence_of, PROMPTS[:3])
    for sequence in (first, other, waiting):
        llm.loop.add(sequence)
    events = llm.loop.advance() + llm.loop.advance() + llm.loop.advance()
    llm.loop.abort(first.request.id, "nobody listens")
    llm.loop.abort(first.request.id, "said twice")
    events += run(llm.loop)
    assert (first.output().finish_reason, first.error) == ("abort", "nobody listens")
    assert alone[PROMPTS[0]].startswith(text_of(events, first)) and len(first.output().token_ids) < 12
    assert [text_of(events, sequence) for sequence in (other, waiting)] == [alone[PROMPTS[1]], alone[PROMPTS[2]]]
    llm.loop.scheduler.check_integrity()


def test_one_that_waits_can_be_aborted_too(llm, sequence_of):
    sequences = [sequence_of(prompt) for prompt in PROMPTS[:3]]
    for sequence in sequences:
        llm.loop.add(sequence)
    llm.loop.abort(sequences[2].request.id, "gone")
    run(llm.loop)
    assert sequences[2].output().token_ids == [] and sequences[2].error == "gone"


def test_a_prompt_costs_nothing_before_its_turn(llm, alone, sequence_of, monkeypatch):
    """Text begins with a sequence's first token; ranks that one process launched compare no digests."""
    make, streams = Tokenizer.stream, []
    monkeypatch.setattr(Tokenizer, "stream", lambda *args: streams.append(args) or make(*args))
    sequences = [sequence_of(prompt) for prompt in PROMPTS * 5]
    for sequence in sequences:
        llm.loop.add(sequence)
    llm.loop.advance()
    assert len(streams) <= OPTIONS["max_num_seqs"] < len(sequences)
    llm.loop.abort(sequences[-1].request.id, "gone")
    run(llm.loop)
    assert len(streams) <= len(sequences)
    monkeypatch.setattr("penstock.engine.llm.digest", lambda _: pytest.fail("a digest that nobody compares"))
    assert llm.generate(PROMPTS[0], PARAMS)[0].outputs[0].text == alone[PROMPTS[0]]


def test_what_can_never_run_is_refused_or_an_event(llm, sequence_of, monkeypatch):
    with pytest.raises(ValueError, match="^prompt 0: has"):
        sequence_of("Return the " * 40)
    sequence = sequence_of("def")
    monkeypatch.setattr(limits, "most_pages", lambda *request: 10**6)
    llm.loop.add(sequence)
    (event,) = llm.loop.advance()
    assert event.is_last and "need 1000000 pages" in sequence.error and not llm.loop.has_unfinished


def test_a_call_beside_the_loop_is_refused(llm, alone, sequence_of):
    sequence = sequence_of(PROMPTS[0])
    llm.loop.add(sequence)
    with pytest.raises(RuntimeError, match="have not ended"):
        llm.generate(PROMPTS[1], PARAMS)
    assert text_of(run(llm.loop), sequence) == alone[PROMPTS[0]]
    assert llm.generate(PROMPTS[1], PARAMS)[0].outputs[0].text == alone[PROMPTS[1]]


@pytest.mark.timeout(120)
def test_an_error_in_a_pass_of_several_ranks_ends_the_engine():
    """The other rank waits in the sum that this one never reaches; nothing may be sent to it as if it did not."""

    def interrupt(instruction, ctx, run):
        if str(instruction) == "attn_allreduce":
            raise KeyboardInterrupt
        run()

    with LLM("demo", tensor_parallel_size=2, **OPTIONS) as llm:
        llm.loop.add(llm.sequences(PROMPTS[0], PARAMS)[0])
        with llm.engine.watched_by(Around(interrupt)), pytest.raises(KeyboardInterrupt):
            run(llm.loop)
        with pytest.raises(RuntimeError, match="this engine has ended"):
            llm.loop.advance()


def test_sequences_come_from_other_threads_while_passes_run(llm, alone, sequence_of):
    sequences, told = [sequence_of(prompt) for prompt in PROMPTS * 3], []

    def add_all(mine: list[Sequence]) -> None:
        for sequence in mine:
            llm.loop.add(sequence)

    threads = [threading.Thread(target=add_all, args=(sequences[index::3],)) for index in range(3)]
    for thread in threads:
        thread.start()
    while len([event for event in told if event.is_last]) < len(sequences):
        told += llm.loop.advance()
    assert [text_of(told, sequence) for sequence in sequences] == list(alone.values()) * 3


def test_an_error_in_a_pass_ends_all_and_leaves_the_loop_usable(llm, alone, sequence_of, monkeypatch):
    llm.loop.add(sequence_of(PROMPTS[0]))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(llm.loop.scheduler, "update", lambda *_: 1 / 0)
        run(llm.loop)
    assert not llm.loop.has_unfinished
    again = sequence_of(PROMPTS[0])
    llm.loop.add(again)
    assert text_of(run(llm.loop), again) == alone[PROMPTS[0]]


def test_an_abort_counts_for_the_pass_that_is_announced():
    """It comes while the pass before is under way: the announced one, which nobody needs any more, never runs."""
    with LLM("demo", **OPTIONS, **PREPARED) as llm:
        (sequence,) = llm.sequences(PROMPTS[0], PARAMS)
        engine = BusyEngine(llm.engine, lambda: loop.abort(sequence.request.id, "gone"))
        loop = Loop(llm.loop.scheduler, engine)
        loop.add(sequence)
        run(loop)
        assert (engine.num_announced, engine.num_run) == (1, 0)
        assert sequence.error == "gone" and llm.engine.times.num_passes == 1


def test_an_arrival_enters_the_pass_that_was_announced(alone):
    """It comes while the pass before is under way: the announced one runs with both."""
    with LLM("demo", **OPTIONS, **PREPARED) as llm:
        (first,), (late,) = (llm.sequences(prompt, PARAMS) for prompt in PROMPTS[:2])
        num_rows = []

        def add_late():
            if len(num_rows) == 1:
                loop.add(late)

        loop = Loop(llm.loop.scheduler, BusyEngine(llm.engine, add_late))
        loop.add(first)
        with llm.engine.watched_by(BeginPass(lambda batch: num_rows.append(len(batch.rows)))):
            events = run(loop)
        assert num_rows[:2] == [1, 2]
        assert [text_of(events, one) for one in (first, late)] == [alone[prompt] for prompt in PROMPTS[:2]]


def test_one_that_waits_takes_a_place_in_the_pass_that_was_announced(alone):
    """Another one, which would have been in it, ends while the pass before is under way."""
    with LLM("demo", **OPTIONS, **PREPARED) as llm:
        first, other, waiting = (llm.sequences(prompt, PARAMS)[0] for prompt in PROMPTS[:3])
        rows = []

        def end_first():
            if len(rows) == 2:
                loop.abort(first.request.id, "gone")

        loop = Loop(llm.loop.scheduler, BusyEngine(llm.engine, end_first))
        for sequence in (first, other, waiting):
            loop.add(sequence)
        with llm.engine.watched_by(BeginPass(lambda batch: rows.append([len(row.tokens) for row in batch.rows]))):
            events = run(loop)
        assert rows[1:4] == [[1, 1], [1, len(waiting.request.prompt_token_ids)], [1, 1]]
        assert [text_of(events, one) for one in (other, waiting)] == [alone[prompt] for prompt in PROMPTS[1:3]]


def test_a_pass_that_was_announced_is_bound_while_the_one_before_runs(alone, monkeypatch):
    """Binds each pass once, and before the tokens of the one before it are there, which it reads on the device."""
    done = []
    with LLM("demo", **OPTIONS | PREPARED) as llm:
        runner, bind = llm.engine.worker.runner, Binder.bind
        collect = runner.collect

        def binds(binder, batch):
            done.append("bind")
            return bind(binder, batch)

        def collects(expected_s):
            done.append("collect")
            return collect(expected_s)

        monkeypatch.setattr(Binder, "bind", binds)
        monkeypatch.setattr(runner, "collect", collects)
        assert [one.outputs[0].text for one in llm.generate(PROMPTS[:2], PARAMS)] == list(alone.values())[:2]
        num_passes = llm.engine.worker.executor.counters.num_passes
    assert done == ["bind"] * 2 + ["collect", "bind"] * (num_passes - 2) + ["collect"] * 2


@pytest.mark.parametrize("options", [PREPARED, {"debug": {"lookahead": 1}}], ids=["announced", "submitted"])
def test_text_is_made_while_the_next_pass_runs(options, monkeypatch):
    done = []

    def note(owner: object, name: str, what: str) -> None:
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: done.append(what) or call(*args))

    with LLM("demo", **OPTIONS | options) as llm:
        note(llm.engine, "submit", "pass")
        note(llm.engine, "run_announced", "pass")
        note(Sequence, "push", "text")
        (output,) = llm.generate(PROMPTS[0], PARAMS)
    num_tokens = len(output.outputs[0].token_ids)
    assert done == ["pass"] + ["pass", "text"] * (num_tokens - 1) + ["text"]


def test_who_comes_while_the_loop_rests_enters_the_pass_that_it_seals_then(alone):
    """Only a loop that hears of others rests: right before it reads the inbox."""
    rows, came = [], []
    with LLM("demo", **OPTIONS | {"debug": {"lookahead": 1}}) as llm:
        first, second = (llm.sequences(prompt, PARAMS)[0] for prompt in PROMPTS[:2])
        engine = RestingEngine(llm.engine, lambda: came.append(second) if len(rows) == 2 else None)
        loop = Loop(llm.loop.scheduler, engine)
        loop.add(first)
        with llm.engine.watched_by(BeginPass(lambda batch: rows.append(len(batch.rows)))):
            events = loop.advance() + loop.advance()
            assert rows == [1, 1] and engine.num_rests == 0
            loop.hear(lambda: [loop.add(came.pop()) for _ in list(came)])
            events += run(loop)
        assert rows[2] == 2 and engine.num_rests > 0
        assert [text_of(events, one) for one in (first, second)] == [alone[prompt] for prompt in PROMPTS[:2]]
