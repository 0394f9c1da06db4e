"""Who may import whom (docs/architecture.md), from the source: one way only, and at the top of the file.

Names here are those below `penstock`: `engine.llm` is penstock.engine.llm, in engine/llm.py.
"""

import ast
import configparser
import functools
import graphlib
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from penstock.engine.commands.cli import COMMANDS

from penstock import PUBLIC

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("engine", "parallel", "scheduler")
FILES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
    for top in (*TOPS, "penstock", "scripts")
    for path in ROOT.glob(f"{top}/**/*.py")
}

FOR_ALL = "scheduler.units"  # but for parallel and the kernels, which import nothing of the scheduler's
# What a room may import beside itself; the row with the longest matching prefix holds.
BELOW_RUNTIME = (
    "engine.compute",
    "engine.config",
    "engine.kernels",
    "engine.measure",
    "engine.model",
    "engine.planning",
)
BELOW_RUNTIME += ("engine.streams", "engine.user_files", "engine.weights", "parallel", "scheduler")
MAY_IMPORT = {
    "parallel": (),
    "scheduler": (),
    "engine.version": (),
    "engine.user_files": (),
    "engine.streams": ("parallel.failure",),
    "engine.turns": (),
    "engine.text": ("engine.user_files", "engine.weights.gguf_file", "scheduler.batching.request"),
    "engine.text.model_text": (
        "engine.config",
        "engine.planning.find_model",
        "engine.text",
        "engine.weights.gguf_file",
        "engine.weights.read_model",
    ),
    "engine.text.model_prompts": ("engine.config", "engine.output", "engine.text", "scheduler.batching"),
    "engine.output": ("engine.kernels.packed_scores", "engine.text", "scheduler.batching"),
    "engine.config": ("scheduler",),
    "engine.server.histogram": (),
    "engine.server.metrics": (
        "engine.runtime.pass_times",
        "engine.server.engine_state",
        "engine.server.histogram",
        "engine.server.journey",
        "scheduler.batching",
    ),
    "engine.server.pages": ("engine.server.metrics", "engine.server.service"),
    "engine.server.request_log": (),
    "engine.server.status": (
        "engine.runtime.pass_times",
        "engine.server.engine_state",
        "engine.server.metrics",
        "engine.server.service",
        "engine.version",
    ),
    "engine.server.engine_facts": (
        "engine.llm",
        "engine.planning.engine_plan",
        "engine.server.engine_state",
        "scheduler",
    ),
    "engine.server.engine_work": (
        "engine.llm",
        "engine.loop",
        "engine.output",
        "engine.runtime.progress",
        "engine.server",
        "scheduler.batching",
    ),
    "engine.kernels": ("parallel.push_reduce", "parallel.triton_door"),
    "engine.model": (
        "engine.kernels.codec_tile",
        "engine.kernels.ggml_types",
        "engine.user_files",
        "scheduler.passes",
    ),
    "engine.planning": (
        "engine.config",
        "engine.kernels.matmul_tiles",
        "engine.kernels.segments",
        "engine.model",
        "engine.user_files",
        "engine.weights.headers",
        "engine.streams",
        "scheduler",
    ),
    "engine.weights": ("engine.kernels", "engine.model", "engine.user_files", "parallel", "scheduler.passes"),
    "engine.compute": (
        "engine.kernels",
        "engine.model",
        "engine.planning",
        "engine.weights.views",
        "parallel",
        "scheduler",
    ),
    "engine.measure": ("engine.compute.arena", "engine.kernels", "engine.planning", "engine.weights", "parallel"),
    "engine.runtime": BELOW_RUNTIME,
    "engine.llm": (*BELOW_RUNTIME, "engine.loop", "engine.output", "engine.runtime", "engine.text", "engine.turns"),
    "engine.loop": ("engine.compute.sampler", "engine.output", "engine.runtime", "scheduler.batching"),
    "engine.profile": (*BELOW_RUNTIME, "engine.llm", "engine.output", "engine.runtime"),
    "engine.split": (*BELOW_RUNTIME, "engine.llm", "engine.runtime"),
    "engine.server": (
        "engine.runtime.heap",
        "engine.runtime.pass_times",
        "engine.runtime.progress",
        "engine.config",
        "engine.output",
        "engine.planning.engine_plan",
        "engine.planning.find_model",
        "engine.streams",
        "engine.text",
        "engine.user_files",
        "engine.version",
        "engine.weights.gguf_file",
        "parallel",
        "scheduler",
    ),
    "engine.batch": (
        "engine.config",
        "engine.llm",
        "engine.output",
        "engine.planning",
        "engine.runtime.pass_times",
        "engine.server",
        "engine.text.model_text",
        "engine.user_files",
        "engine.weights.gguf_file",
        "scheduler",
    ),
    "engine.commands": ("engine", "parallel", "scheduler"),
    "penstock": ("engine.streams", "parallel.failure"),
    "scripts": ("engine", "parallel", "scheduler", "penstock"),
}
NOBODY_IMPORTS = ("scripts", "tests", "engine.commands", "penstock")
# A late import needs a reason: the parent is watched before torch comes in; a command says its help and a user's
# mistakes before that; a server's front is without torch, and its libraries come in while its engine's process loads;
# torch only where a report measures; transformers only where it is compared; safetensors only where a checkpoint is
# written; sentencepiece only where a tokenizer.model is read.
LATE_IMPORTS = {
    **dict.fromkeys(("engine.commands.chat", "engine.commands.generate"), {"engine.commands.said", "engine.llm"}),
    "engine.commands.batch": {"engine.llm"},
    "engine.commands.worker": {"engine.runtime.start_engine", "parallel.launch"},
    "engine.commands.engine": {
        "engine.commands.said",
        "engine.llm",
        "engine.server.channel",
        "engine.server.engine_work",
    },
    "engine.commands.serve": {
        "engine.llm",
        "engine.server.metrics",
        "engine.server.server",
        "engine.server.service",
    },
    "engine.commands.probe": {"engine.runtime.probe", "parallel.group"},
    "engine.commands.split_device": {"engine.split.channel"},
    "engine.text.sentencepiece_file": {"sentencepiece"},
    "scripts.research.transfer_report": {"engine.split.llm"},
    "scripts.bench.comparison": {"scripts.bench.baselines"},
    "scripts.bench.startup": {"scripts.bench.dummy_checkpoint"},
    "scripts.bench.vllm_job": {"vllm.model_executor.offloader"},
}
NUMBERS_OF_KERNELS = ("engine.kernels.codec_tile", "engine.kernels.ggml_types", "engine.kernels.segments")
TORCH_FREE = ("scheduler", "engine.planning", "engine.config", "engine.user_files", *NUMBERS_OF_KERNELS)
TORCH_FREE += (
    "engine.kernels.packed_scores",
    "engine.model",
    "engine.measure.probe_report",
    "engine.weights.headers",
    "engine.weights.gguf_file",
    "engine.weights.read_model",
    "penstock",
)
TORCH_FREE += (
    "engine.streams",
    "engine.commands.cli",
    "engine.commands.flags",
    "engine.commands.plan",
    "engine.commands.prompts",
)
TORCH_FREE += ("engine.split.transfers", "engine.split.report", "engine.split.flags")
TORCH_FREE += ("parallel.ledger", "parallel.failure", "parallel.children", "parallel.launch")
THIRD_PARTY = {"engine": {"numpy", "torch", "tokenizers", "tqdm", "triton"}, "parallel": {"torch", "triton"}}
EXTRAS = {  # what only one module needs, and only if it is used
    "engine.profile.trace_plot": {"matplotlib"},
    "engine.server.histogram": {"prometheus_client"},
    "engine.server.metrics": {"prometheus_client"},
    "engine.server.pages": {"fastapi"},
    "engine.text.sentencepiece_file": {"sentencepiece"},
    "engine.text.template_process": {"jinja2"},
    "engine.server.access": {"starlette"},
    "engine.server.app": {"fastapi", "starlette"},
    "engine.server.connection": {"h11", "uvicorn"},
    "engine.server.delivery": {"starlette"},
    "engine.server.server": {"uvicorn"},
}
PICKLES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "multiprocessing"}


