"""Matrices of floats that a GGUF model has beside quantised ones are compressed without loss, whatever their group has
besides: outputs keep their bits, and what crosses is what was planned."""

import json

import pytest
import torch
from penstock.engine.compute.sampler import Asked
from penstock.engine.kernels import decompress_weights, dequantise, stored_linear, stored_matmul
from penstock.engine.llm import LLM
from penstock.engine.model.compressed_size import planned_bytes
from penstock.engine.model.layout import model_layout
from penstock.engine.weights.compressed_group import compress_group
from penstock.engine.weights.gguf_checkpoint import GGUFCheckpoint
from penstock.engine.weights.host_store import load_weights
from penstock.engine.weights.kept_group import Blocks, Lossless, stored_group
from penstock.engine.weights.read_model import read_model
from penstock.scheduler.residency.residency_table import how_streamed

from tests.support.compressed_runs import CASES, OPTIONS, plan_of, run
from tests.support.forked_ranks import fork_ranks
from tests.support.gguf_models import FLOATS_BESIDE, write_model

COMPRESSED = {"0.ffn", "1.attn", "2.attn", "2.ffn", "head"}  # groups that have a matrix of floats
MIXED = COMPRESSED - {"1.attn", "head"}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("mixed") / "mixed.gguf"
    write_model(file, "llama", sizes=FLOATS_BESIDE)
    return file


def assert_alike(facts: dict[str, dict]) -> None:
    """Asserts that every case has the plain case's bits and did what its name says."""
    assert not facts["plain"]["compressed"] and not facts["plain"]["copied"]
    for case, found in facts.items():
        assert found["digest"] == facts["plain"]["digest"], case
        assert found["copied"] == found["expected_copied"], case
        assert set(found["decompressed"]) == set(found["quantised"]) | set(found["compressed"]), case
        whole = {name: nbytes for name, nbytes in found["expected_decompressed"].items() if name not in MIXED}
        assert whole.items() <= found["decompressed"].items(), case
        assert case == "plain" or found["compressed_bytes"] < 0.9 * found["plain_bytes"], case
    assert set(facts["streamed"]["compressed"]) == COMPRESSED <= set(facts["streamed"]["copied"])
    assert not facts["streamed"]["compressed_resident"]
    assert facts["resident"]["compressed_resident"] and not facts["resident"]["copied"]
    assert facts["mixed"]["compressed_resident"] and facts["mixed"]["copied"]


def test_one_rank(file):
    """Its passes read what is stored in every way: of few tokens, of more, and as floats."""
    kernels = (stored_linear, stored_matmul, dequantise)
    before = [kernel.calls["reference"] for kernel in kernels]
    assert_alike({case: run(str(file), case) for case in CASES})
    assert all(kernel.calls["reference"] > count for kernel, count in zip(kernels, before))


def test_two_ranks(file):
    done = fork_ranks(2, "-m", "tests.support.compressed_runs", file.parent, file.name, timeout=280)
    assert done.all_ended, done.stderr
    for rank in range(2):
        assert_alike(json.loads((file.parent / f"rank{rank}.json").read_text())[file.name])


def test_without_kernels_the_bits_are_the_same(file):
    """On a CPU weights that stay become floats once; those that stream are kept as they are, or compressed."""
    texts, copied = [], []
    for options in ({"resident": "all"}, {"resident": "none", "weights_compression": "lossless"}):
        with LLM(str(file), **OPTIONS | options) as llm:
            texts.append([output.outputs[0].token_ids for output in llm.generate([[5, 6, 7]] * 2)])
            copied.append(llm.engine.worker.executor.copied.total.sent_bytes)
    assert texts[0] == texts[1] and copied[0] == 0 < copied[1]


def test_every_group_comes_back_bit_for_bit(file):
    """Also says what is planned of each: no less than there is, and the quantised rows as they are."""
    spec = read_model(file).spec
    layout = model_layout(spec, spec.names, "bfloat16", 2, 1)
    source = GGUFCheckpoint.open_model(file, spec)
    groups = {group.id for group in layout.groups}
    loaded = load_weights(source, layout, groups, True, torch.device("cpu"), 1)
    source.close()
    for group in layout.groups:
        stored = loaded.host_spans[group.id]
        compressed, blob = compress_group(group, stored)
        plain, again = (torch.zeros(group.nbytes, dtype=torch.uint8) for _ in range(2))
        stored_group(group).restore(stored, plain, num_tokens=99)
        views = stored_group(group).views(stored, plain)
        compressed.restore(blob, again, num_tokens=99)
        for name, found in compressed.views(blob, again).items():
            expected = views[name]
            floats = [getattr(each, "floats", each) for each in (found, expected)]
            assert torch.equal(*floats), (group.id, name)
        blocks = [rows for each in compressed.weights for rows in each.rows if isinstance(rows.format, Blocks)]
        expected = [rows for rows in group.rows if rows.format.is_quantised]
        assert [rows.nbytes for rows in blocks] == [rows.nbytes for rows in expected]
        assert all(torch.equal(a.of(blob), stored[b.offset : b.offset + b.nbytes]) for a, b in zip(blocks, expected))
        assert compressed.nbytes <= planned_bytes(group) <= group.stored_bytes
        assert (compressed.nbytes < 0.97 * group.stored_bytes) == group.has_float_matrix


def test_a_warm_up_reads_no_blob_where_there_is_none(file):
    """Warms up over a ring that holds other bytes than a pass brings: blocks are any bytes, compressed rows are not."""
    debug = {"as_on_gpu": True}
    with LLM(str(file), **{**OPTIONS, "debug": debug}, resident="none", weights_compression="lossless") as llm:
        runner, executor = llm.engine.worker.runner, llm.engine.worker.executor
        ring = executor.pass_plan.ring
        first, later = ring.slots[: ring.num_wrapped], ring.slots[ring.num_wrapped :]
        assert MIXED & {str(group) for group, _ in later}
        executor.fill_ring()
        executor.ring[max(slot.end for _, slot in first) :] = 0xFF
        lossless, blocks = decompress_weights.calls["reference"], dequantise.calls["reference"]
        runner._warm_up(runner._bucket(runner.sizes.decode[-1]), Asked())
        num_compressed = sum(
            not rows.format.layout.raw
            for group, _ in first
            for each in executor.compressed[group].group.weights
            for rows in each.rows
            if isinstance(rows.format, Lossless)
        )
        assert decompress_weights.calls["reference"] == lossless + num_compressed
        assert dequantise.calls["reference"] > blocks


def test_compression_of_a_part_is_counted_in_the_plan(file):
    """Decompressing writes the floats; the rest becomes floats as it does without."""
    plain, compressed = (
        plan_of(str(file), 1, resident="none", weights_compression=how, debug={"as_on_gpu": True})
        for how in ("none", "lossless")
    )
    sizes = {group.id: group for group in compressed.layout.groups}
    mixed = [group for group in sizes.values() if str(group.id) in MIXED]
    assert set(map(str, compressed.residency.compressed)) == COMPRESSED
    assert all(0 < group.float_bytes < group.stored_bytes < group.nbytes for group in mixed)
    assert all(compressed.demand.decompressed[group.id] == group.float_bytes for group in mixed)
    assert compressed.steps == plain.steps
    assert how_streamed(plain.residency) == "" and how_streamed(compressed.residency).startswith("5 of 7 groups ")
    assert compressed.residency.streamed_bytes == sum(
        planned_bytes(group) if str(group.id) in COMPRESSED else group.stored_bytes for group in sizes.values()
    )
