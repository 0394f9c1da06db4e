"""Compressed weights give the bits of plain ones, streamed and resident, in every family, on one, two and four ranks.
Counters show that compressed bytes crossed and were decompressed: no test passes because nothing was compressed."""

import json

import pytest
import torch
from penstock.engine.llm import LLM
from safetensors.torch import load_file, save_file

from tests.support.compressed_runs import CASES, OPTIONS, plan_of, run
from tests.support.forked_ranks import fork_ranks
from tests.support.oracle.checkpoints import write_checkpoint
from tests.support.streaming_runs import generate

FAMILIES = ("llama_gqa", "llama_tied", "mistral_window", "qwen2", "qwen3", "neox_parallel", "neox_serial")

BIGGER = {"hidden_size": 256, "intermediate_size": 384}  # sizes whose shards have more than a tile or two


def assert_compressed(facts: dict[str, dict], tied: bool) -> None:
    """Asserts that every case has the plain case's bits and did what its name says."""
    assert not facts["plain"]["compressed"] and not facts["plain"]["decompressed"] and not facts["plain"]["copied"]
    for case, found in facts.items():
        assert found["digest"] == facts["plain"]["digest"], case
        assert found["copied"] == found["expected_copied"], case
        assert found["decompressed"] == found["expected_decompressed"], case
        if case == "plain":
            continue
        assert found["compressed_bytes"] < 0.74 * found["plain_bytes"], case  # tiny groups, of a few tiles
        assert len(found["compressed"]) <= found["num_groups"] - tied  # a tied head stays plain
    assert len(facts["streamed"]["compressed"]) == facts["streamed"]["num_groups"] - tied
    assert not facts["streamed"]["compressed_resident"] and set(facts["streamed"]["compressed"]) <= set(
        facts["streamed"]["copied"]
    )
    assert facts["resident"]["compressed_resident"] and not facts["resident"]["copied"]
    assert facts["mixed"]["compressed_resident"] and facts["mixed"]["copied"]


@pytest.mark.parametrize("variant", FAMILIES)
def test_one_rank(tmp_path, variant):
    write_checkpoint(tmp_path, variant, "bfloat16")
    assert_compressed({case: run(str(tmp_path), case) for case in CASES}, variant == "llama_tied")


SHARDED = ("llama_tied", "qwen2", "neox_parallel")  # a tied head, biases, biases that one rank adds


@pytest.mark.parametrize(
    ("num_ranks", "variants"),
    [
        (2, SHARDED),
        pytest.param(2, [family for family in FAMILIES if family not in SHARDED], marks=pytest.mark.soak),
        pytest.param(4, FAMILIES[:1], marks=pytest.mark.soak),
    ],
)
def test_several_ranks(tmp_path, num_ranks, variants):
    for variant in variants:
        write_checkpoint(tmp_path / variant, variant, "bfloat16", **BIGGER)
    done = fork_ranks(num_ranks, "-m", "tests.support.compressed_runs", tmp_path, *variants, timeout=280)
    assert done.all_ended, done.stderr
    for rank in range(num_ranks):
        facts = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for variant in variants:
            assert_compressed(facts[variant], variant == "llama_tied")


def test_lanes_in_any_order(tmp_path):
    write_checkpoint(tmp_path, "llama_gqa", "bfloat16")
    with LLM(str(tmp_path), resident="all", weights_compression="none", **OPTIONS) as llm:
        expected = generate(llm)
    for lanes, seed in (("earliest", 0), ("latest", 0), ("random", 1), ("random", 2)):
        options = {
            "resident": "none",
            "weights_compression": "lossless",
            "debug": {"lanes": lanes, "poison": True},
            "seed": seed,
        }
        with LLM(str(tmp_path), **OPTIONS | options) as llm:
            assert generate(llm).same_bits(expected), (lanes, seed)


def test_auto_compresses_nothing_on_a_cpu(tmp_path):
    """Plans for a CPU, where decompressing is slower than copying."""
    write_checkpoint(tmp_path, "llama_gqa", "bfloat16")
    assert not plan_of(str(tmp_path), 1, resident="none").residency.compressed


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_only_bfloat16_is_compressed(dtype):
    with pytest.raises(ValueError, match=f"weights_compression='lossless'.*{dtype}"):
        LLM("demo", device="cpu", dtype=dtype, weights_compression="lossless")
    with LLM("demo", device="cpu", dtype=dtype, resident="none") as llm:
        assert not llm.engine.plan.residency.compressed


SLOW_LINK = {"device_profile": "h200", "link_gb_s": 0.001}  # by which compression pays


def test_auto_compresses_where_the_link_binds(tmp_path):
    write_checkpoint(tmp_path, "llama_gqa", "bfloat16", **BIGGER)
    with LLM(str(tmp_path), resident="none", **SLOW_LINK, **OPTIONS) as llm:
        assert llm.engine.plan.residency.compressed
        assert llm.engine.plan.residency.streamed_bytes < 0.72 * llm.engine.plan.layout.nbytes


def test_auto_keeps_weights_plain_that_do_not_shrink(tmp_path):
    """Loads weights that do not shrink: that is found out while loading, and they are loaded again. What runs then is
    what runs without compression."""
    write_checkpoint(tmp_path, "llama_gqa", "bfloat16", **BIGGER)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:  # any exponent but the largest: nothing to save
            bits = torch.randint(-(2**15), 2**15, tensor.shape, generator=torch.Generator().manual_seed(0))
            tensors[name] = (bits.short() & ~0x4000).view(torch.bfloat16)
    save_file(tensors, file)
    with pytest.warns(UserWarning, match="weights_compression: compressed weights have .* loading them again, plain"):
        llm = LLM(str(tmp_path), resident="none", **SLOW_LINK, **OPTIONS)
    with llm:
        assert not llm.engine.plan.residency.compressed and not llm.engine.worker.weights.compressed
        assert ("decompression buffer", 0) not in llm.engine.plan.residency.claims
        assert llm.engine.plan.residency.streamed_bytes == sum(g.nbytes for g in llm.engine.plan.layout.groups)


RATES_SCRIPT = """
import json, os, sys
from pathlib import Path
from penstock.engine.planning.device_profile import device_profile, profile_path, save_profile
from tests.support.probes import CPU
from dataclasses import replace
os.environ["XDG_CACHE_HOME"] = f"{sys.argv[1]}/cache{os.environ['RANK']}"
if os.environ["RANK"] == "1":  # one host was probed, the other was not
    profile = device_profile(replace(CPU, num_ranks=2, link_gb_s=[0.001, 0.001]))
    save_profile(profile, profile_path("cpu", 2))
from penstock.engine.llm import LLM
with LLM(sys.argv[2], device="cpu", resident="none") as llm:
    found = [llm.engine.plan.rates.link_gb_s, len(llm.engine.plan.residency.compressed)]
Path(sys.argv[1], f"rates{os.environ['RANK']}.json").write_text(json.dumps(found))
"""


def test_all_ranks_plan_with_the_rates_of_rank_0(tmp_path):
    write_checkpoint(tmp_path / "model", "llama_gqa", "bfloat16")
    script = tmp_path / "rank.py"
    script.write_text(RATES_SCRIPT)
    done = fork_ranks(2, script, tmp_path, tmp_path / "model", timeout=100)
    assert done.all_ended, done.stderr
    first, second = (json.loads((tmp_path / f"rates{rank}.json").read_text()) for rank in range(2))
    assert first == second and first[0] > 1
