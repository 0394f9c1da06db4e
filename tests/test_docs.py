"""The pages tell the truth: the tree of modules, the plan that is shown, README's figures, links and their headings."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
from penstock.engine.commands.cli import main
from penstock.scheduler.units import GB

ROOT = Path(__file__).resolve().parents[1]
TREES = ("penstock", "parallel", "scheduler", "engine", "scripts")
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
BASELINES = {  # what README calls them: what their records do
    "accelerate's `cpu_offload`": "accelerate",
    "transformers' `generate`": "transformers",
    "transformers' continuous batching": "transformers-cb",
}


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


def test_the_plan_in_the_docs_is_the_plan(capsys, monkeypatch):
    """The block that starts with `$ penstock plan`, word for word."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/planning.md").read_text()
    command, shown = re.search(r"```\n\$ penstock (plan .*)\n((?:.*\n)*?)```", page).groups()
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


def figures_of_the_readme() -> list[tuple[str, ...]]:
    """The cells of its table against others."""
    lines = [
        line.strip("| ").split(" | ") for line in (ROOT / "README.md").read_text().splitlines() if line[:2] == "| "
    ]
    return [tuple(line) for line in lines if line[0] in BASELINES]


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def record_of(name: str) -> dict:
    return json.loads((ROOT / f"benchmarks/{name}.json").read_text())


