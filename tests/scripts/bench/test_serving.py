"""The benchmark scripts.bench.serving: both ways of the same requests, arrivals, clients, and answers cut short."""

import asyncio

import pytest
from penstock.engine.config import EngineConfig

from scripts.bench import serving, vllm_server
from scripts.bench.arrivals import latency_fields
from scripts.bench.http_client import Client, be_refused, poll
from scripts.bench.vllm_side import find_vllm
from scripts.bench.workload import Job
from tests.support.fake_vllm import VERSION, FakeVllm
from tests.support.scripts import run

ENGINE = ("--model", "demo", "--device", "cpu", "--dtype", "float32", "--max-model-len", "64", "--resident", "all")
JOBS = ("--num-prompts", "5", "--input-len", "8", "--output-len", "6", "--random-range-ratio", "0.5")


@pytest.mark.parametrize("how", [("--load", "2", "--text", __file__), ("--max-concurrency", "2")])
def test_both_ways_are_measured(monkeypatch, capsys, how):
    pytest.importorskip("fastapi")
    record = run(monkeypatch, capsys, serving, *ENGINE, *JOBS, *how)
    loop, http = record["rows"]
    assert (loop["fed"], http["fed"]) == ("in process", "by HTTP")
    assert record["ratios"].keys() == loop.keys() - {"fed"}
    for name, ratio in record["ratios"].items():
        is_gap = "tpot" in name or "itl" in name  # which are 0 where tokens came together
        assert http[name] > 0 or (is_gap and http[name] == 0)
        assert loop[name] > 0 and ratio == pytest.approx(http[name] / loop[name])
    assert record.get("text") == ("test_serving.py" if "--text" in how else None)
    assert record.get("share_of_full_passes", 0.0) > 0 or "--load" in how
    assert record["max_num_seqs"] == (5 if how[0] == "--load" else 2)
    assert record["request_rate"] == pytest.approx(record["load"] * record["requests_per_second_at_once"])
    assert record["health"]["num_calls"] > 0 and record["refused"]["num_calls"] == serving.REFUSED_CALLS
    for short in (record["health"], record["refused"]):
        assert short["longest_ms"] >= short["p99_ms"] >= short["median_ms"] > 0
    counting = record["counting"]
    assert counting["num_rows"] == min(5, record["max_num_seqs"])
    assert min(counting["share"], counting["busy_share"], *counting["median_pass_ms"].values()) > 0


@pytest.mark.timeout(180)
def test_vllms_server_gets_the_same_requests(monkeypatch, capsys, tmp_path):
    pytest.importorskip("fastapi")
    vllm = FakeVllm(tmp_path, monkeypatch)
    beside = ("--compare", "vllm", "--vllm", str(vllm.site), "--vllm-options", '{"enable_prefix_caching": false}')
    record = run(monkeypatch, capsys, serving, *ENGINE, "--load-format", "dummy", *JOBS, *beside)
    _, ours, theirs = record["rows"]
    assert theirs["fed"] == "vLLM by HTTP" and theirs.keys() == ours.keys()
    assert all(row["p99_late_ms"] >= row["median_late_ms"] >= 0.0 for row in (ours, theirs))
    assert record["vllm"].keys() == {"version", "options", "load_s"} and record["vllm"]["version"] == VERSION
    for name, ratio in record["vllm_ratios"].items():
        assert ratio == pytest.approx(ours[name] / theirs[name])
    (served,), posts = vllm.asked("served"), vllm.asked("post")
    assert served["is_there"] and served["own_process"]
    said = " ".join(served["flags"])
    for flag in ("--skip-tokenizer-init", "--load-format dummy", "--max-model-len 64", "--no-enable-prefix-caching"):
        assert flag in said
    assert f"--max-num-seqs {record['max_num_seqs']}" in said
    asked = [asked for _, asked in posts if "cache_salt" not in asked]
    assert {path for path, _ in posts} == {"/v1/completions"} and len(asked) == 5
    for salt in ("warm-up", "at once"):
        warming = [asked for _, asked in posts if asked.get("cache_salt") == salt]
        assert sorted(one["prompt"] for one in warming) == sorted(one["prompt"] for one in asked)
    assert len(posts) == 15 and len(set(vllm.asked("connection"))) < len(posts)
    assert {one["max_tokens"] for one in asked} <= {*range(3, 10)}
    assert all(one["stream"] and one["ignore_eos"] and one["temperature"] == 0 for one in asked)


