"""/status: what an operator wants to know of a server, from its start to its end, and nothing of a request; and the log
of requests."""

import io
import json
import sys
import time
from types import SimpleNamespace

import pytest
from penstock.engine.runtime.progress import Progress
from penstock.engine.server.engine_facts import facts_of, row_pass_s, state_of
from penstock.engine.server.request_log import FIELDS, RequestLog, request_log
from penstock.engine.server.status import describe
from penstock.engine.streams import guarded_streams

from penstock import LLM, SamplingParams

OPTIONS = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "max_num_seqs": 2, "page_size": 4}
SECRET = "Return the secret of the"


def service_of(llm: LLM | None, phase: str) -> SimpleNamespace:
    """A service whose engine tells what this one is like."""
    told = {"facts": None, "is_ready": phase == "ready", "num_rowless": 0}
    if llm is not None:
        told |= {"facts": facts_of(llm), "state": state_of(llm, row_pass_s(llm, 1)), "times": llm.engine.times}
        told["num_rowless"] = llm.loop.scheduler.num_waiting
    return SimpleNamespace(
        phase=phase,
        names=["tiny"],
        started_s=time.monotonic() - 3.0,
        engine=SimpleNamespace(**told),
        admission=SimpleNamespace(predicted_wait_s=lambda: 1.5),
        progress=lambda: {"elapsed_s": 3.0},
    )


def test_while_loading_there_is_progress_and_no_engine():
    told = describe(service_of(None, "loading"))
    assert told["phase"] == "loading" and told["progress"] == {"elapsed_s": 3.0} and told["uptime_s"] >= 3.0
    assert "passes" not in told and told["models"] == ["tiny"]


def test_a_start_says_how_far_it_is():
    parts, progress = [], Progress()
    assert progress.to_dict() == {"part": "planning", "loaded_bytes": 0, "total_bytes": 0}
    progress.add = lambda nbytes: parts.append(progress.part) or Progress.add(progress, nbytes)
    with LLM("demo", **OPTIONS, progress=progress) as llm:
        nbytes = llm.engine.plan.layout.nbytes
        assert (progress.part, progress.loaded_bytes, progress.total_bytes) == ("done", nbytes, nbytes)
    assert set(parts) == {"loading"}


@pytest.mark.parametrize("resident", ["all", "none"])
def test_a_server_at_work(resident):
    """Passes run; one sequence waits; what was planned, predicted and measured stands beside each other."""
    with LLM("demo", **OPTIONS, resident=resident) as llm:
        before = json.loads(json.dumps(describe(service_of(llm, "ready"))))
        assert before["passes"] == {"num": 0, "measured_s": 0.0, "predicted_s": 0.0, "last": None}
        assert before["queue"]["for"] is None and before["tokens_s"] == 0.0
        for prompt in (SECRET, "def", "class"):
            llm.loop.add(llm.sequences(prompt, SamplingParams(max_tokens=20, ignore_eos=True))[0])
        for _ in range(5):
            llm.loop.advance()
        told = json.loads(text := json.dumps(describe(service_of(llm, "ready"))))
        plan, times = llm.engine.plan, llm.engine.times
        assert (told["rows"], told["queue"]["waiting"]) == ({"running": 2, "most": 2}, 1)
        assert told["queue"]["for"] == "rows" and told["queue"]["predicted_wait_s"] == 1.5
        assert told["plan"]["streamed_bytes"] == plan.residency.streamed_bytes
        assert (told["plan"]["streamed_groups"] > 0) == (resident == "none")
        last = told["passes"]["last"]
        assert told["passes"]["num"] == times.num_passes == 5
        assert last["measured_s"] == times.last.measured_s and last["predicted_s"] == times.last.predicted.total_s
        assert (last["link_use"] > 0) == (resident == "none") and last["kind"] == "decode" and last["rows"] == 2
        pages = told["pages"]
        assert pages["held"] + pages["cached"] + pages["free"] == pages["total"] == llm.loop.scheduler.pool.num_usable
        assert pages["held"] > 0 and told["tokens_s"] > 0
        assert told["prefix_cache"]["asked_tokens"] > 0 and told["ranks"] == {"num": 1, "device": "cpu"}
        assert "secret" not in text and "demo" not in text  # neither a prompt nor a path
        llm.loop.clear()
        assert "passes" not in describe(service_of(llm, "dead"))


def test_a_request_is_one_line_of_numbers_and_codes():
    stream = io.StringIO()
    log = RequestLog(stream)
    record = {"request_id": "cmpl-1", "status": 200, "finish_reasons": ["stop"], "duration_s": 0.5, "prompt": SECRET}
    log.write(record)
    log.write(record | {"error": "client\ndisconnected"})
    first, second = stream.getvalue().splitlines()
    assert json.loads(first) == dict.fromkeys(FIELDS) | {key: record[key] for key in record if key != "prompt"}
    assert json.loads(second)["error"] == "client\ndisconnected" and "secret" not in stream.getvalue()


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_log_that_takes_no_more_ends_alone(capsys):
    log = RequestLog(FullDisk())
    for _ in range(3):
        log.write({"request_id": "a"})
    assert capsys.readouterr().err == "penstock serve: the request log ends: No space left on device\n"


def test_a_log_on_standard_output_that_takes_no_more_ends_alone(capsys, monkeypatch):
    with open("/dev/full", "w") as full, guarded_streams(), request_log("-") as log:
        monkeypatch.setattr(sys.stdout, "_stream", full)
        for _ in range(3):
            log.write({"request_id": "a"})
    assert capsys.readouterr().err == "penstock serve: the request log ends: standard output takes no more\n"


def test_the_log_is_a_file_standard_output_or_none(tmp_path, capsys):
    for _ in range(2):
        with request_log(str(tmp_path / "log.jsonl")) as log:
            log.write({"request_id": "a"})
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2  # appended to
    with request_log("-") as log:
        log.write({"request_id": "b"})
    assert json.loads(capsys.readouterr().out)["request_id"] == "b"
    with request_log(None) as log:
        assert log is None
    with pytest.raises(ValueError, match="^request_log='.*nowhere.*': cannot be written to"):
        request_log(str(tmp_path / "nowhere" / "log")).__enter__()