VLLM = re.findall(r"^\| (vLLM.*) \|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("line", VLLM, ids=lambda line: line.partition(" |")[0])
def test_figures_beside_vllm_in_the_readme_are_those_of_their_record(line):
    against, _, texts, theirs, ours, bound, link = line.split(" | ")
    record = json.loads((ROOT / re.search(r"\((.*)\)", link)[1]).read_text())
    assert record["vllm"]["version"].rpartition(".")[0] in against
    assert ("offload" in against) == ("offloaded_bytes" in record["vllm"])
    rows = {row["row"].removesuffix("-brief"): row for row in record["rows"]}
    row = rows[f"token-batch-{texts}"]
    assert (theirs, ours) == (ms(row["vllm_measured_s"]), ms(row["measured_s"]))
    assert bound == f"{ms(row['bound_s'])} ({row['bound']})"


def test_jobs_beside_vllm_in_the_readme_are_those_of_their_records():
    page = " ".join((ROOT / "README.md").read_text().split())
    names = ("traffic_llama3_8b_1rank", "batch_llama3_8b_resident_1rank", "serving_llama3_8b_1rank")
    traffic, batch, serving = (record_of(name) for name in names)
    jobs = [(row["vllm_measured_s"], row["measured_s"]) for row in traffic["rows"] if row["measures"] == "job"]
    assert len(jobs) == 5
    served = {row["fed"]: row["median_ttft_ms"] / 1e3 for row in serving["rows"]}
    found = [*jobs, (batch["vllm"]["seconds"], batch["seconds"]), (served["vLLM by HTTP"], served["by HTTP"])]
    assert all(f"{name}.json" in page for name in names)
    assert all(f"vLLM {ms(theirs)}, Penstock {ms(ours)}" in page for theirs, ours in found)


def test_the_start_in_the_readme_is_that_of_its_record():
    record = record_of("startup_llama3_8b_resident_1rank")
    page = (ROOT / "README.md").read_text()
    assert f"[{record['warm_capture_cost_s']:.2f} s](benchmarks/startup_llama3_8b_resident_1rank.json)" in page
    assert f"first time {record['cold_capture_cost_s']:.2f}" in " ".join(page.split())


@pytest.mark.parametrize("name", ["compare_llama3_8b_compressed", "decode_llama3_70b_compressed_2ranks"])
def test_compressed_passes_in_the_readme_are_those_of_their_records(name):
    record = record_of(name)
    page, first = (ROOT / "README.md").read_text(), record["passes"][0]
    assert f"{name}.json" in page and all(ms(first[field]) in page for field in ("decode_pass_s", "bound_s"))


@pytest.mark.parametrize("row", figures_of_the_readme(), ids=lambda row: f"{row[0]}, {row[2]}")
def test_figures_in_the_readme_are_those_of_their_records(row):
    against, _, texts, theirs, ours, bound, link = row
    record = json.loads((ROOT / re.search(r"\((.*)\)", link)[1]).read_text())
    pairs = [(one["baseline"], one.get("batch_size")) for one in record["comparisons"]]
    compared = record["comparisons"][pairs.index((BASELINES[against], int(texts)))]
    ran = next(one for one in record["passes"] if one["batch_size"] == int(texts))
    assert (theirs, ours) == (f"{1e3 * compared['token_s']:.2f}", f"{1e3 * compared['our_token_s']:.2f}")
    assert bound == f"{1e3 * ran['bound_s']:.2f} ({ran['bound']})"


def quantised_rows() -> list[str]:
    """Lines of tables of docs/checkpoints.md, as their records have them."""
    passes = [record_of(f"decode_llama3_8b_{name}resident_1rank")["passes"] for name in ("q4_0_", "q8_0_", "")]
    lines = []
    for batch in (1, 8, 32, 64):
        rows = [next((row for row in found if row["batch_size"] == batch), None) for found in passes]
        times = [f"{ms(row['decode_pass_s'])} ({ms(row['bound_s'])}) " if row else "" for row in rows]
        lines.append(f"| {batch} | {'| '.join(times)}|")
    record = record_of("dequantisers")
    rates = [list(matrices.values()) for matrices in record["dequantise"].values()]
    written = [f"{min(one['written'] for one in matrices) / 1e3:.2f}" for matrices in rates]
    shares = [f"{min(one['moved'] for one in matrices) / record['copy_gb_s']:.2f}" for matrices in rates]
    lines.append(f"| | {' | '.join(record['dequantise'])} |")
    return [*lines, f"| written, TB/s | {' | '.join(written)} |", f"| of a copy's rate | {' | '.join(shares)} |"]


def test_figures_of_quantised_weights_are_those_of_their_records():
    page = (ROOT / "docs/checkpoints.md").read_text()
    assert [line for line in quantised_rows() if line not in page.splitlines()] == []
    (streamed,) = record_of("decode_llama3_8b_q4_k_streamed_1rank")["passes"]
    assert f"[{ms(streamed['decode_pass_s'])}](../benchmarks/decode_llama3_8b_q4_k_streamed_1rank.json)" in page
    loads = [record_of(f"startup_llama3_8b_q4_k_{name}_1rank")["rows"] for name in ("resident", "streamed")]
    to_gpu, to_host = (next(row for row in rows if row["phase"] == "weights") for rows in loads)
    found = [f"file of {to_gpu['bytes'] / GB:.2f} GB", f"{to_host['peak_host_bytes'] / to_host['bytes']:.2f} times"]
    for row in (to_gpu, to_host):
        found += [f"at {row['gb_s']:.2f} GB/s", f"{row['peak_host_bytes'] / GB:.2f} GB"]
    assert [words for words in found if words not in " ".join(page.split())] == []


def test_the_readme_is_short_and_compares_in_six_rows():
    assert len(figures_of_the_readme()) + len(VLLM) == 6
    assert len((ROOT / "README.md").read_text().splitlines()) <= 95


def anchors(page: Path) -> set[str]:
    """The fragments by which GitHub names a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """To a file that is there, and to a heading in it."""
    links = re.findall(r"\]\(([^):]+)\)", (ROOT / page).read_text())
    lost = []
    for link in links:
        file, _, fragment = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        if not target.exists() or (fragment and fragment not in anchors(target)):
            lost.append(link)
    assert lost == []


def test_every_docstring_begins_with_a_noun_or_a_verb():
    """No docstring begins with a question word or with None."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    words = re.compile(r"(What|Whether|How|Which|Where|Why|When|None)\b")
    found = [
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
        for tree in (*TREES, "tests")
        for path in sorted((ROOT / tree).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, documented) and (text := ast.get_docstring(node)) and words.match(text)
    ]
    assert not found, "\n".join(found)
