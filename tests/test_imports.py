"""Who may import whom (docs/architecture.md), from the source: one way only, and at the top of the file."""

import ast
import graphlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cli import COMMANDS
from penstock import _PUBLIC

ROOT = Path(__file__).resolve().parents[1]
OURS = ("engine", "parallel", "scheduler", "scripts", "tests", "penstock")
FILES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
    for pattern in ("penstock.py", *(f"{part}/**/*.py" for part in ("engine", "parallel", "scheduler", "scripts")))
    for path in ROOT.glob(pattern)
}

FOR_ALL = "scheduler.units"  # but for parallel and the kernels, which import nothing of the scheduler's
# The row with the longest matching prefix says what else a module may import of ours beside its own package.
MAY_IMPORT = {
    "parallel": (),
    "scheduler": (),
    "engine.kernels": (),
    "engine.kernels.reduce_residual_norm": ("engine.kernels", "parallel.push_reduce"),
    "engine.config": ("scheduler.request",),
    "engine.tokenizer": ("engine.tokenizer_files",),
    "engine.tokenizer_files": ("engine.user_files",),
    "engine.prompts": ("engine.user_files",),
    "engine.model": ("parallel", "engine.kernels", "engine.user_files", "scheduler.step_plan"),
    "engine.model.attention": ("engine.kernels", "engine.model", "scheduler.pass_work"),  # what the time model knows
    "engine.model.inputs": ("engine.model", "scheduler.batch", "scheduler.request", "scheduler.step_plan"),  # as data
    "engine.weights": (
        *("engine.model.spec", "engine.model.layout", "engine.model.coded_size", "engine.model.families"),
        *("engine.model.config_fields", "engine.user_files", "engine.kernels", "parallel", "scheduler.step_plan"),
    ),
    "engine.runtime": (
        *("engine.model", "engine.weights", "engine.kernels", "parallel", "scheduler"),
        *("engine.config", "engine.device_profile", "engine.memory_claims", "engine.planning", "engine.user_files"),
    ),
    "engine": (
        *("engine.config", "engine.device_profile", "engine.model", "engine.planning", "engine.step_cost"),
        *("engine.memory_claims", "engine.tokenizer", "engine.user_files", "parallel.shard", "scheduler"),
    ),
    "engine.flags": ("engine.config",),
    "engine.streams": ("parallel.failure",),
    "engine.cli": ("engine.flags", "engine.streams", "engine.version", "parallel.failure"),
    "engine.llm": (
        *("engine.config", "engine.loop", "engine.output", "engine.planning", "engine.runtime", "engine.tokenizer"),
        *("engine.turns", "engine.user_files", "parallel.launch", "parallel.rendezvous", "scheduler"),
    ),
    "engine.loop": ("engine.output", "engine.runtime", "scheduler"),
    "engine.turns": (),
    "engine.plan_command": (
        *("engine.config", "engine.model", "engine.planning", "engine.streams", "engine.weights.read_model"),
        *("parallel.launch", "scheduler"),
    ),
    "engine.generate_command": (
        *("engine.config", "engine.llm", "engine.output", "engine.plan_command", "engine.planning", "engine.prompts"),
        *("parallel.launch", "scheduler"),
    ),
    "engine.device_profile": ("engine.streams", "engine.user_files", "scheduler.time_model"),
    "engine.probe_report": ("engine.device_profile",),
    "engine.probe_command": (
        *("engine.config", "engine.device_profile", "engine.probe_report", "engine.runtime.probe", "parallel"),
        "engine.user_files",
    ),
    "engine.traced_run": (
        *("engine.config", "engine.llm", "engine.output", "engine.planning", "engine.runtime.trace", "scheduler"),
    ),
    "engine.trace_plot": ("engine.runtime.trace", "scheduler"),
    "engine.pass_profile": ("engine.planning", "engine.runtime.trace", "engine.traced_run", "scheduler"),
    "engine.profile_command": (
        *("engine.config", "engine.pass_profile", "engine.runtime.trace", "engine.trace_plot", "engine.traced_run"),
        "engine.user_files",
    ),
    "engine.pack_command": (
        *("engine.config", "engine.planning", "engine.weights", "parallel.topology", "scheduler.demand"),
    ),
    "engine.unpack_command": (
        *("engine.config", "engine.pack_command", "engine.planning", "engine.weights", "parallel.topology"),
        "scheduler.demand",
    ),
    "engine.split": (
        *("engine.config", "engine.kernels", "engine.llm", "engine.model", "engine.planning", "engine.runtime"),
        *("engine.step_cost", "engine.weights", "parallel", "scheduler"),
    ),
    "engine.split_command": (
        *("engine.config", "engine.generate_command", "engine.prompts", "engine.split", "scheduler.request"),
    ),
    "engine.split_device_command": ("engine.config", "engine.split.channel", "parallel.failure"),
    "engine.worker_command": ("engine.config", "engine.runtime.rank", "parallel"),
    "penstock": ("engine.streams", "engine.version", "parallel.failure"),
    "scripts": ("engine", "parallel", "scheduler", "penstock", "scripts"),
}
NOBODY_IMPORTS = ("scripts", "tests", "engine.cli", "penstock")
# A late import needs a reason: the parent is watched before torch comes in; torch only where a report measures;
# transformers only where it is compared; safetensors only where a checkpoint is written.
LATE_IMPORTS = {
    "engine.worker_command": {"engine.runtime.rank", "parallel.launch"},
    "engine.probe_command": {"engine.runtime.probe", "parallel.group"},
    "engine.split_device_command": {"engine.split.channel"},
    "scripts.transfer_report": {"engine.split.llm"},
    "scripts.comparison": {"scripts.baselines"},
    "scripts.benchmark_startup": {"scripts.dummy_checkpoint"},
}
PURE = [
    *("penstock", "engine.cli", "engine.config", "engine.device_profile", "engine.flags", "engine.probe_report"),
    *("engine.memory_claims", "engine.planning", "engine.plan_command", "engine.step_cost"),
    *(f"engine.model.{name}" for name in ("spec", "families", "config_fields", "layout", "steps", "coded_size")),
    *(f"engine.weights.{name}" for name in ("safetensors_header", "packed_metadata", "read_model")),
    *("engine.user_files", "engine.kernels.code_tile", "engine.streams"),
    *(f"engine.split.{name}" for name in ("transfers", "report", "flags")),
    *("parallel.ledger", "parallel.shard", "parallel.failure", "parallel.children", "parallel.launch"),
    *(name for name in FILES if name.split(".")[0] == "scheduler"),
]
THIRD_PARTY = {"engine": {"torch", "tokenizers", "tqdm", "triton"}, "parallel": {"torch", "triton"}, "scheduler": set()}
EXTRAS = {"engine.trace_plot": {"matplotlib"}}  # what only one module needs, and only if it is used
PICKLES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "multiprocessing"}


