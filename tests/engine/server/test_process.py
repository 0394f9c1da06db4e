"""`penstock serve` as its users have it: a process, a port, signals, several ranks, and the official client."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from penstock.engine.commands import serve
from penstock.engine.commands.cli import main
from penstock.engine.config import EngineConfig
from penstock.engine.planning.find_model import find_model
from penstock.engine.server.generation_defaults import read_defaults
from penstock.engine.server.server import Server
from penstock.engine.server.signals import SIGNALS

from tests.support.commands import SLOW, TORCHRUN
from tests.support.server_process import ServerProcess, server_process
from tests.support.serving import until

HELLO = [{"role": "user", "content": "Hello"}]
LONG = {"prompt": "Return the number of", "temperature": 0, "max_tokens": 100, "extra_body": {"ignore_eos": True}}
TOLD_S = 10.0  # in which every client is answered
# While there is a file `hold` a pass does not end, and is busy in Python.
HELD = """
import os, time
def begin_pass(batch):
    time.sleep(0.05)
    while os.path.exists(folder + "/hold"):
        open(folder + "/held", "w").close()
"""
# While there is a file `hold_prompts` a pass with more of a prompt than a token does not begin, on any rank.
HELD_PROMPTS = """
import os, time
def begin_pass(batch):
    time.sleep(0.05)
    while batch and any(len(row.tokens) > 1 for row in batch.rows) and os.path.exists(folder + "/hold_prompts"):
        open(f"{folder}/held{rank}", "w").close()
        time.sleep(0.01)
"""

NOHUP = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
NOHUP += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n"
HALVES = [
    b"",
    HEAD,
    HEAD + b"Content-Length: 10\r\n\r\n{",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\n{",
    HEAD + b"X: " + b"a" * 70_000 + b"\r\n\r\n",
]


def client_of(server: ServerProcess, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-x", max_retries=0, timeout=60, **options)


class Streams:
    """Clients that read streams, in threads; `tokens` counts what came, `errors` what the SDK raised, `s` when."""

    def __init__(self, client: openai.OpenAI, number: int, **body):
        self.client, self.body = client, LONG | body
        self.tokens, self.errors, self.ended_s = [0] * number, [None] * number, [0.0] * number
        self.threads = [threading.Thread(target=self._read, args=(index,), daemon=True) for index in range(number)]
        for thread in self.threads:
            thread.start()

    def _read(self, index: int) -> None:
        try:
            for _ in self.client.completions.create(model="demo", stream=True, **self.body):
                self.tokens[index] += 1
        except openai.OpenAIError as error:
            self.errors[index] = error
        self.ended_s[index] = time.monotonic()

    def wait_for_tokens(self) -> None:
        until(lambda: all(self.tokens))

    def join(self) -> None:
        for thread in self.threads:
            thread.join(60)


@pytest.mark.alone
def test_the_official_client_gets_what_it_expects_and_a_signal_drains(tmp_path):
    with server_process(tmp_path, "--served-model-name", "org/demo,demo", in_passes=HELD) as server:
        client = client_of(server)
        assert [model.id for model in client.models.list()] == ["org/demo", "demo"]
        server.wait_ready()
        start = httpx.get(f"{server.url}/status").json()["progress"]
        assert start["part"] == "done" and start["loaded_bytes"] == start["total_bytes"] > 0
        assert client.models.retrieve("org/demo").root == "org/demo"
        check_client(client)
        check_connection_is_kept(server)
        with pytest.raises(openai.APIStatusError) as raised:
            client.completions.create(model="demo", prompt="a", extra_body={"min_tokens": 3})
        assert (raised.value.status_code, raised.value.param) == (400, "min_tokens")
        with pytest.raises(openai.NotFoundError, match="is not served"):
            client.completions.create(model="gpt-4", prompt="a")
        streams = Streams(client, 2, max_tokens=30)
        streams.wait_for_tokens()
        (tmp_path / "hold").touch()  # as long as it drains
        server.signal()
        until(lambda: server.health() == 503)
        with pytest.raises(openai.InternalServerError) as raised:
            client.completions.create(**LONG, model="demo")
        assert raised.value.code == "shutting_down"
        (tmp_path / "hold").unlink()
        streams.join()
        assert streams.errors == [None, None] and streams.tokens == [30, 30]
        assert server.exit_code() == 0
        assert "Return the" not in server.text and "Traceback" not in server.text, server.text


def check_connection_is_kept(server: ServerProcess) -> None:
    """Streams of one client come by one connection, one after another."""
    connections = set()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for _ in range(3):
            body = {"prompt": "a", "max_tokens": 2, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as response:
                connections.add(response.extensions["network_stream"].get_extra_info("client_addr"))
                assert "data: [DONE]" in response.read().decode()
    assert len(connections) == 1


def check_client(client: openai.OpenAI) -> None:
    """Asks in the ways that applications do."""
    asked = {"model": "demo", "messages": HELLO, "max_tokens": 4}
    chat = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, n=2)
    assert len(chat.choices) == 2 and chat.choices[0].message.role == "assistant"
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
    options = {"include_usage": True}
    *chunks, last = client.chat.completions.create(
        **asked, stream=True, stream_options=options, extra_body={"ignore_eos": True}
    )
    assert len(chunks) == 1 + last.usage.completion_tokens and last.choices == []
    whole = client.completions.create(model="demo", prompt=["def", "class"], max_tokens=3, logprobs=1, echo=False)
    assert [choice.index for choice in whole.choices] == [0, 1]
    with client.chat.completions.stream(model="demo", messages=HELLO, max_completion_tokens=100) as stream:
        kinds = [next(iter(stream)).type]  # and goes away
    assert kinds == ["chunk"]


@pytest.mark.alone
def test_a_second_signal_ends_what_is_under_way(tmp_path):
    """Before that, half a head, half a body and a head that is too large are ended, and others answered meanwhile."""
    settings = "from penstock.engine.server import access, connection\n"
    settings += "access.BODY_S = connection.HEAD_S = connection.KEEP_ALIVE_S = 1.0\n"
    with server_process(tmp_path, "--api-key", "secret", in_passes=SLOW, in_front=settings) as server:
        refused = httpx.get(f"{server.url}/v1/models")
        assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        server.wait_ready()
        answers = list(map(functools.partial(answer_to, server), HALVES))
        assert answers[:2] == [b"", b""] and all(answer.startswith(b"HTTP/1.1 400") for answer in answers[2:])
        for text in HALVES:  # and who leaves in the middle of it
            connect_to(server, text).close()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
        streams = Streams(client, 2, max_tokens=250)
        streams.wait_for_tokens()
        server.signal(signal.SIGINT)
        until(lambda: server.health() == 503)
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
        streams.join()
        assert [error.code for error in streams.errors] == ["shutting_down"] * 2
        assert "Traceback" not in server.text, server.text


def connect_to(server: ServerProcess, said: bytes) -> socket.socket:
    """A connection on which this was said."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(said)
    return connection


