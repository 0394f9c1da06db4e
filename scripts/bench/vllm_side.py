"""vLLM beside the engine, for `--compare vllm`: the same token ids, output counts and arrivals, on the same machine in
the same run, in a process of its own (scripts/bench/vllm_job.py, vllm_batch.py, vllm_server.py) once the engine is
gone."""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.engine.config import EngineConfig
from penstock.engine.planning.find_model import find_model
from penstock.engine.user_files import parse_json
from penstock.scheduler.batching.request import SamplingParams

from scripts.bench.workload import Job

ROOT = Path(__file__).resolve().parents[2]
VERSION = "import importlib.metadata, importlib.util, sys; importlib.util.find_spec('vllm') or sys.exit(1); "
VERSION += "print(importlib.metadata.version('vllm'))"
RUN = "import sys; from scripts.bench.vllm_job import main; main(*sys.argv[1:])"
# In one process, and without kernels that are compiled when first used; the environment may say otherwise.
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
# 0.23 ignores these options in its newer runner
OFFLOADS, OFFLOADING = ("cpu_offload_gb", "offload_group_size"), {"VLLM_USE_V2_MODEL_RUNNER": "0"}
SAMPLING = ("temperature", "top_p", "max_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty")
SAMPLING += ("logprobs", "ignore_eos", "seed")


@dataclass(frozen=True)
class Vllm:
    """An installed vLLM: the interpreter that runs it, its environment and version, and the options of its LLM that
    differ from the engine's."""

    python: str
    environment: dict[str, str]
    version: str
    options: dict[str, Any]


def add_vllm_arguments(parser: argparse.ArgumentParser) -> None:
    text = "where --compare finds vLLM: a Python interpreter, or a folder of packages for this one (default: this one)"
    parser.add_argument("--vllm", default=sys.executable, metavar="PATH", help=text)
    text = 'arguments of vLLM\'s LLM, a JSON object like {"enable_prefix_caching": false}'
    parser.add_argument("--vllm-options", default="{}", metavar="JSON", help=text)


def find_vllm(path: str, options: str) -> Vllm:
    """The vLLM at `path`. Raises ValueError if there is none, or if `options` is no JSON object."""
    wanted = parse_json(options, "--vllm-options")
    if not isinstance(wanted, dict):
        raise ValueError(f"--vllm-options {options}: expected a JSON object")
    is_folder = Path(path).is_dir()
    folders = [str(ROOT), *([path] if is_folder else ()), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = SETTINGS | (OFFLOADING if _offloads(wanted) else {})
    environment = settings | os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    python = sys.executable if is_folder else path
    try:
        found = subprocess.run([python, "-c", VERSION], env=environment, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"--vllm {path}: {error.strerror}") from None
    if found.returncode:
        raise ValueError(f"--compare vllm: no vLLM at {path}; --vllm names an interpreter or a folder that has it")
    return Vllm(python, environment, found.stdout.strip(), wanted)


def _offloads(options: dict[str, Any]) -> bool:
    """Tells whether these options leave weights in host memory."""
    return any(options.get(name) for name in OFFLOADS)


def request_of(job: Job, params: SamplingParams) -> dict[str, Any]:
    """A request as vllm_job takes it."""
    said = {name: getattr(params, name) for name in SAMPLING}
    return {"prompt": job.prompt, "params": {name: value for name, value in said.items() if value is not None}}


def run_of(
    jobs: Sequence[Job],
    params: Sequence[SamplingParams],
    num_warm_up: int,
    repeats: int = 1,
    arrivals: Sequence[float] | None = None,
) -> dict[str, Any]:
    """A run as vllm_job takes it. It returns the shortest of the `repeats`, or, with `arrivals`, the tokens' times."""
    requests = [request_of(job, one) for job, one in zip(jobs, params)]
    return {"requests": requests, "num_warm_up": num_warm_up, "repeats": repeats, "arrivals": arrivals}


def run_vllm(vllm: Vllm, config: EngineConfig, record: dict[str, Any], runs: Sequence[dict]) -> dict[str, Any]:
    """The `runs` in vLLM, with the limits that `record` says the engine had: `version`, `load_s`, `runs` in their
    order, and with weights in host memory `offloaded_bytes`; or `error`, after its output went to standard error, if
    it did not come to an end."""
    with tempfile.TemporaryDirectory(prefix="vllm-") as folder, model_folder(config, folder) as model:
        job, result, log = (Path(folder) / name for name in ("job.json", "result.json", "log"))
        options = options_of(vllm, config, record, model)
        asked = {"options": options, "offloads": _offloads(vllm.options), "runs": list(runs)}
        job.write_text(json.dumps(asked))
        with log.open("w") as output:
            command = [vllm.python, "-c", RUN, str(job), str(result)]
            status = subprocess.run(command, env=vllm.environment, stdout=output, stderr=output).returncode
        if status == 0 and result.exists():
            return json.loads(result.read_text())
        return {"version": vllm.version, "error": f"ended with status {status}: {last_words(log)}"}


def options_of(vllm: Vllm, config: EngineConfig, record: dict[str, Any], model: str) -> dict[str, Any]:
    """Options of its engine: the limits that `record` says ours had, and the user's."""
    return {
        "model": model,
        "skip_tokenizer_init": True,
        "load_format": config.load_format,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "seed": config.seed,
        **{name: record[name] for name in ("dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens")},
        **vllm.options,
    }


def flags_of(options: dict[str, Any]) -> list[str]:
    """Arguments of vLLM's LLM as its command line has them."""
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags


def asynchronous(vllm: Vllm) -> dict[str, str]:
    """The environment for its asynchronous engine, which needs a process of its own."""
    return {name: value for name, value in vllm.environment.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}


def last_words(log: Path) -> str:
    """The last line of its output, of which the end goes to standard error."""
    said = log.read_text(errors="replace")
    print(said[-10_000:], file=sys.stderr)
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "no output")
    return last.strip()[:300]


@contextlib.contextmanager
def model_folder(config: EngineConfig, folder: str) -> Iterator[str]:
    """The model's folder; for a config alone, one that has it as config.json."""
    path = find_model(config.model)
    if path.is_file():
        path = Path(shutil.copy(path, Path(folder) / "config.json")).parent
    yield str(path)