def imports_of(tree: ast.AST) -> list[tuple[str, ast.AST]]:
    """Every imported module with its node, ours by their names here; `from package import module` names the module."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.removeprefix("penstock."), node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            module = node.module.removeprefix("penstock.")
            inner = [f"{module}.{alias.name}" for alias in node.names]
            found += [(name if name in FILES else module, node) for name in inner]
    return found


@functools.cache  # by the worker that has these tests, and not by each that collects them
def tree_of(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


@functools.cache
def imports(name: str) -> frozenset[str]:
    """All that a module imports."""
    return frozenset(target for target, _ in imports_of(tree_of(name)))


def own(name: str) -> set[str]:
    """Those of them that are ours."""
    return {target for target in imports(name) if target.split(".")[0] in OURS}


OURS = (*TOPS, "penstock", "scripts", "tests")
PRODUCT = [name for name in FILES if not name.startswith("scripts")]


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def reached(name: str) -> set[str]:
    """All modules that come in with `name`, of ours (with their packages) and of others."""
    seen, todo = set(), [name]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += imports(current) if current in FILES else ()
            todo += [current.rpartition(".")[0]] if "." in current else []
    return seen


def foreign(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules} - set(OURS) - sys.stdlib_module_names


def of_all(names: Collection[str]) -> Callable[[Callable[[str], None]], Callable[[], None]]:
    """Makes one test of a check of each module; it names all that fail. Fifteen hundred tests of their own would take
    longer to begin than to run."""

    def one_test(check: Callable[[str], None]) -> Callable[[], None]:
        def test() -> None:
            wrong = {}
            for name in names:
                try:
                    check(name)
                except AssertionError as error:
                    wrong[name] = str(error)
            assert names and not wrong, wrong

        return test

    return one_test


def test_a_check_of_all_names_those_that_fail():
    def check(name: str) -> None:
        assert name == "right", f"{name} is wrong"

    of_all(["right"])(check)()
    with pytest.raises(AssertionError, match="(?s)left is wrong.*up is wrong"):
        of_all(["right", "left", "up"])(check)()
    with pytest.raises(AssertionError):
        of_all([])(check)()


def test_the_tree_was_found():
    assert {"penstock", "engine.llm", "parallel.launch", "scheduler.batching.scheduler"} <= set(FILES)
    assert "torch" in reached("engine.llm") and "engine.compute.ops" in reached("engine.llm")


@of_all(FILES)
def test_directions(name):
    room = max((row for row in MAY_IMPORT if is_within(name, row)), key=len, default=name)
    for target in own(name):
        units = target == FOR_ALL and not any(is_within(name, apart) for apart in ("parallel", "engine.kernels"))
        allowed = units or any(is_within(target, other) for other in (room, *MAY_IMPORT.get(room, ())))
        assert allowed, f"{name} may not import {target}"
        assert target in FILES, f"{name} imports {target}, which is not there"


@of_all(PRODUCT)
def test_nobody_imports_what_stands_at_the_top(name):
    for target in own(name):
        assert not any(is_within(target, top) for top in NOBODY_IMPORTS if not is_within(name, top))


def test_few_files_stand_loose_in_the_engine():
    assert len([name for name, path in FILES.items() if path.parent == ROOT / "engine" and "." in name]) <= 8


def test_no_cycles():
    graph = {name: own(name) for name in FILES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which shows the circle


@of_all(FILES)
def test_imports_stand_at_the_top(name):
    """Before any other statement; `try` and `if` may choose between imports there."""
    tree, body_began, at_top = tree_of(name), False, set()
    for node in tree.body:
        chooses = isinstance(node, (ast.Try, ast.If)) and any(True for _ in imports_of(node))
        if isinstance(node, (ast.Import, ast.ImportFrom)) or chooses:
            assert not body_began or chooses, f"{name}, line {node.lineno}: an import after other statements"
            at_top |= {id(inner) for _, inner in imports_of(node)}
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            body_began = True
    late = {target for target, node in imports_of(tree) if id(node) not in at_top}
    assert late == LATE_IMPORTS.get(name, set())


def test_package_files_are_empty():
    packages = [path for path in FILES.values() if path.name == "__init__.py" and path.parent.name != "penstock"]
    assert len(packages) >= 12
    assert [str(path) for path in packages if path.read_text().strip()] == []


def test_the_wheel_holds_every_package():
    """setup.cfg maps folders at the top into `penstock`, which setuptools cannot find by itself."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    there = {f"penstock.{name}" for name in PRODUCT if FILES[name].name == "__init__.py" and name != "penstock"}
    assert set(config["options"]["packages"].split()) == there | {"penstock"}


