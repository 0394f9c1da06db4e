"""The cost of quantised weights as it is predicted, against records of H200s: kernels alone, then passes."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from penstock.engine.config import EngineConfig
from penstock.engine.kernels.matmul_tiles import NEAREST, SHAPES, TOKENS
from penstock.engine.model.families import read_config, read_spec
from penstock.engine.model.weight_formats import QUANTISED, format_in
from penstock.engine.planning.device_profile import load_profile
from penstock.engine.planning.engine_plan import make_engine_plan
from penstock.engine.planning.predictions import decode_time, pass_work
from penstock.engine.planning.step_cost import FEW_BYTES, MATMUL_BYTES, WRITTEN
from penstock.engine.weights.read_model import read_model
from penstock.scheduler.cost.pass_work import PassShape, PassWork
from penstock.scheduler.cost.time_model import predict_pass
from penstock.scheduler.units import GB, GIB

from scripts.bench.dummy_gguf import write_gguf
from tests.support.gguf_models import K_QUANTS, SMALL, write_model

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
RATES = load_profile("h200", 1)
LARGEST, LAYER = 28672 * 4096, 28672 * 4096 + 4096 * 14336 + 6144 * 4096 + 4096 * 4096  # weights of the 8B shape


def record_of(name: str) -> dict:
    return json.loads((BENCHMARKS / f"{name}.json").read_text())


LINEARS, VARIANTS = record_of("stored_kernels"), record_of("stored_matmul")["variants"]


@pytest.mark.parametrize("kind", LINEARS["linear"])
def test_few_tokens_in_registers_are_those_of_the_record(kind):
    for num_tokens in (1, 2, 4):
        row = LINEARS["linear"][kind][f"(28672, 4096) x {num_tokens}"]
        took_s = 1e-6 * row.get("us, registers", row["us"]) - RATES.node_latency_s
        nbytes = took_s * RATES.memory_gb_s * GB
        assert FEW_BYTES[kind][num_tokens - 1] * LARGEST == pytest.approx(nbytes, rel=0.01)
    _, two, three, four = FEW_BYTES[kind]
    assert two < three < four


@pytest.mark.parametrize("kind", SHAPES)
def test_tiles_of_tokens_are_those_of_the_record(kind):
    for tokens, shape, nbytes in zip(TOKENS, SHAPES[kind], MATMUL_BYTES[kind]):
        measured_s = 1e-6 * VARIANTS[f"{kind} x {tokens}"]["a layer"][str(tuple(shape))]
        memory_s = nbytes * LAYER / (RATES.memory_gb_s * GB)
        gemm_s = 2 * tokens * LAYER / (RATES.gemm_tflops * 1e12)
        assert math.hypot(memory_s, gemm_s) + 4 * RATES.node_latency_s == pytest.approx(measured_s, rel=0.05)


@pytest.mark.parametrize("kind", WRITTEN)
def test_floats_are_made_as_fast_as_in_the_records(kind):
    """By what the linears of a layer took longer with floats first than over bf16; where that was not measured, by the
    dequantiser alone, of which it is 0.95 to 0.99."""
    written_gb_s = WRITTEN[kind] * RATES.decompress_gb_s
    alone = LINEARS["dequantise"][kind]["(4096, 14336)"]["written"]
    assert 0.95 * alone <= written_gb_s <= 0.99 * alone
    for tokens in TOKENS[: 3 if kind in SHAPES else 0]:
        took = VARIANTS[f"{kind} x {tokens}"]["a layer"]
        assert 2 * LAYER / (1e3 * (took["floats first"] - took["bf16"])) == pytest.approx(written_gb_s, rel=0.03)


def test_every_format_is_predicted_by_one_that_was_measured():
    assert FEW_BYTES.keys() == WRITTEN.keys() == LINEARS["linear"].keys() and MATMUL_BYTES.keys() == SHAPES.keys()
    assert FEW_BYTES.keys() >= MATMUL_BYTES.keys() and NEAREST.keys() == set(QUANTISED)


def bytes_a_weight(tmp_path, kind: str, tokens: tuple[int, ...], dtype: str = "bfloat16") -> dict[int, float]:
    """Bytes of memory that would take as long as a pass is predicted to read a weight of its matrices, by tokens."""
    sizes = dataclasses.replace(K_QUANTS if kind.endswith("K") else SMALL, kinds=(kind,), embeds=(kind, None))
    write_model(tmp_path / "m.gguf", "llama", sizes=sizes)
    spec = read_model(tmp_path / "m.gguf").spec
    plan = make_engine_plan(EngineConfig("m.gguf", resident="all", dtype=dtype), spec, 1, 4 * GIB, RATES)
    matrices = sum(
        weight.num_rows * weight.num_cols for g in plan.layout.groups for weight in g.weights if weight.sources
    )
    tokens = (*tokens, 65, 66)
    times = {n: decode_time(pass_work(plan), n, 0, RATES).memory_s * RATES.memory_gb_s * GB for n in tokens}
    per_token = times[66] - times[65]
    return {n: (times[n] - n * per_token) / matrices for n in tokens}


@pytest.mark.parametrize("kind, measured", [("Q8_0", "Q8_0"), ("Q4_0", "Q4_0"), ("Q6_K", "Q6_K"), ("Q5_K", "Q4_K")])
def test_a_pass_reads_stored_bits_as_its_linears_do_or_makes_floats_first(tmp_path, kind, measured):
    """Floats are written, then read. The linear through tensor cores has bf16 alone."""
    few_tokens, floats = format_in(kind, "bfloat16").few_tokens, RATES.memory_gb_s / RATES.decompress_gb_s
    tiles = (index for index, num_tokens in enumerate(TOKENS) for _ in range(2))
    expected = {n: MATMUL_BYTES[measured][index] for n, index in zip((4, 8, 9, 32, 33, 64), tiles)}
    expected |= dict(zip((1, 2, 3, 4), FEW_BYTES[measured][:few_tokens]))
    expected[65] = 2 * (1 + floats / WRITTEN[measured])
    found = bytes_a_weight(tmp_path, kind, tuple(expected))
    assert {n: found[n] for n in expected} == pytest.approx(expected, rel=0.01)
    in_fp32 = bytes_a_weight(tmp_path, kind, (4, 5), "float32")
    assert in_fp32[4] == pytest.approx(FEW_BYTES[measured][3], rel=0.01)
    assert in_fp32[5] == pytest.approx(2 * expected[65], rel=0.01)


def test_a_pass_that_makes_no_floats_launches_no_dequantiser(tmp_path):
    write_model(tmp_path / "m.gguf", "llama", sizes=dataclasses.replace(SMALL, kinds=("Q8_0",)))
    spec = read_model(tmp_path / "m.gguf").spec
    plan = make_engine_plan(EngineConfig("m.gguf", resident="all", dtype="bfloat16"), spec, 1, 4 * GIB, RATES)
    num_groups = sum(group.is_quantised for group in plan.layout.groups)
    few, more = (pass_work(plan).num_steps(PassShape(n, n, 0)) for n in (64, 65))
    assert more - few == num_groups > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind, weights_s", [("Q4_1", 1e9), ("Q8_0", 3.5e9)])
def test_a_cpu_makes_floats_as_plain_torch_does(tmp_path, kind, weights_s, dtype):
    """Whatever its lossless decompressor takes, which is many times as slow."""
    write_model(tmp_path / "m.gguf", "llama", sizes=dataclasses.replace(SMALL, kinds=(kind,), embeds=(kind, None)))
    spec, rates = read_model(tmp_path / "m.gguf").spec, load_profile("cpu", 1)
    plan = make_engine_plan(EngineConfig("m.gguf", resident="none", dtype=dtype), spec, 1, None, rates)
    quantised = [weight for group in plan.layout.groups for weight in group.weights if weight.name in group.quantised]
    num_weights = sum(weight.num_rows * weight.num_cols for weight in quantised)
    moved = sum(count * work.weight_bytes for work, count in plan.steps if work.step == "decompress")
    assert moved == pytest.approx(num_weights / weights_s * rates.memory_gb_s * GB, rel=1e-3) and num_weights


@pytest.fixture(scope="module")
def work_of(tmp_path_factory):
    """A function that gives the work of a pass over an 8B in a format, all resident."""
    shape, folder = BENCHMARKS / "shapes" / "Llama-3-8B.json", tmp_path_factory.mktemp("8b")

    def work(kind: str) -> PassWork:
        file = folder / f"{kind}.gguf"
        write_gguf(read_spec(read_config(shape), str(shape)), file, kind, kind, sparse=True)
        config = EngineConfig(str(file), resident="all", max_num_seqs=64)
        return pass_work(make_engine_plan(config, read_model(file).spec, 1, RATES.memory_bytes, RATES))

    return work


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_passes_of_a_model_that_stays_are_the_records(work_of, kind):
    work, record = work_of(kind), record_of(f"decode_llama3_8b_{kind.lower()}_resident_1rank")
    for row in record["passes"]:
        num_seqs, first = row["batch_size"], row["first_token"]
        context = record["input_len"] + record["output_len"] // 2
        assert decode_time(work, num_seqs, context, RATES).total_s == pytest.approx(row["decode_pass_s"], rel=0.06)
        shape = PassShape(first["num_tokens"], num_seqs, 0)
        assert predict_pass(work, shape, RATES).total_s == pytest.approx(first["first_token_s"], rel=0.1)
    assert [row["batch_size"] for row in record["passes"]] == [1, 8, 32, 64]
