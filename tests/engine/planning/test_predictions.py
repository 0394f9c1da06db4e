"""The h200 profile against what was measured on H200s: linears in a graph, all-reduces, decode passes, streamed passes.

Figures without a file are those of docs/log.md; the others are records of benchmarks/.
"""

import json
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path

import pytest
from penstock.engine.config import EngineConfig
from penstock.engine.model.families import read_config, read_spec
from penstock.engine.planning.device_profile import load_profile
from penstock.engine.planning.engine_plan import EnginePlan, make_engine_plan
from penstock.engine.planning.predictions import decode_time, pass_work, step_seconds
from penstock.scheduler.batching.batch import Batch, BatchRow, is_decode
from penstock.scheduler.batching.request import Request
from penstock.scheduler.batching.scheduler import Scheduler
from penstock.scheduler.cost.pass_work import KV_SHARE, PassShape
from penstock.scheduler.cost.time_model import predict_pass, reduce_s, step_s
from penstock.scheduler.cost.timeline import predict_timeline, timeline_s
from penstock.scheduler.units import KIB, MIB

from scripts.bench.bound import kind_of
from scripts.bench.traffic_rows import ROWS, TOKEN
from scripts.bench.workload import greedy, random_jobs

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
LINEARS = {"attn_qkv", "attn_output", "ffn_up", "ffn_down", "head"}


def plan_of(model: str, tp_size: int, resident: str | float = "all", weights_compression: str = "none") -> EnginePlan:
    path = BENCHMARKS / "shapes" / f"{model}.json"
    config = EngineConfig(model=str(path), resident=resident, weights_compression=weights_compression)
    return make_engine_plan(
        config, read_spec(read_config(path), str(path)), tp_size, rates(tp_size).memory_bytes, rates(tp_size)
    )


def rates(tp_size: int):
    return load_profile("h200", tp_size)


@pytest.mark.parametrize(
    "model, tp_size, num_tokens, measured_ms",
    [
        ("Llama-3-8B", 1, 1, 3.84),  # one token: the engine's own linear; 64 and more: cuBLAS
        ("Llama-3-8B", 1, 64, 4.29),
        ("Llama-3-8B", 1, 256, 6.50),
        ("Llama-3-8B", 1, 2000, 41.7),
        ("Llama-3-8B", 4, 1, 1.20),
        ("Llama-3-70B", 4, 1, 8.55),
    ],
)
def test_linears_of_a_pass_in_a_graph(model, tp_size, num_tokens, measured_ms):
    shape = PassShape(num_tokens, num_tokens, 0)
    steps = [(step, count) for step, count in plan_of(model, tp_size).steps if step.step.split("+")[0] in LINEARS]
    predicted_s = sum(count * step_s(step, shape, rates(tp_size)) for step, count in steps)
    assert predicted_s * 1e3 == pytest.approx(measured_ms, rel=0.11)


@pytest.mark.parametrize(
    "nbytes, measured_us", [(4 * KIB, 2.7), (16 * KIB, 2.9), (64 * KIB, 3.4), (256 * KIB, 5.1), (64 * MIB, 321)]
)
def test_reduces_of_four_ranks(nbytes, measured_us):
    """Compares all-reduces. In a pass ranks wait for each other a little, so small ones are taken to be longer than
    they are by themselves."""
    assert reduce_s(nbytes, rates(4)) * 1e6 == pytest.approx(measured_us, rel=0.1, abs=1.5)


def record_of(name: str) -> dict:
    return json.loads((BENCHMARKS / f"{name}.json").read_text())


@pytest.mark.parametrize(
    "name, most",
    [
        ("decode_llama3_8b_resident_1rank", 256),
        ("decode_llama31_8b_32k_resident_1rank", 8),
        ("decode_llama3_8b_resident_2ranks", 256),
        ("decode_llama3_8b_resident_4ranks", 1),  # 64 rows take a quarter longer than this model says
        ("decode_llama3_70b_resident_4ranks", 1),
    ],
)
def test_resident_decode_passes_are_the_records(name, most):
    record = record_of(name)
    work, context = pass_work(plan_of(record["model"], record["tp_size"])), record["input_len"] + 17
    rows = [row for row in record["passes"] if row["batch_size"] <= most]
    for row in rows:
        predicted_s = decode_time(work, row["batch_size"], context, rates(record["tp_size"])).total_s
        assert predicted_s == pytest.approx(row["decode_pass_s"], rel=0.1)
    assert rows


