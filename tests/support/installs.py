"""Penstock as users have it: from a wheel or editable, in environments of their own that nothing is fetched for.

    wheel = build_wheel(copy_of_the_tree(folder / "tree"), folder / "dist")
    installed = Environment(folder / "environment")
    installed.install(wheel)
    done = installed.run("-m", "penstock", "--version", folder=users_folder)

Beside it what may be in its way: a wheel of somebody else's that owns our folders' names, and a user's own files.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

from tests.support.commands import LAUNCH_NAMES, ROOT

OWNED = ("engine", "scheduler")
SOURCES = ("engine", "parallel", "scheduler", "penstock", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
_NOT_FETCHED = ("--no-deps", "--no-index", "--no-build-isolation")


def copy_of_the_tree(folder: Path) -> Path:
    """The copy that a wheel is built from: setuptools writes into the tree that it builds."""
    folder.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    return folder


def build_wheel(tree: Path, folder: Path) -> Path:
    _checked([*_PIP, "wheel", *_NOT_FETCHED, "--wheel-dir", str(folder), str(tree)])
    (wheel,) = folder.glob("penstock-*.whl")
    return wheel


def write_stand_in(folder: Path) -> Path:
    """The wheel of another project, which owns packages at the top that have our folders' names."""
    wheel, info = folder / "standin-1.0-py3-none-any.whl", "standin-1.0.dist-info"
    files = {f"{name}/__init__.py": "OWNER = 'standin'\n" for name in OWNED}
    files[f"{info}/METADATA"] = "Metadata-Version: 2.1\nName: standin\nVersion: 1.0\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def write_users_files(folder: Path) -> Path:
    """A user's project: modules and a package that have our folders' names and end whoever imports them, and a
    setup.cfg."""
    (folder / "engine").mkdir(parents=True)
    modules = [folder / "engine/__init__.py", *(folder / f"{name}.py" for name in ("engine", "scheduler", "parallel"))]
    for module in modules:
        module.write_text(f"import os\nprint('{module.name} was imported', flush=True)\nos._exit(99)\n")
    (folder / "setup.cfg").write_text("[metadata]\nname = of-the-user\n")
    return folder


class Environment:
    """A virtual environment in `folder` that sees what this one has, but no Penstock until it is installed."""

    def __init__(self, folder: Path):
        venv.create(folder, symlinks=True)
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        self.site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
        others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (self.site / "others.pth").write_text("\n".join(others) + "\n")

    def install(self, *what: str | Path) -> None:
        """A wheel, or `-e` and a tree; as if nothing else were there."""
        python = ["--python", str(self.python)]
        _checked([*_PIP, *python, "install", *_NOT_FETCHED, "--ignore-installed", *map(str, what)])

    def run(self, *arguments: str | Path, folder: Path, path: str | None = None) -> subprocess.CompletedProcess:
        """Python with these arguments in `folder`, with `path` as its PYTHONPATH."""
        dropped = {*LAUNCH_NAMES, "PYTHONPATH", "PYTHONSAFEPATH"}
        env = {name: value for name, value in os.environ.items() if name not in dropped} | {"OMP_NUM_THREADS": "1"}
        if path is not None:
            env["PYTHONPATH"] = path
        command = [self.python, *arguments]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)


def _checked(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
