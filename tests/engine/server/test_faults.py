"""A server whose passes take long, whose connections break and whose rows give way: what its clients notice of that."""

import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from penstock.engine.server.delivery import QUIET_S
from penstock.engine.server.sse import KEEP_ALIVE

from penstock import LLM, SamplingParams
from tests.support.server_process import ServerProcess, server_process
from tests.support.serving import chunks_of, until

PATH = "/v1/completions"
SERVER = Path(__file__).parents[3] / "engine/server"
PROMPTS = ["Return the number of", "Open the file", "Log a message with", "If the"]
LONG = {"temperature": 0, "max_tokens": 48, "ignore_eos": True}
# A pass stands still for as long as there is a file of that name.
STANDING = """
import os, time
def begin_pass(batch):
    while os.path.exists(os.path.join(folder, "stand")):
        time.sleep(0.01)
    time.sleep(0.02)
"""
# A tokenizer that fails at a token of those who ask for 40.
FAILING = """
from penstock.engine.output import Sequence
push = Sequence.push
def failing_push(sequence, token):
    if len(sequence.request.output_token_ids) == 3 and sequence.request.params.max_tokens == 40:
        raise RuntimeError("a secret of the tokenizer")
    return push(sequence, token)
Sequence.push = failing_push
"""


class Reader:
    """A client that reads a stream in a thread of its own; `text` is what came so far."""

    def __init__(self, server: ServerProcess, **body):
        self.text = ""
        self._url, self._body = f"{server.url}{PATH}", LONG | body | {"stream": True}
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=60) as response:
            for text in response.iter_text():
                self.text += text

    def join(self) -> str:
        """All that came, once the stream has ended."""
        self._thread.join(60)
        return self.text


def metric(server: ServerProcess, name: str) -> float:
    """The value of a metric without labels."""
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    return float(re.search(rf"^penstock:{name} (\S+)$", text, re.MULTILINE)[1])


def ask(server: ServerProcess, **body) -> dict:
    """The answer to a request."""
    response = httpx.post(f"{server.url}{PATH}", json=LONG | body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def cut(server: ServerProcess, when: Callable[[str], bool], **body) -> None:
    """A client whose connection breaks, by a reset, once `when` is so of what it got."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(LONG | body).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"{head}\r\n".encode() + content)
        got = ""
        while not when(got):
            got += connection.recv(65536).decode()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.alone
def test_while_a_pass_stands_still_the_server_answers_and_forgets_who_leaves(tmp_path):
    """One stays through it, one's connection is cut in the middle of its stream, one gives up waiting."""
    with server_process(tmp_path, in_passes=STANDING) as server:
        server.wait_ready()
        stays = Reader(server, prompt=PROMPTS[0])
        until(lambda: stays.text.count("data: ") >= 2)
        cut(server, lambda got: got.count("data: ") >= 2, prompt=PROMPTS[1], stream=True)
        until(lambda: metric(server, "client_disconnects_total") == 1)
        (tmp_path / "stand").touch()
        cut(server, lambda got: True, prompt=PROMPTS[2])
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}{PATH}", json=LONG | {"prompt": PROMPTS[3]}, timeout=0.5)
        until(lambda: KEEP_ALIVE.decode() in stays.text, 6 * QUIET_S)
        assert server.health() == 200 and httpx.get(f"{server.url}/v1/models", timeout=60).status_code == 200
        assert httpx.get(f"{server.url}/status", timeout=60).json()["phase"] == "ready"
        (tmp_path / "stand").unlink()
        text = stays.join().replace(KEEP_ALIVE.decode(), "")
        assert len(chunks_of(text)) == LONG["max_tokens"]
        until(lambda: metric(server, "client_disconnects_total") >= 2)
        until(lambda: metric(server, "num_requests_running") + metric(server, "num_requests_waiting") == 0)
        assert metric(server, "kv_cache_usage_perc") == 0
        assert "Traceback" not in server.text, server.text
    with LLM("demo", device="cpu", dtype="float32", max_model_len=256) as llm:
        (expected,) = llm.generate(PROMPTS[0], SamplingParams(**LONG))[0].outputs
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks_of(text)) == expected.text


@pytest.mark.alone
def test_rows_that_give_way_and_pages_that_are_used_again_give_the_same_texts(tmp_path):
    """Pages for two of four rows. Those that are cached of a prompt are found, and no more once others used them. Texts
    that failed before leave nothing of that."""
    long, *others = (list(range(first, first + 64)) for first in (100, 200, 300))
    with server_process(tmp_path, "--max-model-len", "80", "--num-pages", "9", in_passes=FAILING) as server:
        server.wait_ready()
        check_failing_texts(server)
        together = ask(server, prompt=PROMPTS)
        assert metric(server, "num_preemptions_total") > 0
        prompts = [long, long, *others, long]
        answers = [ask(server, prompt=prompt, max_tokens=9) for prompt in prompts]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached[1] > 0 == cached[0] == cached[-1], cached
    with LLM("demo", device="cpu", dtype="float32", max_model_len=80, enable_prefix_caching=False) as llm:
        expected = [llm.generate(prompt, SamplingParams(**LONG))[0].outputs[0].text for prompt in PROMPTS]
        params = SamplingParams(**LONG | {"max_tokens": 9})
        again = [llm.generate([prompt], params)[0].outputs[0].text for prompt in prompts]
    assert [choice["text"] for choice in together["choices"]] == expected
    assert [answer["choices"][0]["text"] for answer in answers] == again


def check_failing_texts(server: ServerProcess) -> None:
    """Asserts that a text that cannot be made ends its request alone, streamed or not, and tells nothing."""
    streamed = Reader(server, prompt=PROMPTS[0], max_tokens=40)
    whole = httpx.post(f"{server.url}{PATH}", json=LONG | {"prompt": PROMPTS[1], "max_tokens": 40}, timeout=60)
    *chunks, last = [json.loads(event.removeprefix("data: ")) for event in streamed.join().split("\n\n")[:-1]]
    assert len(chunks) < 40 and all("choices" in chunk for chunk in chunks)
    assert whole.status_code == 500 and whole.headers["x-should-retry"] == "false"
    for error in (last["error"], whole.json()["error"]):
        assert error["code"] == "request_failed" and "secret" not in error["message"]
    assert server.health() == 200


def test_no_wait_of_the_server_asks_for_the_time_of_day():
    """A clock that is set must not end a wait, nor prolong one: that time is only told."""
    lines = [line for path in SERVER.glob("*.py") for line in path.read_text().splitlines()]
    asks = [line for line in lines if re.search(r"\btime\.time(_ns)?\(|datetime|localtime|gmtime|CLOCK_REALTIME", line)]
    assert asks and all("created" in line or '"came"' in line for line in asks), asks