@pytest.mark.parametrize(
    "fails, error",
    [("start", "ended with status 1: RuntimeError: no kernel image"), ("never ready", "not ready after")],
)
def test_a_vllm_server_that_does_not_start_is_said(monkeypatch, capsys, tmp_path, fails, error):
    result = beside(monkeypatch, tmp_path, fails, nothing, start_s=-1.0 if fails == "never ready" else 300.0)
    assert error in result["error"] and result["version"] == VERSION and "sent" not in result
    assert fails == "never ready" or "Traceback" in capsys.readouterr().err


def test_a_vllm_server_that_fails_to_answer_is_said(monkeypatch, capsys, tmp_path):
    def ask(address):
        return Client(address).stream({"max_tokens": 2})

    result = beside(monkeypatch, tmp_path, "answer", ask)
    assert result["error"].endswith(": EngineDeadError") and "no page is free" in result["error"]


def test_a_vllm_server_that_takes_too_long_is_left(monkeypatch, tmp_path):
    result = beside(monkeypatch, tmp_path, "", lambda _: asyncio.Event().wait(), most_s=0.0)
    assert "not all answered after 0 s" in result["error"]


def beside(monkeypatch, tmp_path, fails, send, start_s=300.0, most_s=300.0) -> dict:
    """Runs a server that fails in this way; its result."""
    vllm = FakeVllm(tmp_path, monkeypatch)
    monkeypatch.setenv("FAKE_VLLM_FAILS", fails)
    monkeypatch.setattr(vllm_server, "START_S", start_s)
    limits = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    config = EngineConfig(model="demo", load_format="dummy")
    return vllm_server.run_vllm_server(find_vllm(str(vllm.site), "{}"), config, limits, send, most_s)


async def nothing(address) -> None:
    pass


def test_outputs_of_one_token_have_no_gaps_to_compare(capsys):
    rows = [{"fed": fed, "tokens_per_second": 4.0, **latency_fields([0.0], [[2.0]])} for fed in ("a", "b")]
    ratios = serving.ratios_of(*rows)
    assert ratios["tokens_per_second"] == ratios["p99_ttft_ms"] == 1.0 and "median_tpot_ms" not in ratios
    short = {name: serving.percentiles_of([1e-3]) for name in ("health", "refused")}
    counting = {"share": 1.0, "median_pass_ms": {"alone": 1.0, "beside": 1.0}}
    serving.say({"rows": rows, "ratios": ratios, "counting": counting} | short)
    assert capsys.readouterr().out.splitlines()[3].split() == ["ratio", "1.000", "1.000", "1.000", "-", "-"]


def test_output_tokens_are_held_against_passes_that_give_every_client_one():
    """Two clients, whose passes of 10 ms could give 200 a second: of 200 tokens a second a quarter are prompts."""
    row, jobs = {"tokens_per_second": 200.0, "median_tpot_ms": 10.0}, [Job([5] * 4, 12)] * 3
    assert serving.share_of_full_passes(row, jobs, 2) == pytest.approx(0.75)


def test_health_is_asked_once_however_soon_all_has_ended():
    async def ask() -> list[float]:
        async def answer(reader, writer):
            while await reader.read(1000):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            writer.close()

        ended = asyncio.Event()
        ended.set()
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            return await poll(server.sockets[0].getsockname(), "/health", 10, ended)

    assert len(asyncio.run(ask())) == 1


@pytest.mark.parametrize(
    "said",
    [b"200 OK\r\nContent-Length: 0\r\n\r\n", b"503 No\r\nRetry-After: 1\r\nContent-Length: 7\r\n\r\nloading"],
    ids=["let in", "loading"],
)
def test_a_request_that_should_be_refused_and_is_not_is_an_error(said):
    async def ask() -> None:
        async def answer(reader, writer):
            while await reader.read(1000):
                writer.write(b"HTTP/1.1 " + said)
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            await be_refused(server.sockets[0].getsockname(), {"max_tokens": 2}, 10)

    with pytest.raises(RuntimeError, match="was not refused"):
        asyncio.run(ask())


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
            await Client(server.sockets[0].getsockname()).stream({"max_tokens": 2})

    with pytest.raises(RuntimeError, match="ended with|got 1"):
        asyncio.run(ask())
