"""The host side against device sides that do what they should not: it fails with one line and leaves nothing behind."""

import gc
import re
import sys
import time
from typing import NamedTuple

import pytest
import torch
from penstock.engine.commands.cli import main
from penstock.engine.config import EngineConfig
from penstock.engine.split import device_process
from penstock.engine.split.channel import DeviceSideFailed, Subprocess, _check_values
from penstock.engine.split.deadline import call_s, load_s
from penstock.engine.split.llm import SplitLLM
from penstock.engine.split.transfers import SplitConfig
from penstock.parallel.ledger import Site
from penstock.scheduler.batching.request import SamplingParams

from tests.support.commands import is_alive
from tests.support.held import assert_no_more_than, held

# A peer has `connection`, frames, and the answer to the call of the tests below.
PRELUDE = r"""
import json, math, os, signal, socket, struct, subprocess, sys, time
told = json.loads(sys.stdin.readline())
connection = socket.socket(fileno=told["socket"])
F32, BF16, I64, U8 = range(4)

def frame(name, layer, number, tensors, data=b""):
    packed = struct.pack("<IBhB", number, len(name), layer, len(tensors)) + name
    for dtype, dims in tensors:
        packed += struct.pack("<BB", dtype, len(dims)) + struct.pack(f"<{len(dims)}I", *dims)
    return packed + data

def take(size):
    return size and connection.recv(size, socket.MSG_WAITALL)

def call():
    "The number of the next call, with its tensor."
    number, name, layer, tensors = struct.unpack("<IBhB", take(8))
    take(name)
    dtype, dims = struct.unpack("<BB", take(2))
    take(4 * math.prod(struct.unpack(f"<{dims}I", take(4 * dims))))
    return number

def answer(number, name=b"attn_output", layer=0, tensors=((F32, (2, 256)),), value=1.0):
    return frame(name, layer, number, tensors, struct.pack("<f", value) * 512)

def ready():
    connection.sendall(frame(b"ready", -1, 0, ()))

def text(content):
    ready()
    connection.sendall(frame(b"failed", 0, call(), ((U8, (len(content),)),), content))

def trickle(content):
    try:
        for index in range(len(content)):
            connection.sendall(content[index : index + 1])
            time.sleep(0.05)
    except OSError:  # nobody listens any more
        time.sleep(1000)
"""
SLEEP = "time.sleep(1000)"
ANSWER = "ready(); connection.sendall({}); " + SLEEP
SOON_S = 0.2
LATE = r"has not answered Site\(.*attn_output.*\) after [\d.]+ s \(timeout_s=0\.2, and [\d.]+ s for the work of this"
NOT_READY = r"is not ready after 0\.2 s \(timeout_s=0\.2, and 0 s for 0 bytes of weights at 20 MB/s\)"
OTHER = r"answered Header\(.* where Header\(.*attn_output.* was asked for"
TEXT = r"failed at Site\(operation='attn_output', layer_idx=0\): '"


class Peer(NamedTuple):
    does: str
    message: str
    timeout_s: float = 300.0  # only of those that are to meet it
    num_answered: int = 0  # calls that succeed before
    num_rows: int = 2