def imports_of(tree: ast.AST) -> list[tuple[str, ast.AST]]:
    """Every imported module with its node; `from package import module` names the module."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name if name in FILES else node.module, node) for name in inner]
    return found


TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
IMPORTS = {name: {target for target, _ in imports_of(tree)} for name, tree in TREES.items()}
OWN = {name: {target for target in targets if target.split(".")[0] in OURS} for name, targets in IMPORTS.items()}


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def row_of(name: str) -> str:
    return max((row for row in MAY_IMPORT if is_within(name, row)), key=len)


def reached(name: str) -> set[str]:
    """All modules that come in with `name`, of ours (with their packages) and of others."""
    seen, todo = set(), [name]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += IMPORTS.get(current, ())
            todo += [current.rpartition(".")[0]] if "." in current else []
    return seen


def test_the_tree_was_found():
    assert {"penstock", "engine.llm", "engine.runtime.rank", "parallel.launch", "scheduler.batching"} <= set(FILES)
    assert "torch" in reached("engine.llm") and "engine.model.ops" in reached("engine.llm")


@pytest.mark.parametrize("name", FILES)
def test_directions(name):
    row = row_of(name)
    package = row if row in FILES and FILES[row].name == "__init__.py" else name
    package = name if row == "engine" else package
    for target in OWN[name]:
        units = target == FOR_ALL and not any(is_within(name, apart) for apart in ("parallel", "engine.kernels"))
        allowed = units or is_within(target, package) or any(is_within(target, other) for other in MAY_IMPORT[row])
        assert allowed, f"{name} may not import {target}"
        assert target in FILES, f"{name} imports {target}, which is not there"


@pytest.mark.parametrize("name", [name for name in FILES if not is_within(name, "scripts")])
def test_nobody_imports_what_stands_at_the_top(name):
    for target in OWN[name]:
        assert not any(is_within(target, top) for top in NOBODY_IMPORTS if not is_within(name, top))


def test_no_cycles():
    list(graphlib.TopologicalSorter(OWN).static_order())  # raises CycleError, which shows the circle


@pytest.mark.parametrize("name", FILES)
def test_imports_stand_at_the_top(name):
    """Before any other statement; `try` and `if` may choose between imports there."""
    tree, late, body_began = TREES[name], [], False
    at_top = set()
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
    packages = [path for path in FILES.values() if path.name == "__init__.py"]
    assert len(packages) >= 6
    assert [str(path) for path in packages if path.read_text().strip()] == []


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_reach_nothing_heavy(name):
    others = {module.split(".")[0] for module in reached(name)} - set(OURS) - sys.stdlib_module_names
    assert others == set()


@pytest.mark.parametrize("name", [name for name in FILES if not is_within(name, "scripts")])
def test_third_party(name):
    others = {module.split(".")[0] for module in IMPORTS[name]} - set(OURS) - sys.stdlib_module_names
    assert others <= THIRD_PARTY.get(name.split(".")[0], set()) | EXTRAS.get(name, set())


@pytest.mark.parametrize("name", [name for name in FILES if not is_within(name, "scripts")])
def test_nothing_is_pickled(name):
    assert not {module.split(".")[0] for module in IMPORTS[name]} & PICKLES
    attributes = {ast.unparse(node) for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)}
    assert not attributes & {"torch.load", "torch.save", "dist.broadcast_object_list", "dist.all_gather_object"}


@pytest.mark.parametrize("target", [*_PUBLIC.values(), *(module for module, _ in COMMANDS.values())])
def test_names_that_are_imported_late_exist(target):
    assert importlib.util.find_spec(target) is not None


def test_triton_has_one_door():
    """Beside it only parallel, which imports nothing of ours."""
    whoever = {name for name in FILES if any(target.split(".")[0] == "triton" for target in IMPORTS[name])}
    assert whoever == {"engine.kernels.triton_door", "parallel.push_reduce"}


def without_triton(*lines: str) -> subprocess.CompletedProcess:
    """A process of these lines in which Triton cannot be imported, as on a CPU install."""
    program = "\n".join(["import importlib, sys", "sys.modules['triton'] = None", *lines])
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)


def test_nothing_needs_triton_to_be_imported():
    """What would launch a kernel is refused; there is no launch of what stands in for one."""
    names = [name for name in FILES if name.split(".")[0] in OURS[:3] and name != "engine.trace_plot"]
    done = without_triton(
        f"[importlib.import_module(name) for name in {names}]",
        "import torch",
        "from engine.kernels.gated_activation import _activate_rows, _gated_activation_triton, gated_activation",
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