def answer_to(server: ServerProcess, said: bytes) -> bytes:
    """The bytes that come back until the server closes the connection, on which this was said."""
    with connect_to(server, said) as connection:
        assert server.health() == 200
        return b"".join(iter(functools.partial(connection.recv, 65536), b""))


@pytest.mark.alone
def test_a_terminal_that_is_gone_drains_however_often_it_says_so(tmp_path):
    with server_process(tmp_path, in_passes=HELD) as server:
        server.wait_ready()
        streams = Streams(client_of(server), 2, max_tokens=30)
        streams.wait_for_tokens()
        (tmp_path / "hold").touch()
        server.signal(signal.SIGHUP)
        until(lambda: server.health() == 503)
        server.signal(signal.SIGHUP)
        assert [server.health() for _ in range(10)] == [503] * 10
        (tmp_path / "hold").unlink()
        streams.join()
        assert streams.errors == [None, None] and streams.tokens == [30, 30]
        assert server.exit_code() == 0 and "Traceback" not in server.text, server.text


@pytest.mark.alone
def test_under_nohup_a_terminal_that_is_gone_changes_nothing(tmp_path):
    with server_process(tmp_path, launcher=("-c", NOHUP)) as server:
        server.signal(signal.SIGHUP)
        server.wait_ready()
        server.signal(signal.SIGHUP)
        body = {"prompt": "def", "max_tokens": 3}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        server.signal()
        assert server.exit_code() == 0


@pytest.mark.alone
def test_while_it_loads_it_listens_and_a_signal_ends_it(tmp_path):
    slow = "import time\nExecutor.__init__ = lambda self, *given, **named: time.sleep(120)"
    with server_process(tmp_path, fault=slow) as server:
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "demo"
        assert server.health() == 503
        server.signal()
        assert server.exit_code() == 0
        server.command.wait_until_gone(time.time())


@pytest.mark.alone
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_before_the_server_hears_any_ends_it_well(tmp_path, number):
    """Behind the line that says where it listens."""
    with server_process(tmp_path, in_front=f"import os; os.kill(os.getpid(), {number:d})") as server:
        assert server.exit_code() == 0 and "Traceback" not in server.text, server.text
        server.command.wait_until_gone(time.time())