PEERS = {
    "silent from the start": Peer(SLEEP, NOT_READY, SOON_S),
    "trickles that it is ready": Peer("trickle(frame(b'r' * 200, -1, 0, ()))", NOT_READY, SOON_S),
    "silent when called": Peer(f"ready(); {SLEEP}", LATE, SOON_S),
    "trickles its answer": Peer("ready(); trickle(answer(call()))", LATE, SOON_S),
    "half an answer, then silent": Peer(ANSWER.format("answer(call())[:1000]"), LATE, SOON_S),
    "half a header, then silent": Peer(ANSWER.format("answer(call())[:9]"), LATE, SOON_S),
    "takes nothing": Peer(f"ready(); {SLEEP}", LATE, SOON_S, num_rows=512),
    "ends at once": Peer("sys.exit(3)", r"is gone \(exit code 3\)"),
    "ends when called": Peer("ready(); call(); sys.exit(0)", r"is gone \(exit code 0\)"),
    "is killed": Peer("ready(); os.kill(os.getpid(), 9)", r"is gone \(exit code -9\)"),
    "ends with a word": Peer(
        r"sys.stderr.write('a' * 10**6 + '\nbad \x1b[31m' + 'x' * 3000 + '\n\n'); sys.exit(1)",
        r"is gone \(exit code 1, its last words: 'x{200}'\.\.\. \(\d+ characters\)\)",
    ),
    "closes and lives on": Peer(f"ready(); call(); connection.close(); {SLEEP}", r"is gone \(it closed the"),
    "half a header": Peer("ready(); connection.sendall(answer(call())[:9]); sys.exit(0)", r"is gone \(exit code 0\)"),
    "half an answer": Peer("ready(); connection.sendall(answer(call())[:1000]); sys.exit(9)", r"is gone \(exit code 9"),
    "not ready first": Peer(f"connection.sendall(answer(1)); {SLEEP}", r"answered Header\(.*'ready'.* was asked for"),
    "another shape": Peer(ANSWER.format("answer(call(), tensors=((F32, (512,)),))"), OTHER),
    "transposed": Peer(ANSWER.format("answer(call(), tensors=((F32, (256, 2)),))"), OTHER),
    "another dtype": Peer(ANSWER.format("answer(call(), tensors=((BF16, (2, 256)),))"), OTHER),
    "integers": Peer(ANSWER.format("answer(call(), tensors=((I64, (2, 256)),))"), OTHER),
    "no dtype": Peer(ANSWER.format("answer(call(), tensors=((255, (2, 256)),))"), "answered a frame with dtype 255"),
    "two tensors": Peer(ANSWER.format("answer(call(), tensors=((F32, (2, 256)),) * 2)"), OTHER),
    "no tensor": Peer(ANSWER.format("answer(call(), tensors=())"), OTHER),
    "NaN": Peer(ANSWER.format("answer(call(), value=math.nan)"), r"answered Site\(.*attn_output.* with NaN or"),
    "infinity": Peer(ANSWER.format("answer(call(), value=math.inf)"), r"answered Site\(.* with NaN or infinity"),
    "minus infinity": Peer(ANSWER.format("answer(call(), value=-math.inf)"), r"answered Site\(.* with NaN or infinity"),
    "a huge length": Peer(ANSWER.format("answer(call(), tensors=((F32, (2**32 - 1, 2**32 - 1)),))"), OTHER),
    "a negative length": Peer(ANSWER.format("answer(call(), tensors=((F32, (2, 2**32 - 256)),))"), OTHER),
    "a long header": Peer(ANSWER.format("answer(call(), b'x' * 255, 0, ((F32, (2**32 - 1,) * 255),) * 255)"), OTHER),
    "garbage": Peer(ANSWER.format(r"b'\x9c\x1b[2J' * 5000"), "answered (Header|.* can't decode|a frame with dtype)"),
    "a name in other letters": Peer(ANSWER.format(r"answer(call(), name=b'\x1b[31m\xff')"), "answered .* can't decode"),
    "a name with escapes": Peer(ANSWER.format(r"answer(call(), name=b'\x1b[31m\n')"), r"answered .*\\x1b\[31m\\n"),
    "the answer to another call": Peer(ANSWER.format("answer(call(), layer=1)"), OTHER),
    "an older answer": Peer(ANSWER.format("answer(call() - 1)"), OTHER),
    "an answer twice": Peer(ANSWER.format("answer(call()) * 2"), OTHER, num_answered=1),
    "bytes after its answer": Peer(
        ANSWER.format(r"answer(call()) + b'\xfe' * 5000"), "answered .* can't decode", num_answered=1
    ),
    "an error": Peer(r"text(b'ValueError(1)')", TEXT + r"ValueError\(1\)'$"),
    "a text of 64 KiB with escapes": Peer(r"text(b'\x1b]0;x\x07\n' * 8192)", TEXT + r"(\\x1b\]0;x\\x07\\n)+.*\(57344 "),
    "a text that is too long": Peer("text(b'x' * 65537)", r"answered .*failed.* where .* was asked for"),
    "a text of 2**64 bytes": Peer(ANSWER.format("frame(b'failed', 0, call(), ((U8, (2**31, 2**31, 4)),))"), OTHER),
    "an empty text": Peer("text(b'')", r"answered .*failed.* where .* was asked for"),
    "its environment": Peer("text(' '.join(sorted(os.environ)).encode())", TEXT + r"[A-Z_ ]*PATH PYTHONPATH'$"),
}  # fmt: skip


