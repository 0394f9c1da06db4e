"""The pair of sockets between front and engine: messages come as they were sent, in order, and no side waits for the
other one; and in which order clients hear what they say."""

import math
import socket
import threading
from types import SimpleNamespace

import pytest
from penstock.engine.output import Sequence
from penstock.engine.runtime.pass_times import Timed
from penstock.engine.server import remote_engine
from penstock.engine.server.channel import Channel
from penstock.engine.server.engine_state import EngineState, pass_heard, pass_told
from penstock.engine.server.messages import Abort, Add, Dead, Loading, Outputs, Ready, Scores, Stop, of_line, to_line
from penstock.engine.server.metrics import Metrics
from penstock.engine.server.outbox import Outbox
from penstock.engine.server.remote_engine import RemoteEngine
from penstock.scheduler.batching.request import FinishReason, Request, SamplingParams
from penstock.scheduler.cost.pass_work import PassShape
from penstock.scheduler.cost.time_model import PassTime

TEXTS = ["", "a\nb", "\0", "\U0001f600", "\ud83d", '"', "\u2028"]
OUTPUTS = Outputs(
    ids=[1, 2], counts=[3, 1], tokens=[5, 0], texts=TEXTS[:2], logprobs=[(1, [[5, -math.inf, 1, "x"]])],
    ends=[(2, FinishReason.STOP, "end", None)], rows=[(1, 16)], passed=None,
    state=[1, 2, None],
)  # fmt: skip
MESSAGES = [
    Add([7, 8], [[1, 2], [3]], {"n": 1, "stop": TEXTS, "seed": 2**64 - 1, "temperature": 0.1}),
    Abort([7], "the client has gone"),
    Stop(),
    Loading({"part": "loading", "loaded_bytes": 2**40}),
    Ready({"shown": {"model": {}}}, [0]),
    Scores(2, "AAAAvwIAAAA="),
    OUTPUTS,
    Dead(),
]


@pytest.fixture
def ends():
    ours, theirs = map(Channel, socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


def plain(value):
    """Tuples as the lists that they become; texts of enums as texts."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, str) else value


def receive_until(channel: Channel, number: int) -> list:
    found = []
    while len(found) < number:
        channel.wait()
        found += channel.receive()
    return found


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_as_it_was_sent(message):
    line = to_line(message)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    heard = of_line(line[:-1])
    assert type(heard) is type(message) and plain(heard) == plain(message)


def test_a_pass_comes_as_it_was_told():
    shape, predicted = PassShape(5, 2, 7, None, 3, 0, 0, 1), PassTime(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, "link", 8.0)
    timed = Timed(shape, 0.1, predicted, 0.2)
    message = of_line(to_line(OUTPUTS._replace(passed=pass_told(timed, 2)))[:-1])
    assert pass_heard(message.passed) == (timed, 2)


def test_messages_keep_their_order_and_nobody_waits_for_who_does_not_read(ends):
    """Far more than the sockets hold is sent at once, before anything is read; then in both directions."""
    ours, theirs = ends
    sent = [Abort([number], "x" * 1000) for number in range(3000)]
    for message in sent:
        theirs.send(message)
    assert theirs.has_unsent
    reader = threading.Thread(target=lambda: found.extend(receive_until(ours, len(sent))))
    found: list = []
    reader.start()
    theirs.flush(within_s=60)
    reader.join(60)
    assert found == sent and not theirs.has_unsent
    ours.send(Stop())
    assert receive_until(theirs, 1) == [Stop()] and theirs.receive() == []


def test_who_waits_sends_meanwhile_what_is_kept(ends):
    ours, theirs = ends
    sent = [Add([number], [[5] * 50_000], {}) for number in range(10)]
    for message in sent:
        theirs.send(message)
    waiting = threading.Thread(target=theirs.wait)
    waiting.start()
    assert receive_until(ours, len(sent)) == sent
    ours.send(Stop())
    waiting.join(60)
    assert theirs.receive() == [Stop()]


def test_who_waits_goes_on_once_it_is_deaf(ends):
    ours, theirs = ends
    waiting = threading.Thread(target=theirs.wait)
    waiting.start()
    theirs.deafen()
    waiting.join(60)
    assert not waiting.is_alive()
    theirs.send(Dead())
    assert receive_until(ours, 1) == [Dead()]


def test_the_end_comes_behind_all_messages(ends):
    ours, theirs = ends
    theirs.send(Stop())
    theirs.send(Dead())
    theirs.close()
    assert ours.receive() == [Stop(), Dead()]
    for _ in range(2):
        ours.wait()
        with pytest.raises(EOFError):
            ours.receive()
    ours.send(Stop())  # nobody hears it
    assert not ours.has_unsent


class Rows:
    """Rows 0, 1, ... of an engine, whose `told` has what clients get, in order; `later` what the event loop is to call
    when it has looked for requests."""

    def __init__(self, num_rows: int):
        self.engine, self.told, self.later, self.num_passes = RemoteEngine(Metrics()), [], [], 0
        self.engine._send = lambda message: None
        self.engine._loop = SimpleNamespace(call_soon=self.later.append, remove_reader=int, remove_writer=int)
        for number in range(num_rows):
            sequence = Sequence(Request(number, [1, 2], SamplingParams(max_tokens=9)), 0, None, {})
            outbox = Outbox([sequence], 1)
            outbox.put = lambda piece, number=number: self.told.append((number, piece.text))
            self.engine.add(outbox)

    def hear(self, *texts: str) -> None:
        """Hears of a pass that gave these texts."""
        self.num_passes += 1
        ids, counts = [*range(len(texts))], [self.num_passes] * len(texts)
        outputs = Outputs(ids, counts, [5] * len(texts), list(texts), [], [], [], None, list(EngineState()))
        self.engine._hear_outputs(outputs)


def test_rows_that_began_in_a_pass_are_told_first():
    """They are its last ones; clients are served in the order in which they are told."""
    rows = Rows(3)
    rows.hear("a", "b", "c")
    assert rows.told == [(2, "c"), (1, "b"), (0, "a")]


def test_the_event_loop_looks_for_requests_while_many_rows_are_told(monkeypatch):
    monkeypatch.setattr(remote_engine, "AT_ONCE", 2)
    rows = Rows(5)
    rows.hear(*"abcde")
    assert rows.told == [(4, "e"), (3, "d")]
    rows.later.pop()()
    assert rows.told[2:] == [(2, "c"), (1, "b")]
    rows.later.pop()()
    assert rows.told[4:] == [(0, "a")] and not rows.later


def test_what_a_pass_gave_is_told_before_what_the_next_one_gave(monkeypatch):
    monkeypatch.setattr(remote_engine, "AT_ONCE", 1)
    rows = Rows(3)
    rows.hear(*"abc")
    rows.hear(*"ABC")
    while rows.later:
        rows.later.pop()()
    assert rows.told == [(2, "c"), (1, "b"), (0, "a"), (2, "C"), (1, "B"), (0, "A")]


def test_what_a_pass_gave_is_told_before_the_end_of_the_engine(monkeypatch):
    monkeypatch.setattr(remote_engine, "AT_ONCE", 1)
    ours, theirs = map(Channel, socket.socketpair())
    rows = Rows(2)
    rows.engine._channel = ours
    rows.hear(*"ab")
    theirs.close()
    rows.engine._read()
    assert rows.engine.has_failed and rows.told == [(1, "b"), (0, "a"), (0, ""), (1, "")]
    ours.close()