@pytest.mark.parametrize(
    "name, model",
    [("traffic_llama3_8b_1rank", "Llama-3-8B"), ("long_row_llama31_8b_1rank", "Llama-3.1-8B")],
)
def test_tokens_of_traffic_are_the_records(name, model):
    """Rows of few and of many tokens, and one of 65,000 among short ones, which costs what it reads."""
    found, work = {row["row"]: row["measured_s"] for row in record_of(name)["rows"]}, pass_work(plan_of(model, 1))
    rows = [row for row in ROWS if row.name in found and row.measures == TOKEN]
    for row in rows:
        num_cached = row.input_len * (row.num - 1) + (row.first_len or row.input_len)
        predicted_s = decode_time(work, row.num, num_cached / row.num + row.output_len / 2, rates(1)).total_s
        assert predicted_s == pytest.approx(found[row.name], rel=0.1)
    assert len(rows) >= 2


PREFILLS = ("prefill_llama3_8b_2000_resident_1rank", "prefill_llama3_8b_8k_resident_1rank",
            "prefill_llama31_8b_16k_resident_1rank")  # fmt: skip


def prefill_s(name: str) -> tuple[int, float, float]:
    """Tokens of a prompt that is one pass, and the seconds predicted and measured."""
    record = record_of(name)
    num_tokens = record["input_len"]
    assert num_tokens <= record["max_num_batched_tokens"]
    predicted = predict_pass(pass_work(plan_of(record["model"], 1)), PassShape(num_tokens, 1, 0), rates(1))
    return num_tokens, predicted.total_s, record["passes"][0]["first_token"]["first_token_s"]


@pytest.mark.parametrize("name", PREFILLS)
def test_prefill_passes_are_the_records(name):
    _, predicted_s, measured_s = prefill_s(name)
    assert predicted_s == pytest.approx(measured_s, rel=0.1)


@pytest.mark.parametrize("batch, is_padded", [(64, False), (256, False)])
def test_passes_of_many_prompts_on_two_ranks_are_the_records(batch, is_padded):
    """Predicts at the step latency of the machine that measured, since the host launches each step and each sum."""
    record = record_of("decode_llama3_8b_resident_2ranks")
    (row,) = (row["first_token"] for row in record["passes"] if row["batch_size"] == batch)
    shape, launched = prompts(record["input_len"], batch), replace(rates(2), step_latency_s=record["step_latency_s"])
    assert row["num_passes"] == 1 and shape.num_tokens == row["num_tokens"] and shape.is_padded == is_padded
    predicted = predict_pass(pass_work(plan_of(record["model"], 2)), shape, launched)
    assert predicted.total_s == pytest.approx(row["first_token_s"], rel=0.1)


@pytest.mark.parametrize("shorter, longer", [PREFILLS[:2], PREFILLS[1:]])
def test_attention_is_not_predicted_shorter_than_it_was(shorter, longer):
    """Compares prompts of two lengths: a token of the longer one takes more time by attention alone."""
    (few, *few_s), (many, *many_s) = prefill_s(shorter), prefill_s(longer)
    predicted_s, measured_s = (long_s / many - short_s / few for short_s, long_s in zip(few_s, many_s))
    assert measured_s <= predicted_s <= 1.6 * measured_s


@pytest.mark.parametrize(
    "name, resident",
    [
        ("decode_llama3_8b_compressed_1rank", "none"),
        ("decode_llama3_70b_compressed_2ranks", "none"),
        ("decode_llama3_8b_streamed_1rank", "none"),
        ("decode_llama3_8b_half_1rank", 0.5),
        ("decode_llama3_8b_streamed_2ranks", "none"),
        ("decode_llama3_8b_streamed_4ranks", "none"),
        ("decode_llama3_70b_streamed_2ranks", "none"),
        ("decode_llama3_70b_streamed_4ranks", "none"),
    ],
)
def test_streamed_passes_are_the_records(name, resident):
    """Predicts at the link rate of the machine that measured, since hosts differ in what several links get. Compressed
    weights are planned with a few bytes more than they have."""
    record = record_of(name)
    plan = plan_of(record["model"], record["tp_size"], resident, record.get("weights_compression", "none"))
    work = pass_work(plan)
    for row in record["passes"]:
        link_gb_s = record["streamed_bytes_per_pass_and_rank"] / row["bound_s"] / 1e9
        linked = replace(rates(record["tp_size"]), link_gb_s=link_gb_s)
        predicted = decode_time(work, row["batch_size"], record["input_len"], linked)
        assert predicted.bound == "link"
        assert predicted.total_s == pytest.approx(row["decode_pass_s"], rel=0.05)


def test_passes_that_decompress_what_stays_are_the_records():
    """Predicts 70B on one GPU, which holds it only with a third of its groups compressed."""
    record = record_of("decode_llama3_70b_compressed_resident_1rank")
    plan = plan_of("Llama-3-70B", 1, "all", "lossless")
    assert not plan.residency.streamed and plan.residency.compressed
    decompressed = (record["compressed_groups"][0], record["decompressed_bytes_per_pass_and_rank"])
    for row in record["passes"]:
        predicted_s = plan.offer.cost.pass_s(row["batch_size"], record["input_len"], 0, *decompressed)
        assert predicted_s == pytest.approx(row["decode_pass_s"], rel=0.06)