def use(monkeypatch, does: str) -> None:
    monkeypatch.setattr(device_process, "DEVICE_COMMAND", (sys.executable, "-I", "-S", "-c", PRELUDE + does))


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_does_something_else_ends_with_one_line(name, monkeypatch):
    peer = PEERS[name]
    use(monkeypatch, peer.does)
    monkeypatch.setenv("SECRET_TOKEN", "of the host side's")
    if "closes and lives on" in name:
        monkeypatch.setattr(device_process, "CLOSE_S", 0.1)
    before, x, out = held(), torch.ones(peer.num_rows, 256), torch.full((peer.num_rows, 256), 7.0)
    channel, start = Subprocess(EngineConfig("demo"), torch.float32, 300, 0), time.monotonic()
    if peer.message == LATE:
        channel._await_ready()  # for that it has its time, on any machine
    channel._timeout_s = peer.timeout_s
    for _ in range(peer.num_answered):
        channel.call(Site("attn_output", 0), [x], out)
    expected = out.clone()
    with pytest.raises(DeviceSideFailed, match=f"^the device side {peer.message}") as failed:
        channel.call(Site("attn_output", 0), [x], out)
    assert (peer.timeout_s == SOON_S) == ("timeout_s" in str(failed.value)) and time.monotonic() - start < 200
    assert str(failed.value).isascii() and str(failed.value).isprintable() and len(str(failed.value)) < 800
    assert channel._process.process.returncode is not None, "it is gone before its channel is closed"
    with pytest.raises(DeviceSideFailed, match=re.escape(f"the device side is gone: {failed.value}")):
        channel.call(Site("attn_output", 0), [x], out)
    channel.close()
    assert torch.equal(out, expected) and channel.ledger.total.num_calls == peer.num_answered
    assert_no_more_than(before)


def test_values_that_are_odd_but_finite_are_taken(monkeypatch):
    use(monkeypatch, "ready(); [connection.sendall(answer(call(), value=value)) for value in (-0.0, 1e-45, -3e38)]")
    channel, out = Subprocess(EngineConfig("demo"), torch.float32, 300, 0), torch.empty(2, 256)
    for value in (-0.0, 1e-45, -3e38):
        channel.call(Site("attn_output", 0), [torch.ones(2, 256)], out)
        assert torch.equal(out, torch.full_like(out, value)) and (out.signbit() == (value <= 0)).all()
    channel.close()


def test_what_it_has_started_ends_with_it(tmp_path, monkeypatch):
    """Lets a device side write much before it ends: its output blocks nobody and is not shown."""
    loud = "sys.stderr.write('x' * 10**7); sys.stdout.write('x' * 10**7); sys.stdout.flush()"
    child = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(subprocess.Popen(['sleep', '1000']).pid))"
    use(monkeypatch, f"{loud}; {child}; ready(); connection.sendall(answer(call())); call(); sys.exit(0)")
    channel, out = Subprocess(EngineConfig("demo"), torch.float32, 300, 0), torch.empty(2, 256)
    channel.call(Site("attn_output", 0), [torch.ones(2, 256)], out)
    pid = int((tmp_path / "pid").read_text())
    assert is_alive(pid) and (out == 1).all()
    with pytest.raises(DeviceSideFailed, match=r"is gone \(exit code 0"):
        channel.call(Site("attn_output", 0), [torch.ones(2, 256)], out)
    while is_alive(pid):
        time.sleep(0.02)
    channel.close()