@of_all([name for name in FILES if any(is_within(name, room) for room in TORCH_FREE)])
def test_torch_free_modules_reach_nothing_heavy(name):
    assert foreign(reached(name)) == set()


@pytest.mark.parametrize("name", ["engine.server.server", "engine.server.engine_process", "engine.server.app"])
def test_the_front_of_a_server_has_no_torch(name):
    assert not foreign(reached(name)) & {"torch", "triton"}


@of_all(PRODUCT)
def test_third_party(name):
    assert foreign(imports(name)) <= THIRD_PARTY.get(name.split(".")[0], set()) | EXTRAS.get(name, set())


@of_all(PRODUCT)
def test_nothing_is_pickled(name):
    assert not {module.split(".")[0] for module in imports(name)} & PICKLES
    attributes = {ast.unparse(node) for node in ast.walk(tree_of(name)) if isinstance(node, ast.Attribute)}
    assert not attributes & {"torch.load", "torch.save", "dist.broadcast_object_list", "dist.all_gather_object"}


# `import os, engine`, `from engine.llm import`, `-m engine.llm`, "engine.llm.name": a second copy of each module, in
# silence
_TOP = "|".join(TOPS)
_IMPORT = rf"(?<![\w.])(?:import\s+(?:[\w.]+\s*,\s*)*|from\s+|-m\s+)(?:{_TOP})\b(?!/)"
TOP_LEVEL = re.compile(rf"{_IMPORT}|^(?:{_TOP})(?:\.\w*)+$")
IMPORTERS = {"import_module", "find_spec", "__import__", "run_module", "importorskip"}