COMPRESSED = (
    *("decode_llama3_70b_compressed_resident_1rank", "decode_llama3_8b_compressed_1rank"),
    *("decode_llama3_8b_compressed_4ranks", "decode_llama3_70b_compressed_2ranks"),
    "decode_llama3_70b_24gib_compressed_2ranks",
)


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_decompressor_that_nobody_measured_is_as_fast_as_those_measured(name):
    """Predicts the rate of decompression from the memory rate of the same run alone, at which H200s decompressed 1.5 to
    2.0 TB/s."""
    measured = record_of(name)
    assert measured["rates"] == "measured"
    unknown = replace(rates(1), memory_gb_s=measured["memory_gb_s"], decompress_gb_s=None)
    assert unknown.decompressing_gb_s == pytest.approx(measured["decompress_gb_s"], rel=0.15)


@pytest.mark.parametrize("name", ["link_gb_s", "memory_gb_s", "gemm_tflops"])
def test_the_built_in_cpu_is_no_faster_than_a_small_one_that_was_measured(name):
    """Compares with a CPU of two cores: the built-in rates are at least half of its rates and no more than these."""
    record = record_of("endless_demo_cpu")
    assert record["rates"] == "measured"
    assert 0.5 <= getattr(load_profile("cpu"), name) / record[name] <= 1


@pytest.mark.parametrize("tp_size, batch", [(1, 1), (1, 256), (4, 64)])
def test_the_replayed_plan_is_the_pass(tp_size, batch):
    """Compares time model and timeline where nothing streams: both are the sum of the same steps."""
    plan = plan_of("Llama-3-8B", tp_size)
    shape = PassShape(batch, batch, 49 * batch)
    replayed = timeline_s(predict_timeline(plan.pass_plan, *step_seconds(plan, shape)))
    whole = decode_time(pass_work(plan), batch, 49, plan.rates).total_s
    assert replayed + plan.rates.pass_latency_s == pytest.approx(whole)


def mixed(num_rows: int, context: int, chunk: int) -> PassShape:
    """The shape of rows that decode after `context` cached tokens each, and of the first chunk of a prompt."""
    rows = [BatchRow(row, (0,), context, (), True, None) for row in range(num_rows)]
    return Batch((*rows, BatchRow(num_rows, (0,) * chunk, 0, (), chunk > 0, None))).shape


def prompts(num_tokens: int, number: int = 1) -> PassShape:
    return PassShape(number * num_tokens, number, 0)


