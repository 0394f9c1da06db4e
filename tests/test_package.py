"""The only name that `pip install` puts beside other packages is `penstock`; it and the source tree run in any folder,
whatever a user's own files there are called."""

import os
import shutil
import subprocess
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from penstock import LLM, SamplingParams
from tests.support.commands import PENSTOCK, ROOT, TORCHRUN
from tests.support.installs import (
    OWNED,
    Environment,
    build_wheel,
    copy_of_the_tree,
    write_stand_in,
    write_users_files,
)

PROMPT = "Return the"
GENERATE = (*PENSTOCK, "generate", "--model", "demo", "--prompt", PROMPT, "--max-tokens", "4", "--temperature", "0")
SCRIPT = f"""
import os
from penstock import LLM, SamplingParams

with LLM("demo", tensor_parallel_size=2) as llm:
    (output,) = llm.generate([{PROMPT!r}], SamplingParams(temperature=0, max_tokens=4))
if os.environ.get("RANK", "0") == "0":
    print(output.outputs[0].text)
"""
WAYS = {
    "module": (*GENERATE, "-tp", "2"),
    "script": ("use.py",),
    "torchrun module": (*TORCHRUN, *GENERATE),
    "torchrun script": (*TORCHRUN, "use.py"),
}
SHOW_PATH = ("-c", "import penstock; print(*penstock.__path__, sep='\\n')")


class Ours(NamedTuple):
    """Penstock in an environment: the folder that holds `penstock`, and PYTHONPATH where that is not installed."""

    environment: Environment
    holder: Path
    path: str | None = None

    def run(self, *arguments: str | Path, folder: Path) -> subprocess.CompletedProcess:
        return self.environment.run(*arguments, folder=folder, path=self.path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("package").resolve()


@pytest.fixture(scope="module")
def tree(folder):
    return copy_of_the_tree(folder / "tree")


@pytest.fixture(scope="module")
def wheel(folder, tree):
    return build_wheel(tree, folder / "dist")


@pytest.fixture(scope="module")
def users(folder):
    """A user's project, with a script in it."""
    users = write_users_files(folder / "users")
    (users / "use.py").write_text(SCRIPT)
    return users


@pytest.fixture(scope="module")
def text():
    """The text that the checkout generates, in this process."""
    with LLM("demo") as llm:
        (output,) = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=4))
    return output.outputs[0].text


@pytest.fixture(scope="module")
def ways_in(folder, tree, wheel):
    """Penstock by each way in: installed before and after the stand-in, editable, from the source tree."""
    stand_in = write_stand_in(folder)
    first, last, editable = (Environment(folder / name) for name in ("first", "last", "editable"))
    for environment, wheels in ((first, (wheel, stand_in)), (last, (stand_in, wheel))):
        for one in wheels:
            environment.install(one)
    editable.install("-e", tree)
    bare = Environment(folder / "bare")
    return {
        "first": Ours(first, first.site),
        "last": Ours(last, last.site),
        "editable": Ours(editable, tree),
        "source": Ours(bare, ROOT, str(ROOT)),
    }


