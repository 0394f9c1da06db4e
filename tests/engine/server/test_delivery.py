"""Clients that go away, read slowly or not at all; and what the others notice of them, which is nothing."""

import asyncio
import json

import pytest
from penstock.engine.output import Logprob
from penstock.engine.server import delivery
from penstock.engine.server.outbox import LATE, LATE_EACH, Finish, Outbox, Piece
from penstock.engine.server.sse import KEEP_ALIVE

from tests.support.serving import Client, chunks_of, until
from tests.support.watches import After, BeginPass

PATH = "/v1/completions"
LONG = {"prompt": "Return the number of", "temperature": 0, "max_tokens": 100, "ignore_eos": True}


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("num_passes", [0, 3], ids=["before-a-token", "after-some"])
def test_who_goes_away_leaves_nothing_within_two_passes(served, monkeypatch, streams, num_passes):
    loop, times = served.llm.loop, served.llm.engine.times
    num_disconnects, begin, left_at = served.kept.num_disconnects, times.num_passes, []
    receive = loop._receive

    async def turns() -> None:
        for _ in range(100):
            await asyncio.sleep(0)

    def receive_later() -> None:
        if left_at:
            served.run(turns())  # on a busy machine whole answers would pass before the event loop is first
        receive()

    monkeypatch.setattr(loop, "_receive", receive_later)

    def leaves(client: Client) -> bool:
        if served.service.engine.num_unfinished and times.num_passes >= begin + num_passes:
            left_at.append(times.num_passes)
        return bool(left_at)

    num_records = len(served.kept.records)
    client = served.abandoned(PATH, leaves, stream=streams, **LONG)
    until(served.at_rest)
    until(lambda: len(served.kept.records) > num_records)
    assert times.num_passes - left_at[0] <= 3  # two, and the one under way when it was seen
    assert served.kept.num_disconnects == num_disconnects + 1
    assert (client.status, client.text == "") == ((200, False) if streams else (None, True)) or num_passes == 0
    record = served.kept.records[-1]
    assert (record["error"], record["finish_reasons"]) == ("client_disconnected", ["abort"])
    assert record["completion_tokens"] < 100 and "Return" not in json.dumps(record)


def test_all_sequences_of_who_goes_away_end_together(served):
    begin, num_records = served.llm.engine.times.num_passes, len(served.kept.records)
    served.abandoned(
        PATH, lambda _: served.llm.engine.times.num_passes > begin + 2, **LONG | {"n": 6, "temperature": 1}
    )
    until(served.at_rest)
    until(lambda: len(served.kept.records) > num_records)  # which is written behind it
    assert served.kept.records[-1]["finish_reasons"] == ["abort"] * 6


def test_a_slow_reader_gets_everything_and_holds_up_nobody(served):
    """It takes nothing until the other one, which came after it, has its whole answer."""
    may_take = asyncio.Event()

    async def ask_both():
        slow = Client(PATH, LONG | {"stream": True}, takes=may_take.wait)
        slow_asks = asyncio.create_task(slow.ask(served.app))
        quick = await Client(PATH, LONG | {"stream": True, "max_tokens": 104}).ask(served.app)
        assert not slow.bodies
        while served.service.engine.num_unfinished:
            await asyncio.sleep(0.001)
        may_take.set()
        await slow_asks
        return chunks_of(slow.text), chunks_of(quick.text)

    slow, quick = served.run(ask_both())
    texts = ["".join(chunk["choices"][0]["text"] for chunk in chunks) for chunks in (slow, quick)]
    assert texts[1].startswith(texts[0]) and len(quick) == 104
    assert LATE <= len(slow) < 100  # what came late was joined
    assert slow[-1]["choices"][0]["finish_reason"] == "length"


def test_silence_is_filled_with_comments(served, monkeypatch):
    """A pass takes as long as it takes for three of them to come."""
    monkeypatch.setattr(delivery, "QUIET_S", 0.01)
    client = Client(PATH, LONG | {"stream": True, "max_tokens": 3})
    hold = BeginPass(lambda batch: until(lambda: client.text.count(": keep-alive") >= 3))
    with served.llm.engine.watched_by(hold):
        served.run(client.ask(served.app))
    comment = KEEP_ALIVE.decode()
    assert client.text.startswith(comment) and len(chunks_of(client.text.replace(comment, ""))) == 3


def test_a_row_that_fails_ends_its_client_alone(served):
    """In the middle of a stream, and of an answer that is not streamed; the third does not notice."""
    poisoned = {"prompt": "class", "temperature": 0, "max_tokens": 100, "ignore_eos": True}
    num_tokens = 4

    def poison(instruction, ctx) -> None:
        if getattr(instruction, "step", None) != "logits_gather":
            return
        for sequence in list(served.llm.loop._sequences.values()):
            request = sequence.request
            if len(request.output_token_ids) == num_tokens and request.params.max_tokens == 100 and ctx is not None:
                ctx.act["logits"][rows.index(request.row)] = float("nan")

    rows: list[int] = []
    begin = BeginPass(lambda batch: rows.__setitem__(slice(None), [row.index for row in batch.rows if row.samples]))

    async def ask_all():
        fine = LONG | {"max_tokens": 12}
        bodies = [poisoned | {"stream": True}, poisoned, fine]
        return await asyncio.gather(*(Client(PATH, body).ask(served.app) for body in bodies))

    expected = served.answer(PATH, **LONG | {"max_tokens": 12})["choices"]
    with served.llm.engine.watched_by(begin), served.llm.engine.watched_by(After(poison)):
        streamed, whole, fine = served.run(ask_all())
    *chunks, error = [json.loads(event[6:]) for event in streamed.text.split("\n\n")[:-1]]
    assert len(chunks) == num_tokens and "NaN" in error["error"]["message"] and "[DONE]" not in streamed.text
    assert whole.status == 500 and "NaN" in json.loads(whole.text)["error"]["message"]
    assert json.loads(fine.text)["choices"] == expected
    assert served.service.phase == "ready" and served.answer(PATH, prompt="class", max_tokens=3)


def piece(choice: int, text: str, num_tokens: int, finish: Finish | None = None) -> Piece:
    return Piece(choice, [text], [{1: Logprob(-1.0, 1, text)}], num_tokens, finish)


def test_an_outbox_joins_what_comes_late_and_keeps_its_order():
    async def fill() -> Outbox:
        outbox = Outbox([None, None], n=2)
        for token in range(1, 1001):
            for choice in (0, 1):
                outbox.put(piece(choice, f"{choice}.{token} ", token, Finish("stop") if token == 1000 else None))
        return outbox

    outbox = asyncio.run(fill())
    pieces, most = outbox.take(), LATE + 2 * LATE_EACH
    assert outbox.has_ended and len(pieces) == most and outbox.take() == []
    for choice in (0, 1):
        mine = [each for each in pieces if each.choice == choice]
        assert "".join(each.text for each in mine) == "".join(f"{choice}.{token} " for token in range(1, 1001))
        assert sum(len(each.logprobs) for each in mine) == 1000
        assert [each.num_tokens for each in mine][-2:] == [most // 2 - 1, 1000] and mine[-1].finish.reason == "stop"