@pytest.mark.parametrize(
    "shape, measured_ms",
    [
        (prompts(128), 5.7),
        (prompts(256), 7.9),
        (prompts(512), 12.6),
        (prompts(128, 4), 12.2),
        (prompts(1024), 23.1),
        (prompts(2048), 48.4),
    ],
)
def test_passes_with_prompts_are_those_measured(shape, measured_ms):
    """Predicts 8B on one H200 with everything resident, captured, so that a launch takes as long as a node."""
    work = pass_work(plan_of("Llama-3-8B", 1))
    assert predict_pass(work, shape, rates(1)).total_s * 1e3 == pytest.approx(measured_ms, rel=0.1)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_logits_that_are_gathered_over_ranks_take_half_as_long_as_to_sum_them(tp_size):
    """By hand: all ranks get 128,256 numbers of two bytes for each of 256 rows, but not of the tokens of a prompt."""
    work = pass_work(plan_of("Llama-3-8B", tp_size))
    (gather,) = (step for step, _ in work.steps if step.step in ("logits_gather", "head+logits_gather"))
    assert gather.reduce_bytes(PassShape(256, 256, 0)) == (0 if tp_size == 1 else 256 * 128256 * 2 // 2)
    assert gather.reduce_bytes(PassShape(8192, 1, 0)) == (0 if tp_size == 1 else 128256 * 2 // 2)


@pytest.mark.parametrize("model, tp_size", [("Llama-3-8B", 1), ("Llama-3-70B", 4)])
def test_a_prompt_that_is_scored_passes_the_head_and_the_last_layer_with_all_of_its_tokens(model, tp_size):
    """By hand: o, gate, up and down of one layer, and the head, of whose columns a rank has its part."""
    plan, num_tokens = plan_of(model, tp_size), 2048  # no token is padding
    work, spec, none = pass_work(plan), plan.spec, PassShape(num_tokens, 1, 0)
    some = replace(none, num_scored=num_tokens - 1)
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    weights = hidden * (heads + 3 * spec.ffn_size + spec.vocab_size) / tp_size
    assert work.flops(some) - work.flops(none) == pytest.approx(2 * weights * some.num_scored, rel=0.001)
    longer_s = (predict_pass(work, each, rates(tp_size)).total_s for each in (some, none))
    assert next(longer_s) - next(longer_s) > 2 * weights * some.num_scored / (rates(tp_size).gemm_tflops * 1e12)


def test_an_eager_pass_of_prompts_beside_rows_is_the_one_measured():
    """Compares with the kernels of 8B on one H200: 15 prompts of 512 tokens and one of 212 beside 300 rows at 580."""
    rows = [BatchRow(row, (0,), 580, (), True, None) for row in range(300)]
    rows += [BatchRow(300 + row, (0,) * length, 0, (), True, None) for row, length in enumerate((212, *[512] * 15))]
    predicted = predict_pass(pass_work(plan_of("Llama-3-8B", 1)), Batch(tuple(rows)).shape, rates(1))
    assert predicted.total_s * 1e3 == pytest.approx(189, rel=0.05)


def test_the_built_in_rate_of_launches_is_among_those_measured():
    assert 36e-6 <= rates(1).step_latency_s <= 96e-6


@pytest.mark.parametrize("name, tp_size", [("jobs_llama3_8b_1rank", 1), ("traffic_llama3_8b_resident_2ranks", 2)])
def test_a_mix_of_uneven_requests_takes_what_was_measured(name, tp_size):
    """Predicts 512 requests of 512 tokens +- 80 % and 128 generated ones +- 80 %, of 8B on H200s with everything
    resident: its decode passes, and those with prompts. The scheduler chooses what runs in which pass."""
    record = record_of(name)
    (row,) = (row for row in record["rows"] if row["row"] == "uneven")
    plan = plan_of("Llama-3-8B", tp_size)
    work, seconds = pass_work(plan), Counter()
    scheduler = Scheduler(512, 8192, 8192, 16, plan.residency.num_pages, eos_token_ids=(), retention=plan.retention)
    for number, job in enumerate(random_jobs(512, 512, 128, vocab_size=1000, seed=0, range_ratio=0.8)):
        scheduler.add(Request(number, job.prompt, greedy(job), seed=0))
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        seconds[is_decode(batch)] += predict_pass(work, batch.shape, rates(tp_size)).total_s
        scheduler.update(batch, [7] * batch.num_sampled)
    measured = Counter()
    for kind in row["by_kind"]:
        measured[kind["kind"] == "decode"] += kind["measured_s"]
    assert seconds == pytest.approx(measured, rel=0.1)


def test_requests_that_begin_alike_take_what_was_measured():
    """Predicts 300 requests of 2,000 shared and 64 own tokens, with 32 generated ones, of 8B on one H200 with
    everything resident. Each pass is made before the tokens of the one before it are known, as the engine does."""
    record = record_of("traffic_llama3_8b_1rank")
    (row,) = (row for row in record["rows"] if row["row"] == "shared-prefix")
    (own,) = (one for one in ROWS if one.name == "shared-prefix")
    plan = plan_of("Llama-3-8B", 1)
    work, seconds, under_way = pass_work(plan), Counter(), deque()
    scheduler = Scheduler(512, 8192, 8192, 16, plan.residency.num_pages, prefix_caching=True)
    for number, job in enumerate(own.jobs(own.output_len, plan.spec.vocab_size, 0, 8192)):
        scheduler.add(Request(number, job.prompt, greedy(job), seed=0))
    while scheduler.has_unfinished:
        if (batch := scheduler.schedule()) is not None:
            under_way.append(batch)
            seconds[kind_of(batch.shape)] += predict_pass(work, batch.shape, rates(1)).total_s
        if batch is None or len(under_way) > 1:
            ended = under_way.popleft()
            scheduler.update(ended, [7] * ended.num_sampled)
    assert seconds == pytest.approx({kind["kind"]: kind["measured_s"] for kind in row["by_kind"]}, rel=0.1)


def test_rows_that_decode_beside_a_prompt_cost_what_they_read():
    """A prompt and rows in one pass take no longer than in two, and no less than the prompt and the rows' attention."""
    work, eager = pass_work(plan_of("Llama-3-8B", 1)), replace(rates(1), step_latency_s=1.5e-6)
    both, prompt, rows = (
        predict_pass(work, mixed(*one), eager).total_s for one in ((200, 600, 512), (0, 0, 512), (200, 600, 1))
    )
    read_s = 200 * 601 * work.kv_token_bytes / (KV_SHARE * rates(1).memory_gb_s * 1e9)
    assert prompt + read_s <= both <= prompt + rows
