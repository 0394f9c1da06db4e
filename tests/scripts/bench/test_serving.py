"""The benchmark scripts.bench.serving: both ways of the same requests, arrivals, clients, and answers cut short."""

import asyncio

import pytest

from scripts.bench import serving
from scripts.bench.http_client import stream
from tests.support.scripts import run

ENGINE = ("--model", "demo", "--device", "cpu", "--dtype", "float32", "--max-model-len", "64", "--resident", "all")
JOBS = ("--num-prompts", "5", "--input-len", "8", "--output-len", "6", "--random-range-ratio", "0.5")


@pytest.mark.parametrize("how", [("--load", "2"), ("--max-concurrency", "2")])
def test_both_ways_are_measured(monkeypatch, capsys, how):
    pytest.importorskip("fastapi")
    record = run(monkeypatch, capsys, serving, *ENGINE, *JOBS, *how)
    loop, http = record["rows"]
    assert (loop["fed"], http["fed"]) == ("in process", "by HTTP")
    for name, ratio in record["ratios"].items():
        assert http[name] > 0 and ratio == pytest.approx(http[name] / loop[name])
    assert record["max_num_seqs"] == (5 if how[0] == "--load" else 2)
    assert record["request_rate"] == pytest.approx(record["load"] * record["requests_per_second_at_once"])
    assert record["health"]["num_calls"] > 0 and record["health"]["p99_ms"] >= record["health"]["median_ms"] > 0


def test_a_server_that_does_not_start_is_an_error():
    pytest.importorskip("fastapi")
    with pytest.raises(RuntimeError, match="not ready: .*no_such_model"), serving.served(["no_such_model"], {}):
        pass


@pytest.mark.parametrize(
    "said", ['data: {"error":{"message":"no"}}', 'data: {"choices":[],"usage":{"completion_tokens":1}}', ""]
)
def test_an_answer_that_is_not_whole_is_an_error(said):
    """Of a server that says this and nothing else."""

    async def ask() -> None:
        async def answer(reader, writer):
            await reader.readuntil(b"}")
            writer.write(f"HTTP/1.1 200 OK\r\n\r\n{said}\n\n".encode())
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            await stream(server.sockets[0].getsockname(), {"max_tokens": 2})

    with pytest.raises(RuntimeError, match="ended with|got 1"):
        asyncio.run(ask())