def tree_of(top: str) -> set[str]:
    """Paths of the files below `top` that belong in a wheel, as they are in it."""
    files = [path for path in (ROOT / top).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    inner = "" if top == "penstock" else "penstock/"
    return {f"{inner}{path.relative_to(ROOT)}" for path in files}


def test_the_wheel_is_the_tree_in_one_package(wheel):
    """Every module, and the files of the demo model."""
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {name for name in names if name.startswith("penstock/")}
    assert ours == set().union(*map(tree_of, ("engine", "parallel", "scheduler", "penstock")))
    assert "penstock/engine/demo_model/config.json" in ours
    assert {name.split("/")[0] for name in names - ours} == {"penstock-0.1.0.dist-info"}


@pytest.mark.parametrize("order", ["first", "last"])
def test_nothing_else_of_ours_lies_beside_other_packages(ways_in, order, folder):
    site = ways_in[order].holder
    theirs = {"others.pth", "standin-1.0.dist-info", *OWNED}
    assert {path.name for path in site.iterdir()} - theirs == {"penstock", "penstock-0.1.0.dist-info"}
    for name in OWNED:
        assert {path.name for path in (site / name).iterdir()} - {"__pycache__"} == {"__init__.py"}
    program = ["import importlib", "import penstock.engine.config, penstock.scheduler.units"]
    program += [f"print(importlib.import_module({name!r}).OWNER)" for name in OWNED]
    done = ways_in[order].run("-c", "\n".join(program), folder=folder)
    assert done.stdout.split() == ["standin"] * len(OWNED), done.stderr


def test_the_command_is_installed(ways_in, users, text):
    ours = ways_in["first"]
    done = ours.run(ours.environment.bin / "penstock", *GENERATE[2:], folder=users)
    assert (done.returncode, done.stdout) == (0, text + "\n"), done.stderr


@pytest.mark.parametrize(
    "way_in, way",
    [
        *(("last", "torchrun script"), ("source", "module"), ("source", "torchrun module"), ("editable", "script")),
        *(pytest.param(*one, marks=pytest.mark.soak) for one in (("last", "module"), ("last", "script"))),
        pytest.param("source", "script", marks=pytest.mark.soak),
    ],
)
def test_a_users_own_files_are_never_imported(ways_in, users, text, way_in, way):
    """Neither by rank 0 nor by another rank, whoever starts it. Each way, of 5 to 10 s, is tried once."""
    done = ways_in[way_in].run(*WAYS[way], folder=users)
    assert (done.returncode, done.stdout) == (0, text + "\n"), done.stderr


@pytest.mark.parametrize("way_in", ["first", "last", "editable", "source"])
def test_only_a_checkout_holds_the_root(ways_in, users, way_in):
    """In an installation the folder that holds `penstock` is everybody's, whatever the current one looks like."""
    ours = ways_in[way_in]
    done = ours.run(*SHOW_PATH, folder=users)
    root = [str(ours.holder)] if way_in in ("editable", "source") else []
    assert done.stdout.splitlines() == [str(ours.holder / "penstock"), *root], done.stderr


@pytest.mark.parametrize("setup", [b"[install]\nprefix=\n", b"[metadata]\nname = \xe9\n", None])
def test_another_setup_file_makes_no_checkout(tmp_path, ways_in, setup):
    """As `pip install --target` leaves it in a project's folder; None is a folder of that name."""
    shutil.copytree(ways_in["first"].holder / "penstock", tmp_path / "penstock")
    (tmp_path / "engine").mkdir()
    if setup is None:
        (tmp_path / "setup.cfg").mkdir()
    else:
        (tmp_path / "setup.cfg").write_bytes(setup)
    done = ways_in["source"].environment.run(*SHOW_PATH, folder=tmp_path)
    assert done.stdout.splitlines() == [str(tmp_path / "penstock")], done.stderr


@pytest.mark.parametrize("way_in", ["first", "editable", "source"])
def test_children_are_given_the_folder_that_holds_the_package(ways_in, users, way_in):
    program = "from penstock.parallel.launch import python_path; print(python_path())"
    done = ways_in[way_in].run("-c", program, folder=users)
    assert done.stdout.rstrip().split(":")[0] == str(ways_in[way_in].holder), done.stderr


def test_make_replaces_a_copy_that_pip_installed(tmp_path):
    (tmp_path / "installed").touch()
    asked = ["make", "--question", f"VENV={tmp_path}", f"{tmp_path}/installed"]
    assert subprocess.run(asked, cwd=ROOT).returncode == 0
    copy = tmp_path / "lib/python3.12/site-packages/penstock/__init__.py"
    copy.parent.mkdir(parents=True)
    copy.touch()
    os.utime(copy, (time.time() + 10, time.time() + 10))
    assert subprocess.run(asked, cwd=ROOT).returncode == 1
