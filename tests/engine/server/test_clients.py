"""Programs that others wrote, as they are, each against a server of its own: lm-eval and schemathesis."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from penstock import LLM, SamplingParams
from tests.support.server_process import server_process

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]
ENGINE = {"device": "cpu", "dtype": "float32", "max_model_len": 256}
# Many short rows: a request of hundreds of choices is done in seconds.
SHORT = ("--max-model-len", "64", "--max-num-seqs", "256")
ANSWER_S = 120  # that schemathesis waits for an answer
DEMO = Path(__file__).parents[3] / "engine/demo_model"
QUESTIONS = ["Return the", "Open the file", "Log a message with", "If the"]
CHOICES = [" value", " first line of it", " number", "\n"]
UNTIL, MOST = "\n", 8
TASK = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{q}}", "target_delimiter": ""}
CHOOSES = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"}
WRITES = {"output_type": "generate_until", "doc_to_target": "{{gold}}"}
WRITES |= {"generation_kwargs": {"until": [UNTIL], "max_gen_toks": MOST, "do_sample": False, "temperature": 0}}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
# A fault of Python 3.11, whose parser loses count of its own depth now and then (python/cpython#106905).
NOT_OURS = "AST constructor recursion depth mismatch"


def run(clients: Path, name: str, *arguments: str, cwd: Path) -> str:
    """Runs a program to its good end, again if Python itself failed in it, and returns what it said."""
    environment = os.environ | OFFLINE | {"HF_HOME": str(cwd / "hf")}
    for _ in range(3):
        done = subprocess.run([clients / name, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
        if done.returncode == 0 or NOT_OURS not in done.stdout:
            break
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def samples(folder: Path, task: str) -> list[dict]:
    """Reads what lm-eval logged of each document, in their order."""
    (file,) = folder.glob(f"out/*/samples_{task}_*.jsonl")
    logged = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(logged, key=lambda one: one["doc_id"])


@pytest.mark.alone
def test_lm_eval_sees_the_engines_own_numbers(clients, tmp_path):
    write_tasks(tmp_path)
    with server_process(tmp_path / "server") as server:
        server.wait_ready()
        model = f"model=demo,base_url={server.url}/v1/completions,tokenizer={DEMO},num_concurrent=4"
        options = ["--model", "local-completions", "--model_args", model, "--batch_size", "8"]
        options += ["--include_path", "tasks", "--tasks", "chooses,writes", "--log_samples", "--output_path", "out"]
        run(clients, "lm_eval", *options, cwd=tmp_path)
    with LLM("demo", **ENGINE) as llm:
        check_choices(llm, samples(tmp_path, "chooses"))
        for logged, question in zip(samples(tmp_path, "writes"), QUESTIONS, strict=True):
            params = SamplingParams(temperature=0, max_tokens=MOST, stop=[UNTIL])
            assert logged["resps"] == [[llm.generate(question, params)[0].outputs[0].text]]


def write_tasks(folder: Path) -> None:
    """Writes two tasks for lm-eval, one of choices and one of texts, and their questions."""
    rows = [{"q": question, "choices": CHOICES, "gold": 0} for question in QUESTIONS]
    (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    for name, metric, own in (("chooses", "acc", CHOOSES), ("writes", "exact_match", WRITES)):
        task = TASK | own | {"task": name, "metric_list": [{"metric": metric}]}
        task["dataset_kwargs"] = {"data_files": {"test": str(folder / "docs.jsonl")}}
        (folder / f"tasks/{name}.yaml").write_text(json.dumps(task))


def check_choices(llm: LLM, logged: list[dict]) -> None:
    """Asserts that each log-likelihood is the engine's own, and that it is greedy where the engine would say the
    same."""
    for own, question in zip(logged, QUESTIONS, strict=True):
        start = len(llm.encode(question))
        for choice, [(told, is_greedy)] in zip(CHOICES, own["resps"], strict=True):
            token_ids = llm.encode(question + choice)
            (output,) = llm.generate([token_ids], SamplingParams(max_tokens=1, prompt_logprobs=1))
            scored = [position[token] for token, position in zip(token_ids[start:], output.prompt_logprobs[start:])]
            assert float(told) == pytest.approx(sum(one.logprob for one in scored), rel=1e-6)
            assert is_greedy in (str(all(one.rank == 1 for one in scored)), all(one.rank == 1 for one in scored))


@pytest.mark.parametrize(
    "most",
    [
        pytest.param(100, marks=pytest.mark.alone),
        pytest.param(1000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def test_schemathesis_finds_no_fault_of_the_servers(clients, tmp_path, most):
    """In so many requests for each route."""
    with server_process(tmp_path / "server", *SHORT) as server:
        server.wait_ready()
        options = ["--checks", "not_a_server_error", "--phases", "coverage,fuzzing", "--seed", "1", "--workers", "2"]
        limits = ["--max-examples", str(most), "--request-timeout", str(ANSWER_S)]
        run(clients, "schemathesis", "run", f"{server.url}/openapi.json", *options, *limits, cwd=tmp_path)
        assert server.health() == 200