def top_level_uses(tree: ast.AST) -> list[int]:
    """The lines in which something at the top of the tree is named as a module: by an import, in a string, after `-m`
    in a command line, or for a function that imports."""
    lines = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in IMPORTERS:
            names += [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        items = node.elts if isinstance(node, (ast.List, ast.Tuple)) else getattr(node, "args", None)
        words = [getattr(item, "value", None) for item in items] if isinstance(items, list) else []
        names += [str(after) for flag, after in itertools.pairwise(words) if flag == "-m"]
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if {name.split(".")[0] for name in names} & set(TOPS) or TOP_LEVEL.search(text):
            lines.append(node.lineno)
    return lines


def test_top_level_names_are_not_imported():
    for path in [*FILES.values(), *ROOT.glob("tests/**/*.py")]:
        assert path == Path(__file__) or top_level_uses(ast.parse(path.read_text())) == [], path
    for path in [ROOT / "README.md", ROOT / "Makefile", ROOT / ".ci/run", *ROOT.glob("docs/*.md")]:
        assert not re.search(rf"-m\s+(?:{_TOP})\b", path.read_text()), path


@pytest.mark.parametrize(
    "line",
    [
        "import engine",
        "import os, engine.llm",
        "from scheduler.units import ms",
        "from parallel import launch",
        "run('import engine')",
        "run('import os, parallel.launch')",
        "run(f'from engine.{name} import x')",
        "run('python -m engine.commands.cli')",
        "run(['-m', 'engine'])",
        "run('-m', 'scheduler')",
        "patch('engine.llm.LLM')",
        "patch(f'engine.{name}')",
        "importlib.import_module('scheduler')",
        "__import__('parallel')",
    ],
)
def test_every_use_of_a_top_level_name_is_seen(line):
    assert top_level_uses(ast.parse(line)) != []
    ours = re.sub(r"\b(engine|parallel|scheduler)\b", r"penstock.\1", line)
    assert top_level_uses(ast.parse(ours)) == []


@pytest.mark.parametrize("target", [*PUBLIC.values(), *(command.module for command in COMMANDS.values())])
def test_names_that_are_imported_late_exist(target):
    assert importlib.util.find_spec(target) is not None


def test_triton_has_one_door():
    whoever = {name for name in FILES if any(target.split(".")[0] == "triton" for target in imports(name))}
    assert whoever == {"parallel.triton_door"}


def without_triton(*lines: str) -> subprocess.CompletedProcess:
    """A process of these lines in which Triton cannot be imported, as on a CPU install."""
    program = "\n".join(["import importlib, sys", "sys.modules['triton'] = None", *lines])
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)


def test_nothing_needs_triton_to_be_imported():
    """Calls that would launch a kernel are refused; there is no launch of what stands in for one."""
    names = [f"penstock.{name}" for name in PRODUCT if name.split(".")[0] in TOPS and name not in EXTRAS]
    module = "penstock.engine.kernels.gated_activation"
    done = without_triton(
        f"[importlib.import_module(name) for name in {names}]",
        "import torch",
        f"from {module} import _activate_rows, _gated_activation_triton, gated_activation",
        "gated_activation(torch.ones(1, 4), 'silu', True)",
        "for run in (lambda: _gated_activation_triton(torch.ones(1, 4), 'silu', True), lambda: _activate_rows[(1,)]):",
        "    try:",
        "        run()",
        "    except (ValueError, TypeError) as error:",
        "        print(error)",
    )
    assert done.returncode == 0, done.stderr
    refused, no_launch = done.stdout.splitlines()
    assert refused == "gated_activation on a GPU needs triton; install it or use device='cpu'"
    assert no_launch == "'_Absent' object is not subscriptable"
