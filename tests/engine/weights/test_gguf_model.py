"""The model in a GGUF file: what its metadata and tensors say, and what is refused in one line, before any weight."""

import dataclasses
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from penstock.engine.commands.plan import plan_of
from penstock.engine.config import EngineConfig
from penstock.engine.kernels.block_parts import in_parts
from penstock.engine.kernels.dequantise import dequantise
from penstock.engine.kernels.matmul_tiles import partial_bytes
from penstock.engine.model.layout import model_layout
from penstock.engine.model.shard import Piece
from penstock.engine.model.weight_formats import FORMATS
from penstock.engine.planning import memory_claims
from penstock.engine.planning.device_profile import load_profile
from penstock.engine.planning.engine_plan import make_engine_plan
from penstock.engine.planning.predictions import decode_time, pass_work
from penstock.engine.runtime.start import open_source, read_files
from penstock.engine.weights.gguf_checkpoint import GGUFCheckpoint
from penstock.engine.weights.gguf_file import read_gguf
from penstock.engine.weights.read_model import read_model
from penstock.scheduler.units import GIB

from tests.support.gguf_models import SIZES, SMALL, write_model
from tests.support.raw_gguf import ARRAY, F32, I32, STRING, U32, key, tensor, whole


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of each architecture with all types."""
    folder = tmp_path_factory.mktemp("gguf")
    for arch in ("llama", "qwen2", "qwen3"):
        write_model(folder / f"{arch}.gguf", arch)
    return folder


def test_metadata_becomes_a_spec(files):
    llama, qwen2, qwen3 = (read_model(files / f"{arch}.gguf").spec for arch in ("llama", "qwen2", "qwen3"))
    assert (llama.num_layers, llama.hidden_size, llama.num_heads, llama.num_kv_heads) == (3, 256, 8, 2)
    assert (llama.head_dim, llama.ffn_size, llama.vocab_size, llama.max_position) == (128, 768, 130, 256)
    assert llama.norm_eps == float(np.float32(1e-5)) and llama.rope.theta == 10000.0 and llama.activation == "silu"
    assert (llama.tied, qwen2.tied, qwen3.tied) == (False, True, True)
    assert (llama.qkv_bias, qwen2.qkv_bias, qwen3.qk_norm) == (False, True, True)
    assert llama.dtype == "bfloat16" and llama.ffn_multiple == 256
    assert (llama.bos_token_id, llama.eos_token_ids) == (1, (2,))


def test_end_tokens_are_all_that_the_file_names(tmp_path):
    write_raw(
        tmp_path / "m.gguf", {f"tokenizer.ggml.{name}_token_id": (U32, n) for name, n in (("eos", 2), ("eot", 7))}
    )
    assert read_model(tmp_path / "m.gguf").spec.eos_token_ids == (2, 7)


def test_a_file_of_floats_computes_in_its_own_dtype(tmp_path):
    for kind, dtype in (("F16", "float16"), ("F32", "float32")):
        sizes = dataclasses.replace(SMALL, kinds=(kind,), embeds=(kind, None))
        write_model(tmp_path / f"{kind}.gguf", "qwen3", sizes=sizes)
        spec = read_model(tmp_path / f"{kind}.gguf").spec
        assert spec.dtype == dtype and spec.formats == ()


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_ranks_join_to_what_the_file_stores(files, tp_size):
    """Every row and block of every quantised matrix is on one rank, unless ranks share it, with the file's very bytes,
    q and k in transformers' order; what is padded is zero."""
    file = files / "llama.gguf"
    spec = read_model(file).spec
    data = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    with GGUFCheckpoint.open_model(file, spec) as source:
        layouts = [model_layout(spec, spec.names, "bfloat16", tp_size, rank) for rank in range(tp_size)]
        assert len({layout.nbytes for layout in layouts}) == 1
        seen = {}
        for layout in layouts:
            for rows in (rows for group in (*layout.groups, layout.embed) for rows in group.rows):
                if not rows.format.is_quantised:
                    continue
                out = torch.zeros(rows.num_rows, rows.format.row_bytes(rows.num_cols), dtype=torch.uint8)
                for piece in rows.pieces:
                    part = out[piece.to_row : piece.to_row + piece.num_rows]
                    source.read_piece(piece, part[:, piece.to_col : piece.to_col + piece.num_cols])
                    seen.setdefault(piece.tensor, []).append((piece, part[:, : piece.num_cols].clone()))
        for name, parts in seen.items():
            stored = torch.from_numpy(data[name].data.copy())
            if "attn_q" in name or "attn_k" in name:
                pairs = stored.view(-1, SIZES.head_dim // 2, 2, stored.shape[1])
                stored = pairs.transpose(1, 2).reshape(stored.shape)
            covered = torch.zeros_like(stored, dtype=torch.bool)
            for piece, part in parts:
                where = slice(piece.row, piece.row + piece.num_rows), slice(piece.col, piece.col + piece.num_cols)
                assert torch.equal(part, stored[where]), name
                covered[where] = True
            assert covered.all(), name
        assert seen.keys() == {name for name, _ in spec.formats}


def test_shards_have_the_weights_of_the_whole_file(files, tmp_path):
    """By any of them."""
    write_model(tmp_path / "m.gguf", "llama", shards=9)
    assert len(shards := sorted(tmp_path.iterdir())) > 2
    spec = read_model(files / "llama.gguf").spec
    assert read_model(shards[1]).spec == spec
    layout, seen = model_layout(spec, spec.names, "bfloat16", 1, 0), set()
    with (
        GGUFCheckpoint.open_model(files / "llama.gguf", spec) as one,
        GGUFCheckpoint.open_model(shards[1], spec) as other,
    ):
        for rows in (rows for group in (*layout.groups, layout.embed) for rows in group.rows):
            if not rows.format.is_quantised:
                continue
            for piece in rows.pieces:
                found = [torch.zeros(piece.num_rows, piece.num_cols, dtype=torch.uint8) for _ in range(2)]
                for source, out in zip((one, other), found):
                    source.read_piece(piece, out)
                assert torch.equal(*found) and found[0].any(), piece
                seen.add(piece.tensor)
    assert seen == {name for name, _ in spec.formats}


def test_neighbours_of_one_type_are_one_run_of_rows(tmp_path):
    """So q, k and v are one kernel where their types are alike."""
    for kinds, runs in ((("Q8_0",), {"qkv": 1, "gate_up": 1}), (("Q8_0", "Q4_0"), {"qkv": 3, "gate_up": 2})):
        write_model(tmp_path / "m.gguf", "llama", sizes=dataclasses.replace(SMALL, kinds=kinds))
        spec = read_model(tmp_path / "m.gguf").spec
        groups = model_layout(spec, spec.names, "bfloat16", 1, 0).groups
        assert {name: len(g.rows_of(name)) for g in groups for name in runs if g.rows_of(name)} == runs


def test_heads_are_read_in_order_from_any_row_on(files):
    spec = read_model(files / "llama.gguf").spec
    with GGUFCheckpoint.open_model(files / "llama.gguf", spec) as source:
        nbytes = FORMATS[dict(spec.formats)["blk.0.attn_q.weight"]].row_bytes(SIZES.hidden)
        whole_rows = torch.empty(1024, nbytes, dtype=torch.uint8)
        source.read_piece(Piece("blk.0.attn_q.weight", 0, 1024, 0, nbytes, 0), whole_rows)
        for first, stop in ((0, 1), (5, 70), (100, 300), (127, 129), (1000, 1024)):
            out = torch.empty(stop - first, nbytes, dtype=torch.uint8)
            source.read_piece(Piece("blk.0.attn_q.weight", first, stop - first, 0, nbytes, 0), out)
            assert torch.equal(out, whole_rows[first:stop])


def test_a_row_is_not_cut_inside_of_a_block(files):
    """With 8 heads of 128 dims, 8 ranks have 128 columns each, and K-quants have blocks of 256."""
    spec = read_model(files / "llama.gguf").spec
    with pytest.raises(ValueError) as raised:
        model_layout(spec, spec.names, "bfloat16", 8, 0)
    told = str(raised.value)
    assert told.startswith("tensor_parallel_size=8 cuts rows of blk.") and told.endswith("possible: 1, 2, 4")


def test_a_plan_counts_what_is_stored(files):
    """Streamed and resident bytes are those of the file; floats need a buffer; a pass of few tokens makes fewer."""
    rates = load_profile("h200", 1)
    spec = read_model(files / "llama.gguf").spec
    plans = {
        resident: make_engine_plan(EngineConfig("m.gguf", resident=resident), spec, 1, 4 * GIB, rates)
        for resident in ("none", "all")
    }
    stored = sum(entry.nbytes for entry in read_gguf(files / "llama.gguf").tensors.values())
    assert plans["none"].residency.streamed_bytes == pytest.approx(stored, rel=0.15)
    assert plans["all"].residency.resident_bytes == pytest.approx(stored, rel=0.15)
    for plan in plans.values():
        assert not plan.residency.compressed and dict(plan.residency.claims)["decompression buffer"] > 0
        assert plan.pass_plan.decompressions and all(each.is_partial for each in plan.pass_plan.decompressions)
        few, more = (decode_time(pass_work(plan), n, 100, rates) for n in (1, 5))
        assert few.memory_s < more.memory_s


def test_sums_that_are_added_up_are_planned(files, monkeypatch):
    """The largest of any linear over stored weights, in the dtype that has them."""
    spec, rates = read_model(files / "llama.gguf").spec, load_profile("h200", 1)

    def workspace(dtype: str) -> int:
        config = EngineConfig("m.gguf", resident="all", dtype=dtype, max_num_seqs=8, max_num_batched_tokens=512)
        plan = make_engine_plan(config, spec, 1, 4 * GIB, rates)
        return dict(plan.residency.claims)["workspace"]

    in_bf16, in_fp32 = workspace("bfloat16"), workspace("float32")
    monkeypatch.setattr(memory_claims, "partial_bytes", lambda *sizes: 0)
    rows = [rows for g in model_layout(spec, spec.names, "bfloat16", 1, 0).groups for rows in g.rows]
    sizes = [(each.format.name, each.num_rows, each.num_cols) for each in rows if each.format.is_quantised]
    assert in_bf16 - workspace("bfloat16") == max(partial_bytes(*each, 64) for each in sizes) > 0
    assert in_fp32 == workspace("float32")


def test_plan_reads_a_header_without_torch(files):
    code = "import sys; from penstock.engine.commands.cli import main; main(['plan', sys.argv[1], '--short'])"
    code += "; assert not {'torch', 'numpy', 'transformers'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code, files / "qwen2.gguf"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(qwen2)" in done.stdout and "stored as Q2_K, Q3_K" in done.stdout


KEYS = {
    "general.architecture": (STRING, "llama"),
    "llama.block_count": (U32, 1),
    "llama.context_length": (U32, 64),
    "llama.embedding_length": (U32, 32),
    "llama.feed_forward_length": (U32, 32),
    "llama.attention.head_count": (U32, 2),
    "llama.attention.head_count_kv": (U32, 1),
    "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
}
SHAPES = {
    "token_embd.weight": (32, 32),
    "output_norm.weight": (32,),
    "blk.0.attn_norm.weight": (32,),
    "blk.0.ffn_norm.weight": (32,),
    "blk.0.attn_q.weight": (32, 32),
    "blk.0.attn_k.weight": (16, 32),
    "blk.0.attn_v.weight": (16, 32),
    "blk.0.attn_output.weight": (32, 32),
    **{f"blk.0.ffn_{name}.weight": (32, 32) for name in ("gate", "up", "down")},
}


def write_raw(file, keys=(), shapes=(), kinds=()):
    """A llama with other keys (None leaves one out), shapes and types than KEYS, SHAPES and F32; its data is zeros."""
    shapes, table, offset = {**SHAPES, **dict(shapes)}, [], 0
    for name, shape in shapes.items():
        if shape is not None:
            table.append(tensor(name, shape, dict(kinds).get(name, 0), offset))
            offset += 4 * int(np.prod(shape))
    all_keys = {**KEYS, **dict(keys)}
    pairs = [key(name, *value) for name, value in all_keys.items() if value is not None]
    file.write_bytes(whole(pairs, table, bytes(offset + 4096)))


REFUSED = {
    "no architecture": ({"general.architecture": None}, {}, {}, "general.architecture is missing; supported: llama"),
    "another architecture": ({"general.architecture": (STRING, "gemma3")}, {}, {}, "general.architecture 'gemma3'"),
    "an architecture in numbers": ({"general.architecture": (U32, 3)}, {}, {}, "general.architecture 3"),
    "a vision part": ({"general.type": (STRING, "mmproj")}, {}, {}, "general.type 'mmproj' is not supported: give the"),
    "experts": ({"llama.expert_count": (U32, 8)}, {}, {}, "llama.expert_count = 8 is not supported"),
    "an unknown key": ({"llama.logit_scale": (F32, 2.0)}, {}, {}, "llama.logit_scale = 2.0 is not supported"),
    "no number of layers": ({"llama.block_count": None}, {}, {}, "llama.block_count must be an integer"),
    "no layers": ({"llama.block_count": (U32, 0)}, {}, {}, "llama.block_count must be an integer"),
    "layers without end": ({"llama.block_count": (U32, 2**31)}, {}, {}, "llama.block_count = 2147483648"),
    "layers in words": ({"llama.block_count": (STRING, "1")}, {}, {}, "llama.block_count must be an integer"),
    "heads by layer": ({"llama.attention.head_count": (ARRAY, (U32, [2]))}, {}, {}, "attention.head_count must be"),
    "heads that do not fit": ({"llama.attention.head_count_kv": (U32, 3)}, {}, {}, "is not a multiple of"),
    "no norm": ({"llama.attention.layer_norm_rms_epsilon": None}, {}, {}, "layer_norm_rms_epsilon must be a positive"),
    "an end in words": ({"tokenizer.ggml.eos_token_id": (STRING, "</s>")}, {}, {}, "ggml.eos_token_id must be an"),
    "ends in an array": ({"tokenizer.ggml.eot_token_id": (ARRAY, (U32, [2]))}, {}, {}, "ggml.eot_token_id must be an"),
    "a negative begin": ({"tokenizer.ggml.bos_token_id": (I32, -1)}, {}, {}, "ggml.bos_token_id must be an integer"),
    "a norm of NaN": (
        {"llama.attention.layer_norm_rms_epsilon": (F32, float("nan"))}, {}, {}, "epsilon must be a positive number"
    ),
    "values of another size": ({"llama.attention.value_length": (U32, 8)}, {}, {}, "attention.value_length = 8"),
    "a part that rotates": ({"llama.rope.dimension_count": (U32, 8)}, {}, {}, "rope.dimension_count = 8"),
    "another scaling": ({"llama.rope.scaling.type": (STRING, "longrope")}, {}, {}, "rope.scaling.type 'longrope'"),
    "a scaling without factor": ({"llama.rope.scaling.type": (STRING, "yarn")}, {}, {}, "rope.scaling.factor must be"),
    "no embedding": ({}, {"token_embd.weight": None}, {}, "token_embd.weight is missing"),
    "an embedding of one dim": ({}, {"token_embd.weight": (32,)}, {}, "token_embd.weight has shape (32,)"),
    "another type": ({}, {}, {"blk.0.ffn_up.weight": 20}, "blk.0.ffn_up.weight: type IQ4_NL is not supported"),
    "whole numbers": ({}, {}, {"blk.0.ffn_up.weight": 26}, "type I32 is not supported"),
    "a quantised norm": ({}, {}, {"blk.0.attn_norm.weight": 8}, "attn_norm.weight: is Q8_0, and only matrices"),
    "frequencies of another size": ({}, {"rope_freqs.weight": (4,)}, {}, "rope_freqs.weight: is F32 of shape (4,)"),
    "frequencies of zero": ({}, {"rope_freqs.weight": (8,)}, {}, "rope_freqs.weight: has values that are not positive"),
    "frequencies and a scaling": (
        {"llama.rope.scaling.type": (STRING, "linear"), "llama.rope.scaling.factor": (F32, 2.0)},
        {"rope_freqs.weight": (8,)}, {}, "rope_freqs.weight: is there beside"
    ),
}  # fmt: skip


@pytest.mark.parametrize("keys, shapes, kinds, message", REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path, keys, shapes, kinds, message):
    file = tmp_path / "m.gguf"
    write_raw(file, keys, shapes, kinds)
    with pytest.raises(ValueError) as raised:
        read_model(file)
    told = str(raised.value)
    assert told.startswith(str(file)) and message in told and "\n" not in told


def test_another_format_that_is_asked_for_is_refused(files):
    with pytest.raises(ValueError, match="is a GGUF file, and load_format='safetensors' asks for another format"):
        read_files(EngineConfig(str(files / "llama.gguf"), load_format="safetensors"))


def test_a_directory_of_gguf_files_says_which_file_to_give(files):
    with pytest.raises(ValueError, match=r"no config\.json, but llama\.gguf, qwen2\.gguf, qwen3\.gguf: give the GGUF"):
        read_model(files)


def test_a_vision_part_is_not_what_to_give(tmp_path):
    for name in ("mmproj-F16.gguf", "q4.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"no config\.json, but q4\.gguf: give the GGUF file itself"):
        read_model(tmp_path)


UNLIKE = {
    "a layer less": ({"blk.0.ffn_up.weight": None}, "1 tensor(s) missing from the checkpoint: blk.0.ffn_up.weight"),
    "another shape": ({"blk.0.attn_k.weight": (32, 32)}, "blk.0.attn_k.weight has shape (32, 32)"),
    "a tensor more": ({"blk.0.attn_sinks.weight": (32,)}, "blk.0.attn_sinks.weight"),
    "a layer more": ({"blk.1.ffn_up.weight": (32, 32)}, "blk.1.ffn_up.weight"),
}


@pytest.mark.parametrize("shapes, message", UNLIKE.values(), ids=UNLIKE)
def test_tensors_that_are_not_the_models_are_refused(tmp_path, shapes, message):
    file = tmp_path / "m.gguf"
    write_raw(file, shapes=shapes)
    config = EngineConfig(str(file))
    plan = make_engine_plan(config, read_model(file).spec, 1, None, load_profile("cpu", 1))
    with pytest.raises(ValueError) as raised:
        open_source(config, file, plan)
    assert message in str(raised.value) and str(file) in str(raised.value)
    told = f"planned without the weights, which cannot be loaded: {raised.value}"
    assert plan_of(dataclasses.replace(config, device="cpu")).notes == (told,)
    assert plan_of(dataclasses.replace(config, device="cpu", load_format="dummy")).notes == ()


def test_the_smallest_file_that_is_whole_loads(tmp_path):
    write_raw(tmp_path / "m.gguf")
    config = EngineConfig(str(tmp_path / "m.gguf"))
    plan = make_engine_plan(config, read_model(tmp_path / "m.gguf").spec, 1, None, load_profile("cpu", 1))
    open_source(config, tmp_path / "m.gguf", plan).close()


def test_dummy_blocks_are_finite_and_stay_in_their_place(files):
    """As benchmarks have them: a file's shape, and random bytes that make small scales."""
    file = files / "llama.gguf"
    config = EngineConfig(str(file), load_format="dummy", resident="none")
    plan = make_engine_plan(config, read_model(file, dummy=True).spec, 1, None, load_profile("cpu", 1))
    source = open_source(config, file, plan)
    for group in plan.layout.groups:
        for rows in (rows for rows in group.rows if rows.format.is_quantised):
            data = torch.zeros(rows.num_rows, rows.format.row_bytes(rows.num_cols), dtype=torch.uint8)
            for piece in rows.pieces:
                part = data[piece.to_row : piece.to_row + piece.num_rows]
                source.read_piece(piece, part[:, piece.to_col : piece.to_col + piece.num_cols])
            floats = torch.empty(rows.num_rows, rows.num_cols)
            dequantise(rows.format.name, in_parts(rows.format.name, data), floats)
            assert floats.isfinite().all() and floats.std() > 0
