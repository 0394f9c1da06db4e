"""GGUF weights on a CPU, where no kernel reads them quantised: those that stay are floats once they are loaded."""

import pytest
import torch
from penstock.engine.config import EngineConfig
from penstock.engine.kernels.ggml_types import BY_NAME, PARTS
from penstock.engine.model.layout import model_layout
from penstock.engine.planning.device_profile import load_profile
from penstock.engine.planning.engine_plan import EnginePlan, make_engine_plan
from penstock.engine.runtime.start import open_source
from penstock.engine.weights import blocks as blocks_module
from penstock.engine.weights.gguf_file import read_gguf
from penstock.engine.weights.host_store import load_weights
from penstock.engine.weights.kept_group import stored_group
from penstock.engine.weights.read_model import read_model
from penstock.engine.weights.views import views

from tests.support.gguf_models import write_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A model with all types."""
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_model(file, "llama")
    return file


def plan(file, tp_size: int = 1, **options) -> EnginePlan:
    config = EngineConfig(str(file), device="cpu", **options)
    return make_engine_plan(config, read_model(file).spec, tp_size, None, load_profile("cpu", tp_size))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_they_are_the_floats_that_a_pass_makes_of_stored_ones(file, tp_size, load_format):
    made = plan(file, tp_size, load_format=load_format)
    source = open_source(EngineConfig(str(file), load_format=load_format), file, made)
    for rank in range(tp_size):
        floats = made.rank_layout(rank)
        stored = model_layout(made.spec, made.spec.names, made.dtype, tp_size, rank)
        kept = load_weights(source, floats, set(), False, CPU)
        blocks = load_weights(source, stored, set(), False, CPU)
        assert any(group.is_quantised for group in stored.groups)
        for group, other in zip(floats.groups, stored.groups):
            assert not group.is_quantised and len(kept.resident[group.id]) == other.nbytes
            span = torch.zeros(other.nbytes, dtype=torch.uint8)
            stored_group(other).restore(blocks.resident[group.id], span, num_tokens=100)
            for name in other.quantised:
                assert torch.equal(views(group, kept.resident[group.id])[name], views(other, span)[name]), (rank, name)
        kept.close(), blocks.close()


@pytest.mark.parametrize("block_bytes", [4096, 100_000])
def test_what_is_kept_does_not_depend_on_how_loading_is_cut(file, monkeypatch, block_bytes):
    """Parts of few rows at a time come to their places among those of all rows."""
    made = plan(file, 2, resident="none")
    with open_source(EngineConfig(str(file)), file, made) as source:
        whole = load_weights(source, made.rank_layout(1), set(), False, CPU)
        monkeypatch.setattr(blocks_module, "BLOCK_BYTES", block_bytes)
        cut = load_weights(source, made.rank_layout(1), set(), False, CPU)
    for group, span in whole.resident.items():
        assert torch.equal(cut.resident[group], span), group
    holds_heads = block_bytes > 128 * 300  # rows of a head
    assert (cut.bytes_read == whole.bytes_read) == holds_heads, "a head that is cut is read twice"
    whole.close(), cut.close()


def test_the_plan_counts_their_floats(file):
    stays, streams = plan(file), plan(file, resident="none")
    stored = {group.id: group for group in streams.layout.groups}
    claims = dict(stays.residency.claims)
    assert (
        claims["resident weights"]
        == sum(group.nbytes for group in stays.layout.groups) + stays.layout.embed.stored_bytes
    )
    assert "decompression buffer" not in claims and not stays.pass_plan.decompressions
    assert streams.residency.streamed == tuple((group.id, group.stored_bytes) for group in stored.values())
    assert len(streams.pass_plan.decompressions) == len(stored)
    assert sum(group.nbytes for group in stays.layout.groups) > 2 * streams.residency.streamed_bytes


def test_half_of_them(file):
    made = plan(file, resident=0.5)
    streamed = {group for group, _ in made.residency.streamed}
    assert streamed and made.residency.resident
    assert {group.id for group in made.layout.groups if group.is_quantised} == streamed
    assert {step.group for step in made.pass_plan.decompressions} == streamed


@pytest.mark.parametrize(
    "options", [{"gpu_memory": 3 * 2**27}, {"debug": {"as_on_gpu": True}}], ids=["bounded", "as on a GPU"]
)
def test_weights_stay_as_they_are_stored(file, options):
    """In memory with a bound, and where kernels read them."""
    made = plan(file, **options)
    assert made.residency.resident and all(group.is_quantised for group in made.layout.groups)
    few_tokens = {group.as_stored(name) for group in made.layout.groups for name in group.quantised}
    assert (max(few_tokens) > 0) == ("debug" in options)


@pytest.mark.parametrize("resident", ["all", "none"])
def test_a_scale_that_is_no_number_is_warned_of_by_name(file, tmp_path, resident):
    """As it is in floats, whether blocks are kept or become floats; tensors that lie beside it are not named."""
    wrong, content = tmp_path / "m.gguf", bytearray(file.read_bytes())
    entries = read_gguf(file).tensors
    first, last = entries["blk.1.ffn_down.weight"], entries["blk.0.attn_k.weight"]
    ends = last.offset + last.nbytes - BY_NAME[last.dtype].nbytes
    for entry, block in ((first, first.offset), (last, ends)):  # of rank 0, and of rank 1
        start, size = PARTS[entry.dtype][-1]
        at = block + start + size - 2
        content[at : at + 2] = b"\x01\xfc"  # NaN
    wrong.write_bytes(content)
    made = plan(file, 2, resident=resident)
    for rank, named in ((0, {"blk.1.ffn_down.weight"}), (1, {"blk.0.attn_k.weight"})):
        with open_source(EngineConfig(str(wrong)), wrong, made) as source, pytest.warns(UserWarning) as caught:
            load_weights(source, made.rank_layout(rank), set(), False, CPU).close()
        told = [str(each.message) for each in caught]
        assert len(told) == 1 and {name for name in entries if name in told[0]} == named, told
        assert "scales that are NaN or inf" in told[0]