@pytest.mark.alone
def test_when_the_engines_process_is_killed_every_client_is_told_and_the_server_ends(tmp_path):
    """Those that stream and those that wait for a whole answer, in the middle of a pass. Before that: while the pass is
    busy in Python for as long as this test likes, the front answers; and it has no torch."""
    with server_process(tmp_path, in_passes=HELD) as server:
        server.wait_ready()
        streams = Streams(client_of(server), 2, max_tokens=250)
        streams.wait_for_tokens()
        (tmp_path / "hold").touch()
        until((tmp_path / "held").exists)
        answers: list[tuple[int, str]] = []
        whole = [threading.Thread(target=ask_whole, args=(server, answers)) for _ in range(2)]
        for thread in whole:
            thread.start()
        until(lambda: httpx.get(f"{server.url}/status").json()["queue"]["waiting"] == 2)
        assert [server.health() for _ in range(100)] == [200] * 100
        assert httpx.post(f"{server.url}/tokenize", json={"prompt": "def"}).status_code == 200
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in (server.command.process.pid, server.pid())]
        assert ["libtorch" in text for text in maps] == [False, True]
        killed_s = time.monotonic()
        os.kill(server.pid(), signal.SIGKILL)
        streams.join()
        for thread in whole:
            thread.join(60)
        assert [getattr(error, "code", error) for error in streams.errors] == ["engine_dead"] * 2
        assert answers == [(503, "engine_dead")] * 2
        assert server.exit_code() == 1 and time.monotonic() - killed_s < TOLD_S
        assert "the engine was killed by SIGKILL" in server.text and "Traceback" not in server.text


def ask_whole(server: ServerProcess, answers: list[tuple[int, str]]) -> None:
    """Asks for an answer that does not stream, and keeps status and code of the error that comes."""
    body = {"prompt": LONG["prompt"], "max_tokens": 200, "ignore_eos": True}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    answers.append((response.status_code, response.json()["error"]["code"]))


@pytest.mark.alone
def test_when_the_front_is_killed_the_engine_and_its_ranks_end(tmp_path):
    """In the middle of passes."""
    with server_process(tmp_path, "-tp", "2", in_passes=SLOW) as server:
        server.wait_ready()
        streams = Streams(client_of(server), 2)
        streams.wait_for_tokens()
        assert len(server.command.pids()) == 2
        server.signal(signal.SIGKILL)
        server.command.wait_until_gone(time.time())
        streams.join()
        assert all(isinstance(error, openai.APIConnectionError) for error in streams.errors)


@pytest.mark.alone
def test_what_an_engine_cannot_be_started_with_is_one_line(tmp_path):
    """The engine's process says it, and both end as a command that was given it does."""
    with server_process(tmp_path, "--num-pages", "2") as server:
        assert server.exit_code() == 2
        (line,) = [line for line in server.text.splitlines() if not line.startswith("penstock serve: ")]
        assert line.startswith("penstock: error: ") and "num_pages" in line


