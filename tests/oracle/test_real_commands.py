"""A published model, as a GGUF file, answers through each command that takes a model."""

import io
import sys

import httpx
import pytest
from penstock.engine.commands.cli import main

from tests.support.batch_jobs import line, rows_of, write_lines
from tests.support.server_process import server_process

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]
BODY = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
    "max_tokens": 8,
}
FLAGS = ("--device", "cpu", "--max-model-len", "128")


def test_chat(real_model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(BODY["messages"][0]["content"] + "\n"))
    assert main(["chat", "--model", str(real_model), *FLAGS, "--temperature", "0", "--max-tokens", "8"]) == 0
    assert "Paris" in capsys.readouterr().out


def test_batch(real_model, tmp_path):
    asked = write_lines(tmp_path / "in.jsonl", [line("a", "/v1/chat/completions", **BODY)])
    answered = tmp_path / "out.jsonl"
    assert main(["batch", "--model", str(real_model), *FLAGS, "-i", str(asked), "-o", str(answered)]) == 0
    (row,) = rows_of(answered)
    assert "Paris" in row["response"]["body"]["choices"][0]["message"]["content"]


def test_serve(real_model, tmp_path):
    with server_process(tmp_path / "server", "--max-model-len", "128", model=str(real_model)) as server:
        server.wait_ready()
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=60)
    assert answer.status_code == 200, answer.text
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]
