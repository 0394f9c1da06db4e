"""The benchmark scripts.bench.batch: a job, vLLM's run-batch beside it, and a job that is stopped on its way."""

import json
import re
import sys
from pathlib import Path

import pytest
from penstock.parallel.topology import device_name, resolve_topology

from scripts.bench import batch
from tests.support.fake_vllm import VERSION, FakeVllm
from tests.support.gguf_models import SMALL, write_model
from tests.support.scripts import refused, run

SHAPE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300}
SHAPE |= {"max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False}
SHAPE |= {"hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float32"}
SAID = {"seconds": 1.0, "predicted": [], "output_tokens_s": 1.0, "steady_output_tokens_s": None, "bound": "link"}
SAID |= {"share_of_bound": 0.0}
JOB = ("--num-prompts", "12", "--input-len", "8", "--output-len", "6")
ENGINE = ("--device", "cpu", "--max-num-seqs", "3", "--resident", "none")


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(SHAPE))
    return str(file)


@pytest.mark.timeout(180)
def test_a_job_runs_beside_vllm(monkeypatch, capsys, tmp_path, config):
    vllm = FakeVllm(tmp_path, monkeypatch)
    options = '{"max_num_seqs": 5, "enforce_eager": true}'
    beside = ("--compare", "vllm", "--vllm", str(vllm.site), "--vllm-options", options, "--lengths", "unknown")
    record = run(monkeypatch, capsys, batch, "--model", config, *JOB, *ENGINE, *beside)
    assert record["dry_run"]["prompt_tokens"] == 12 * 8 and record["dry_run"]["output_tokens"] == 12 * 12
    assert (record["rows"], record["done"], record["lines"], record["flags"]) == (12, 12, 12, list(ENGINE))
    assert record["prompt_tokens"] == 12 * 8 and 12 <= record["output_tokens"] <= 12 * 12
    theirs = record["vllm"]
    assert (theirs["version"], theirs["output_tokens"]) == (VERSION, 12 * 12), "it stops at no token"
    assert "error" not in theirs
    (asked,) = vllm.asked("run_batch")
    assert asked["flags"] == ["--load-format", "dummy", "--max-num-seqs", "5", "--enforce-eager"]
    assert asked["is_there"] == [True, True] and asked["prompts"] == 12


@pytest.mark.timeout(180)
def test_rows_of_words_are_answered_by_a_gguf_file(monkeypatch, capsys, tmp_path):
    """It has no tokenizer; the words' own is given with it, and has as many words as it has tokens."""
    write_model(tmp_path / "m.gguf", "llama", sizes=SMALL)
    record = run(monkeypatch, capsys, batch, "--model", str(tmp_path / "m.gguf"), *JOB, *ENGINE)
    assert (record["model"], record["done"], record["lines"]) == ("m", 12, 12)
    assert (record["prompt_tokens"], record["output_tokens"]) == (12 * 8, 12 * 6)


def test_rows_of_a_text_are_answered_by_the_model_itself(monkeypatch, capsys, tmp_path):
    """Its answers end where it ends them, of which these say nothing; the demo model has a chat template."""
    file, given, told = tmp_path / "text.md", [], batch.run_job
    file.write_text(" ".join(f"word{number}" for number in range(50)))

    def note(command):
        if "--dry-run" in command:
            return SAID
        given.extend(map(json.loads, Path(command[command.index("-i") + 1]).read_text().splitlines()))
        return told(command)

    monkeypatch.setattr(batch, "run_job", note)
    text = ("--text", str(file), "--lengths", "unknown")
    record = run(monkeypatch, capsys, batch, "--model", "demo", *JOB, *ENGINE, *text)
    assert (record["text"], record["done"], record["lines"]) == ("text.md", 12, 12)
    assert record["output_tokens"] <= 12 * 12
    for row in given:
        (message,) = row["body"]["messages"]
        assert message["content"] in 2 * (file.read_text() + " ") and len(message["content"].split()) == 8
        assert row["body"].keys() == {"messages", "max_tokens"}
    beside = refused(monkeypatch, capsys, batch, "--model", "demo", *JOB, *text, "--compare", "vllm")
    assert "--compare vllm: not with --text" in beside


def test_a_dry_run_is_for_the_device_of_the_job(monkeypatch, capsys, config):
    commands, found = [], resolve_topology(0, 1, 0).device
    monkeypatch.setattr(batch, "run_job", lambda command: commands.append(command) or SAID)
    monkeypatch.setattr(batch, "check_output", lambda output, num_rows: num_rows)
    record = run(monkeypatch, capsys, batch, "--model", config, *JOB)
    dry_run, job = commands
    assert dry_run == [*job, "--device", found.type, "--dry-run"] and "--device" not in job
    assert record["hardware"] == f"1 x {device_name(found)}"
    assert batch.device_of(["--resident", "none", "--device", "cpu"]).type == "cpu"


def test_each_flag_of_the_rows_says_what_it_counts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["batch.py", "--help"])
    with pytest.raises(SystemExit):
        batch.main()
    told = capsys.readouterr().out
    for line in ("--num-prompts N +rows$", "--input-len N +words of a row$", "--output-len N +tokens of an answer$"):
        assert re.search(line, told, re.MULTILINE)
    assert "--lengths unknown \\\n      --num-prompts 200" in told


def test_a_vllm_that_fails_is_said(monkeypatch, capsys, tmp_path, config):
    vllm = FakeVllm(tmp_path, monkeypatch)
    monkeypatch.setenv("FAKE_VLLM_FAILS", "1")
    monkeypatch.setattr(batch, "run_job", lambda command: SAID)
    monkeypatch.setattr(batch, "check_output", lambda output, num_rows: num_rows)
    record = run(monkeypatch, capsys, batch, "--model", config, *JOB, "--compare", "vllm", "--vllm", str(vllm.site))
    assert record["vllm"]["error"] == "ended with status 1 and 0 answers: RuntimeError: no kernel image"
    assert "speedup" not in record


WAITING = """
import json, signal, sys, time
def stop(*_):
    print(json.dumps({"done": 2, "seconds": 3.0, "passes": 4, "passes_s": 2.0}))
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
open(sys.argv[1], "w").write("{}\\n{}\\n")
while True:
    time.sleep(60)
"""


def test_a_job_is_stopped_once_it_has_so_many_rows(tmp_path):
    stopped = batch.stop_job([sys.executable, "-c", WAITING, str(tmp_path / "out")], tmp_path / "out", 2)
    assert stopped.pop("stop_s") >= 0
    assert stopped == {"done": 2, "seconds": 3.0, "passes": 4, "passes_s": 2.0}
    with pytest.raises(RuntimeError, match="ended with status 3 after SIGTERM"):
        batch.stop_job([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "none", 2)


def test_a_file_without_a_vocabulary_is_refused(monkeypatch, capsys, tmp_path):
    assert "none.json" in refused(monkeypatch, capsys, batch, "--model", str(tmp_path / "none.json"), *JOB)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([("0", None)], "1 lines of 1 rows, 2 were asked; 0 failed"),
        ([("0", None), ("0", None)], "2 lines of 1 rows"),
        ([("0", None), ("1", {"code": "x"})], "1 failed"),
    ],
)
def test_an_output_that_is_not_whole_is_an_error(tmp_path, rows, message):
    file = tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"custom_id": name, "error": error}) + "\n" for name, error in rows))
    with pytest.raises(RuntimeError, match=message):
        batch.check_output(file, 2)
