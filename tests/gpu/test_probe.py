"""`penstock probe` on GPUs: links that are links, graphs that are faster than launches, both ways of a reduce; and a
graph alone."""

import json

import pytest

from penstock import LLM, SamplingParams
from scripts.bench.graph_alone import graph_alone_s
from tests.support.commands import Command
from tests.support.gpu.enough import needs_gpus, with_marks

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]


@pytest.mark.parametrize("tp_size", with_marks(needs_gpus, 1, 2, 4))
def test_probe(tmp_path, tp_size):
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = Command(tmp_path, "probe", "-tp", str(tp_size), "--json", **cache)
    try:
        done = command.finish()
    finally:
        command.kill()
    assert done.exit_code == 0, done.stderr
    profile = json.loads(done.stdout)
    probe = profile["probe"]
    assert profile == json.loads((tmp_path / "cache" / "penstock" / f"cuda-{tp_size}.json").read_text())
    assert len(profile["link_gb_s"]) == tp_size and min(profile["link_gb_s"]) > 1
    assert profile["memory_gb_s"] > 2 * max(profile["link_gb_s"]) and profile["gemm_tflops"] > 1
    assert 0 < probe["node_s"] < probe["launch_s"] and profile["memory_bytes"] > 2**30
    assert [row["bytes"] for row in probe["reduces"]] == ([4**n * 1024 for n in range(1, 9)] if tp_size > 1 else [])
    for row in probe["reduces"]:
        assert {"eager_s", "graph_s"} <= row.keys() and min(row.values()) > 1e-6
        assert row["bytes"] > 2**20 or row["graph_s"] < row["eager_s"]


@pytest.mark.parametrize("resident", ["all", "none"])
def test_a_graph_alone(resident):
    """As long as the passes of a run or shorter, and outputs are the same before and behind it."""
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    prompts = [[0, 5, 9], [7, 8]]
    with LLM("demo", max_num_seqs=2, gpu_memory="4GiB", resident=resident) as llm:

        def tokens() -> list[list[int]]:
            return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

        llm.engine.times.keep()
        assert graph_alone_s(llm, 2) is None  # nothing is captured yet
        before = [tokens(), tokens()]
        graph_s = graph_alone_s(llm, 2)
        assert [tokens(), tokens()] == before and before[0] == before[1]
        passes_s = sorted(measured_s for shape, measured_s, *_ in llm.engine.times.passes if shape.is_decode)
    assert 1e-5 < graph_s < 1.1 * passes_s[len(passes_s) // 2]
