"""The pair of sockets between front and engine: messages come as they were sent, in order, and no side waits for the
other one; and in which order clients hear what they say."""

import math
import socket
import threading

import pytest
from penstock.engine.output import Sequence
from penstock.engine.runtime.pass_times import Timed
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
    timed = Timed(PassShape(5, 2, 7, None, 3, 0), 0.1, PassTime(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, "link", 8.0), 0.2)
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


def test_rows_that_began_in_a_pass_are_told_first():
    """They are its last ones; clients are served in the order in which they are told."""
    engine, told = RemoteEngine(Metrics()), []
    engine._send = lambda message: None
    for number in range(3):
        sequence = Sequence(Request(number, [1, 2], SamplingParams(max_tokens=9)), 0, None, {})
        outbox = Outbox([sequence], 1)
        outbox.put = lambda piece, number=number: told.append((number, piece.text))
        engine.add(outbox)
    state = list(EngineState())
    engine._hear_outputs(Outputs([0, 1, 2], [1, 1, 1], [5, 5, 5], ["a", "b", "c"], [], [], [], None, state))
    assert told == [(2, "c"), (1, "b"), (0, "a")]