def test_where_no_model_is_it_does_not_say_that_it_listens(tmp_path, capsys):
    for model, told in ((tmp_path / "nowhere", "no such file or directory"), (tmp_path, "is no checkpoint")):
        assert main(["serve", str(model), "--port", "0"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("penstock: error: ") and told in line


@contextlib.contextmanager
def held_in_prefill(server: ServerProcess, num_ranks: int) -> Iterator[None]:
    """A context in which all ranks are at the begin of a pass that computes a part of a prompt; behind it they go
    on."""
    folder = server.command.folder
    (folder / "hold_prompts").touch()
    asks = threading.Thread(target=ask_whole, args=(server, answers := []))
    asks.start()
    until(lambda: all((folder / f"held{rank}").exists() for rank in range(num_ranks)))
    yield
    (folder / "hold_prompts").unlink()
    asks.join(60)
    assert answers == [(503, "engine_dead")]


@pytest.mark.alone
def test_when_a_rank_dies_every_client_is_told_and_the_server_ends(tmp_path):
    """In the middle of a pass that computes a prompt for one of them, and a token for each of the others."""
    with server_process(tmp_path, "-tp", "2", in_passes=HELD_PROMPTS) as server:
        server.wait_ready()
        streams = Streams(client_of(server), 3, max_tokens=200)
        streams.wait_for_tokens()
        with held_in_prefill(server, num_ranks=2):
            killed_s = time.monotonic()
            os.kill(server.pid(rank=1), signal.SIGKILL)
        streams.join()
        assert [getattr(error, "code", error) for error in streams.errors] == ["engine_dead"] * 3
        assert max(streams.ended_s) - killed_s < TOLD_S
        assert server.exit_code() == 1 and time.monotonic() - killed_s < TOLD_S
        assert "rank 1 was killed by SIGKILL" in server.text


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
@pytest.mark.parametrize("when", ["idle", "decode", "prefill"])
def test_a_rank_that_dies_or_stops_at_any_time_ends_the_server(tmp_path, rank, number, when):
    with server_process(tmp_path, "-tp", "2", in_passes=HELD_PROMPTS) as server:
        server.wait_ready()
        streams = Streams(client_of(server), 0 if when == "idle" else 3, max_tokens=200)
        streams.wait_for_tokens()
        with held_in_prefill(server, num_ranks=2) if when == "prefill" else contextlib.nullcontext():
            failed_s = time.monotonic()
            os.kill(server.pid(rank), number)
        assert server.exit_code() == 1 and time.monotonic() - failed_s < TOLD_S
        server.command.wait_until_gone(time.time())
        streams.join()
        assert [getattr(error, "code", error) for error in streams.errors] == ["engine_dead"] * len(streams.errors)


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
def test_under_torchrun_a_rank_that_dies_ends_the_server(tmp_path, rank):
    """Its clients are told at once; torchrun's agent may take half a minute."""
    with server_process(tmp_path, launcher=TORCHRUN, in_passes=SLOW) as server:
        server.wait_ready()
        streams = Streams(client_of(server), 3, max_tokens=200)
        streams.wait_for_tokens()
        failed_s = time.monotonic()
        os.kill(server.pid(rank), signal.SIGKILL)
        streams.join()
        assert [getattr(error, "code", error) for error in streams.errors] == ["engine_dead"] * 3
        assert max(streams.ended_s) - failed_s < TOLD_S
        assert server.exit_code() == 1 and time.monotonic() - failed_s < TOLD_S + 30
        server.command.wait_until_gone(time.time())


@pytest.mark.alone
def test_under_torchrun_rank_0_serves_and_all_end_well(tmp_path):
    with server_process(tmp_path, launcher=TORCHRUN) as server:
        server.wait_ready()
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "def", "max_tokens": 5}, timeout=60).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        os.kill(psutil.Process(server.pid(rank=0)).ppid(), signal.SIGTERM)
        assert server.exit_code() == 0, server.text


def test_a_port_in_use_is_refused_before_anything_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "no-such-model", "--port", str(port)]) == 2
    assert f"--host 127.0.0.1 --port {port}: Address already in use" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(serve, "MISSING", "fastapi")
    assert main(["serve", "demo"]) == 2
    assert capsys.readouterr().err == "penstock: error: penstock serve needs fastapi: pip install 'penstock[serve]'\n"


def test_the_rest_of_the_command_line_needs_no_library_of_the_servers():
    program = "import sys\nfor name in ('fastapi', 'uvicorn', 'pydantic', 'starlette'): sys.modules[name] = None\n"
    program += "from penstock.engine.commands import serve, cli\nimport penstock.engine.server.validation\n"
    program += "print(serve.MISSING)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() in ("fastapi", "starlette", "uvicorn")


@pytest.mark.parametrize("choice, expected", [("auto", {"temperature": 0.25}), ("none", {})])
def test_defaults_of_the_checkpoint_are_said_and_served_unless_that_is_refused(
    tmp_path, monkeypatch, capsys, choice, expected
):
    for file in find_model("demo").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.25}))
    served = []
    monkeypatch.setattr(serve, "EngineProcess", lambda config: None)
    monkeypatch.setattr(Server, "__init__", lambda server, service, *_: served.append(service.defaults))
    monkeypatch.setattr(Server, "run", lambda *_: 0)
    flags = ("--port", "0", "--device", "cpu", "--generation-config", choice)
    assert main(["serve", str(tmp_path), *flags]) == 0 and served == [expected]
    assert ("temperature 0.25" in capsys.readouterr().err) == bool(expected)


def test_defaults_of_the_checkpoint_are_read(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20, "max_new_tokens": 9}))
    assert read_defaults(EngineConfig(str(tmp_path))) == {"temperature": 0.6, "top_k": 20}
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": -1}))
    with pytest.raises(ValueError, match="generation_config.json: temperature=-1"):
        read_defaults(EngineConfig(str(tmp_path)))