def test_the_host_side_outlives_a_device_side_that_fails(monkeypatch, capfd):
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with SplitLLM("demo") as llm:
        expected = llm.generate("Return the", params)
    with monkeypatch.context() as patch:
        use(patch, f"ready(); call(); connection.sendall(answer(1, b'head')); {SLEEP}")
        with SplitLLM("demo", SplitConfig(process=True, timeout_s=300)) as llm:
            for message in ("answered Header", "is gone: .*answered Header"):
                with pytest.raises(DeviceSideFailed, match=f"the device side {message}"):
                    llm.generate("Return the", params)
        capfd.readouterr()
        assert main(["split", "--process", "--prompt", "Return the", "--timeout-s", "300"]) == 1
        captured = capfd.readouterr()
        (line,) = (line for line in captured.err.splitlines() if "loading:" not in line and line.strip())
        assert line.startswith("penstock: error: the device side answered Header")
    with SplitLLM("demo", SplitConfig(process=True)) as llm:
        assert llm.generate("Return the", params) == expected


def test_an_error_of_the_device_side_is_told_and_ends_it():
    with SplitLLM("demo", SplitConfig(process=True)) as llm:
        channel, x, out = llm.engine.worker.channel, torch.ones(2, 256), torch.empty(2, 256)
        x[0] = torch.nan  # the row's own, from before
        channel.call(Site("attn_output", 0), [x], out)
        assert out[0].isnan().all() and out[1].isfinite().all()
        with pytest.raises(RuntimeError, match=r"failed at .*nonsense.*no operation"):
            channel.call(Site("nonsense", 0), [x], out)
        with pytest.raises(RuntimeError, match="the device side is gone"):
            channel.call(Site("attn_output", 0), [x], out)
        assert channel.ledger.total.num_calls == 1


def test_values_are_checked_by_row_and_in_attention_as_one():
    """An answer is as finite as what was sent."""
    well, first, second = torch.ones(3, 2, 3)
    first[0, 1], second[1, 2] = torch.nan, torch.inf
    linear, attention, embedding = Site("ffn_up", 0), Site("attention", 0), Site("embedding", -1)
    _check_values(linear, [second], second)
    _check_values(attention, [well, second, well], first)
    for site, sent in (
        (linear, [well]),
        (linear, [first]),
        (attention, [well, well, well]),
        (embedding, [torch.ones(2, dtype=torch.int64)]),
    ):
        with pytest.raises(DeviceSideFailed, match="with NaN or infinity$"):
            _check_values(site, sent, second)


def test_what_it_cannot_load_is_among_its_last_words(monkeypatch):
    config = EngineConfig("demo", load_format="dummy")
    monkeypatch.setattr(device_process, "PASSED", (*device_process.PASSED, "PENSTOCK_NO_SUCH"))
    monkeypatch.setenv("PENSTOCK_NO_SUCH", "1")
    channel = Subprocess(config, torch.float32, 300, 0)
    with pytest.raises(
        DeviceSideFailed, match=r"is gone \(exit code 2, its last words: 'penstock: error: environment var"
    ):
        channel.call(Site("attn_output", 0), [torch.ones(2, 256)], torch.empty(2, 256))
    channel.close()


def test_a_limit_follows_from_the_work():
    x, weights = torch.empty(4, 256), torch.empty(4, 1024)
    assert call_s([x], weights) == pytest.approx(4 * (256 + 1024) * 4 / 10e6 + 4 * 256 * 1024 / 1e8)
    q, kv, out = torch.empty(3, 8, 16), torch.empty(5000, 2, 16), torch.empty(3, 8, 16)
    moved = 4 * (2 * 3 * 8 * 16 + 2 * 5000 * 2 * 16)
    assert call_s([q, kv, kv], out) == pytest.approx(moved / 10e6 + 3 * 8 * 16 * 5000 / 1e8), "not by the head's width"
    assert load_s(140 * 10**9) == 7000


def test_it_ends_when_nobody_holds_its_channel(monkeypatch):
    use(monkeypatch, f"ready(); {SLEEP}")
    channel = Subprocess(EngineConfig("demo"), torch.float32, 300, 0)
    channel._await_ready()
    pid = channel._process.process.pid
    assert is_alive(pid)
    del channel
    gc.collect()
    while is_alive(pid):
        time.sleep(0.02)
