"""docs/architecture.md names every module, and none that is not there; README shows what `penstock plan` prints."""

import re
import shlex
from pathlib import Path

import pytest
from penstock.engine.commands.cli import main

ROOT = Path(__file__).resolve().parents[1]
TREES = ("penstock", "parallel", "scheduler", "engine", "scripts")


def listed_modules() -> set[str]:
    """Paths in the tree of docs/architecture.md, from its indentation."""
    block = (ROOT / "docs/architecture.md").read_text().split("## Modules\n```\n")[1].split("```")[0]
    paths, folders = set(), {}
    for line in block.splitlines():
        match = re.match(r"( *)(\S+)", line)
        depth, name = len(match[1]) // 2, match[2]
        folders = {d: f for d, f in folders.items() if d < depth}
        if name.endswith("/"):
            folders[depth] = name
        elif name.endswith(".py"):
            paths.add("".join(folders.values()) + name)
    return paths


def test_the_plan_in_the_readme_is_the_plan(capsys, monkeypatch):
    """The block that starts with `$ penstock plan`, word for word."""
    monkeypatch.chdir(ROOT)
    command, shown = re.search(
        r"```\n\$ penstock (plan .*)\n((?:.*\n)*?)```", (ROOT / "README.md").read_text()
    ).groups()
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out.rstrip() == shown.rstrip()


def test_the_tree_in_the_docs_is_the_tree():
    there = {
        str(p.relative_to(ROOT))
        for tree in TREES
        for p in (ROOT / tree).rglob("*.py")
        if p.name != "__init__.py" or p.parent.name == "penstock"
    }
    assert listed_modules() == there


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
