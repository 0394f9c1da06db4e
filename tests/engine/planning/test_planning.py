"""Plans of whole engines: the fastest split of known shapes, ever more memory or a faster link (never slower), memory
that others hold, and random configurations."""

import contextlib
import itertools
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from penstock.engine.compute.attention import gather
from penstock.engine.compute.kv_cache import make_cache
from penstock.engine.compute.sampler import Sampler
from penstock.engine.config import EngineConfig
from penstock.engine.kernels import segments
from penstock.engine.model.families import read_config, read_spec
from penstock.engine.model.spec import ModelSpec
from penstock.engine.model.steps import COPIED_ROWS
from penstock.engine.planning.device_profile import load_profile
from penstock.engine.planning.engine_plan import EnginePlan, make_engine_plan
from penstock.engine.planning.memory_claims import DeviceMemory
from penstock.engine.planning.predictions import decode_time, most_seqs, pass_work, step_seconds
from penstock.engine.runtime import start
from penstock.scheduler.cost.pass_work import PassShape
from penstock.scheduler.cost.time_model import free_tokens, link_s, predict_pass
from penstock.scheduler.cost.timeline import predict_timeline, timeline_s
from penstock.scheduler.passes.build import default_ring_bytes, roomy_ring_bytes
from penstock.scheduler.residency import search
from penstock.scheduler.units import GIB

from tests.support.plan_worth import most_instead, worth

SHAPES = Path(__file__).parents[3] / "benchmarks" / "shapes"
HUGE = 10**13  # bytes of a device that holds everything


def spec_of(shape: str) -> ModelSpec:
    path = SHAPES / f"{shape}.json"
    return read_spec(read_config(path), str(path))


WIDE_VOCABULARY = replace(
    spec_of("Llama-3-8B"), num_layers=4, windows=(None,) * 4, vocab_size=256_000, hidden_size=2048, head_dim=64
)
MODELS = {
    **{shape: spec_of(shape) for shape in ("Llama-3-8B", "Llama-3-70B", "Llama-3.1-8B", "Llama-3.2-1B")},
    "wide": WIDE_VOCABULARY,
}


def plan(model: str, gib: float, tp_size: int = 1, link_gb_s: float | None = None, **options) -> EnginePlan:
    rates = load_profile("h200", tp_size, link_gb_s)
    config = EngineConfig(model=model, gpu_memory=int(gib * GIB), **options)
    return make_engine_plan(config, MODELS[model], tp_size, HUGE, rates)


def tokens_s(made: EnginePlan) -> float:
    num_seqs = most_seqs(made.kept, made.residency, made.kept.kv_len)
    work = replace(pass_work(made), waited_bytes=0)  # as the search reckons, which knows no order of copies
    return num_seqs / decode_time(work, num_seqs, made.kept.kv_len, made.rates).total_s


def worth_of(made: EnginePlan) -> float:
    """Tokens/s, with the gain that streaming would have to bring where all weights stay."""
    return worth(tokens_s(made), not (made.residency.streamed or made.residency.compressed))


def most_instead_of(made: EnginePlan) -> float:
    """Tokens/s, with the gain that the plan which it was chosen instead of did not bring."""
    return most_instead(tokens_s(made), made.residency)


def pass_ms(made: EnginePlan) -> float:
    """Milliseconds of a decode pass of one sequence without context."""
    return decode_time(pass_work(made), 1, 0, made.rates).total_s * 1e3


OPTIONS = (
    {"max_num_seqs": 1, "max_model_len": 2048},
    {"max_num_seqs": 64, "max_model_len": 2048},
    {"max_model_len": 2048},
    {},  # the number of sequences is planned, and what memory takes is the longest context
    {"tp_size": 2},
)
# The options of models that are as another one but for size, contexts or a tied head; all of them are tried in a soak.
FEW_OPTIONS = {"Llama-3-70B": ({"tp_size": 2},), "Llama-3.1-8B": ({},), "Llama-3.2-1B": OPTIONS[:1]}


def each(names: str, rows: Iterable[tuple], is_usual: Callable[..., bool]):
    """Parametrizes by rows, those that are not usual marked with `soak`."""
    marked = [pytest.param(*row, marks=[] if is_usual(*row) else [pytest.mark.soak]) for row in rows]
    return pytest.mark.parametrize(names, marked, ids=str)


@each(
    "model, options",
    itertools.product(MODELS, OPTIONS),
    lambda model, options: options in FEW_OPTIONS.get(model, OPTIONS),
)
def test_more_memory_is_never_slower(model, options):
    """Compares predicted tokens/s of all sequences together, at the number that was asked for or planned. Where all
    weights fit at last, and stay, it may be slower by what streaming must gain; where what stays has room to be plain,
    by what compressing that must gain."""
    check_speeds(model, options)


@each("model", ((model,) for model in MODELS), lambda model: model != "Llama-3-70B")
def test_more_memory_is_never_slower_for_one_prompt(model):
    """Plans as `generate` does, for the sequences of its job: the tokens/s are those of its one sequence."""
    job = EngineConfig().for_job(1)
    assert job.max_num_seqs == 1
    plans = check_speeds(model, {"max_num_seqs": job.max_num_seqs})
    assert {most_seqs(made.kept, made.residency, made.kept.kv_len) for made in plans} == {1}


def check_speeds(model: str, options: dict) -> list[EnginePlan]:
    """The plans of ever more memory, as far as the model fits."""
    plans = []
    for gib in (8, 10, 11, 11.25, 14, 16, 17, 18, 21, 32, 48, 49, 80, 141):
        with contextlib.suppress(ValueError):
            plans.append(plan(model, gib, **options))
    found = itertools.accumulate(map(worth_of, plans), max)
    assert all(most_instead_of(more) >= 0.99 * less for less, more in zip(found, plans)) and len(plans) > 5
    return plans


@each("model", ((model,) for model in MODELS), lambda model: model not in ("Llama-3-70B", "Llama-3.1-8B"))
def test_a_faster_link_is_never_slower(model):
    for gib in (10, 17, 40):
        found = [plan(model, gib, link_gb_s=link, max_model_len=2048) for link in (5.0, 25.0, 55.0, 200.0)]
        assert all(most_instead_of(faster) >= 0.99 * worth_of(slower) for slower, faster in itertools.pairwise(found))


@pytest.mark.parametrize(
    "model, gib, options, most_ms",
    [
        ("Llama-3-8B", 17, {}, 4.21),
        ("Llama-3-8B", 17, {"weights_compression": "none"}, 4.21),
        ("Llama-3-8B", 16, {"weights_compression": "none"}, 26.1),
        ("Llama-3-8B", 14, {"weights_compression": "none"}, 69.1),
        ("Llama-3-70B", 80, {}, 395.0),
    ],
)
def test_the_fastest_split_for_one_sequence(model, gib, options, most_ms):
    """Compares with what brute force over all numbers of groups found."""
    assert pass_ms(plan(model, gib, max_num_seqs=1, **options)) <= most_ms


EVERYDAY = {"max_num_seqs": 512, "max_num_batched_tokens": 8192, "max_model_len": 8192}


@pytest.mark.parametrize(
    "model, gib, options, streams",
    [
        ("Llama-3-8B", 125.8, EVERYDAY, False),  # 0.1 % more tokens/s, and one sequence ten times slower
        ("Llama-3-8B", 125.8, {**EVERYDAY, "weights_compression": "lossless"}, False),
        ("Llama-3-8B", 80, {}, False),
        ("Llama-3-8B", 32, {"max_num_seqs": 64}, False),  # 2.7 %
        ("Llama-3-70B", 141, {"weights_compression": "none"}, True),  # 32 %: little room is left beside the weights
    ],
)
def test_weights_that_fit_stay_unless_streaming_gains_its_share(monkeypatch, model, gib, options, streams):
    made, stays = plan(model, gib, **options), plan(model, gib, resident="all", **options)
    monkeypatch.setattr(search, "STREAMING_GAIN", 0.0)
    fastest = plan(model, gib, **options)
    gain = tokens_s(fastest) / tokens_s(stays) - 1
    assert made.residency == fastest.residency if streams else not made.residency.streamed
    assert (gain >= 0.05) == streams and tokens_s(made) * 1.05 > tokens_s(fastest)


@pytest.mark.parametrize("compression", ["auto", "lossless"])
def test_what_stays_is_plain_beside_a_large_cache(compression):
    """Plans the benchmark in which 8 of 32 layers and the head stream. What stays would make room for some sequences
    more if it were compressed, and passes with prompts would take longer."""
    made = plan("Llama-3-8B", 125.8, resident=0.75, max_num_seqs=512, weights_compression=compression).residency
    assert len(made.streamed) == 17 and made.compressed == dict(made.streamed).keys()


def test_an_everyday_server_keeps_all_that_fits():
    """Plans as on a GPU of 125.8 GiB with its number of sequences set: nothing is left on the host."""
    made = plan("Llama-3-8B", 125.8, **EVERYDAY)
    assert made.residency.host_bytes == 0 and made.residency.embed_resident and pass_ms(made) < 4.3
    assert made.residency.split == plan("Llama-3-8B", 125.8, resident="all", **EVERYDAY).residency.split


@pytest.mark.parametrize(
    "model, gib, options",
    [
        ("Llama-3-70B", 80, {}),
        ("Llama-3-70B", 24, {"tp_size": 2}),
        ("Llama-3-8B", 14, {"max_num_seqs": 1}),  # all weights fit compressed, and some stream in less time
        ("Llama-3-8B", 16, {"weights_compression": "none"}),
        ("Llama-3.2-1B", 6, {"max_num_seqs": 1}),  # the longest context, and not all weights
    ],
)
def test_where_not_all_weights_fit_the_most_tokens_count(monkeypatch, model, gib, options):
    made = plan(model, gib, **options)
    monkeypatch.setattr(search, "STREAMING_GAIN", 0.0)
    assert made.residency.streamed and made.residency == plan(model, gib, **options).residency


def test_all_but_an_embedding_that_does_not_fit_stays():
    """Plans four layers with a vocabulary of 256,000: its rows are gathered from the host, and nothing streams."""
    roomy = plan("wide", 10, max_num_seqs=1)
    least = roomy.residency.claimed_bytes - roomy.residency.num_pages * roomy.demand.page_bytes
    least += roomy.demand.wanted_pages(1) * roomy.demand.page_bytes
    tight = plan("wide", (least - roomy.layout.embed.nbytes // 2) / GIB, max_num_seqs=1)
    assert roomy.residency.embed_resident and not tight.residency.embed_resident
    assert not tight.residency.streamed and not tight.residency.compressed
    assert pass_ms(tight) == pass_ms(roomy)


def test_the_number_of_sequences_is_planned_where_none_is_given():
    open_plan, asked = plan("Llama-3-8B", 18), plan("Llama-3-8B", 18, max_num_seqs=256)
    assert 1 < open_plan.max_num_seqs < 256 == asked.max_num_seqs
    assert tokens_s(open_plan) >= tokens_s(asked)  # which claims memory for the activations of 256 rows
    assert plan("Llama-3-8B", 300).max_num_seqs == 512
    assert plan("Llama-3-8B", 100, max_num_batched_tokens=40).max_num_seqs <= 40
    assert 1 < most_seqs(open_plan.kept, open_plan.residency, 2048) <= open_plan.max_num_seqs


def test_shorter_sequences_are_let_in_beside_those_that_are_planned():
    """Activations and logits of these take at most a 64th of the KV cache, and no weight leaves the device for them."""
    made, fewer = plan("Llama-3-8B", 126), plan("Llama-3-8B", 126, max_num_seqs=256)
    assert made.max_num_seqs == 512 and made.residency.split == fewer.residency.split
    more_bytes = made.kept.fixed_bytes - fewer.kept.fixed_bytes
    assert 0 < more_bytes <= fewer.residency.num_pages * made.demand.page_bytes // 64
    num_pages = fewer.residency.num_pages - made.residency.num_pages
    assert num_pages == pytest.approx(more_bytes / made.demand.page_bytes, abs=1)


@pytest.mark.parametrize(
    "model, gib, options, least_seqs, least_tokens_s",
    [
        ("Llama-3-8B", 118, {"resident": "none"}, 1780, 7180),
        ("Llama-3-8B", 118, {"resident": "none", "max_model_len": 1024}, 1780, 7180),
        ("Llama-3-70B", 80, {}, 365, 200),
        ("Llama-3-70B", 118, {"tp_size": 4, "resident": "none"}, 2500, 3700),
    ],
)
def test_where_weights_stream_there_are_as_many_rows_as_the_cache_holds(
    model, gib, options, least_seqs, least_tokens_s
):
    """Predicts their tokens/s at 640 tokens each: the link alone bounds them."""
    made = plan(model, gib, **options)
    num_seqs = most_seqs(made.kept, made.residency, 640)
    time = decode_time(pass_work(made), num_seqs, 640, made.rates)
    assert made.max_num_seqs >= least_seqs and num_seqs / time.total_s >= least_tokens_s
    assert num_seqs >= 0.97 * made.residency.num_pages * 16 / 640 and time.bound == "link"


def test_more_rows_than_usual_are_let_in_only_where_they_pay():
    """Of twice as many resident ones each would take nearly twice as long."""
    made, streamed = plan("Llama-3-8B", 141), plan("Llama-3-8B", 141, resident="none")
    assert made.max_num_seqs == 512 < streamed.max_num_seqs
    assert plan("Llama-3-8B", 141, resident="none", max_num_batched_tokens=700).max_num_seqs == 700


def test_a_pass_has_the_tokens_that_the_link_hides():
    slow, fast = (plan("Llama-3-8B", 100, link_gb_s=link, resident="none") for link in (20.0, 200.0))
    num_free = free_tokens(replace(pass_work(slow), waited_bytes=0), slow.rates)  # the plan does not know of waits yet
    assert slow.max_num_batched_tokens == num_free > 2 * 8192 and fast.max_num_batched_tokens == 8192
    check_plan(slow)
    asked = plan("Llama-3-8B", 100, link_gb_s=20.0, resident="none", max_num_batched_tokens=1000)
    assert asked.max_num_batched_tokens == 1000
    tight = plan("Llama-3-8B", 6, link_gb_s=20.0, resident="none", max_num_seqs=4)  # activations for more would cost KV
    assert tight.max_num_batched_tokens == 8192 < free_tokens(pass_work(tight), tight.rates)
    assert plan("Llama-3-8B", 100, max_num_seqs=10_000).max_num_batched_tokens >= 10_000


@pytest.mark.parametrize("compression, most_over", [("none", 0.015), ("lossless", 0.001)])
def test_a_pass_that_is_filled_waits_for_no_copy(compression, most_over):
    """Makes the ring so long, where the KV cache is large, that lanes overlap which take as long as each other: the
    time of a pass is that of the longer one, as filling reckons. Plain weights leave a gap at the ring's end, which is
    foreseen, and is less the longer compute takes."""
    options = {"resident": "none", "weights_compression": compression}
    made = plan("Llama-3-8B", 118, **options)
    usual = plan("Llama-3-8B", 118, ring=default_ring_bytes(list(made.residency.streamed)), **options)
    work, rates = pass_work(made), replace(made.rates, pass_latency_s=0.0)
    for share in (0.9, 1.0, 1.2):
        num_tokens = int(share * free_tokens(work, rates))
        shape = PassShape(num_tokens, 1, 0)
        whole_s = timeline_s(predict_timeline(made.pass_plan, *step_seconds(made, shape)))
        assert whole_s == pytest.approx(predict_pass(work, shape, rates).total_s, rel=most_over)
        if share == 1.0:
            assert whole_s < 1.006 * link_s(work.streamed_bytes, rates)
    longer_s = timeline_s(predict_timeline(usual.pass_plan, *step_seconds(usual, shape)))
    assert longer_s > 1.03 * whole_s and made.residency.num_pages > (1 - 1 / 64) * usual.residency.num_pages - 1


@pytest.mark.parametrize(
    "model, resident, compression",
    [("Llama-3-8B", 0.5, "none"), ("Llama-3-8B", 0.5, "lossless"), ("Llama-3-70B", "none", "none")],
)
def test_what_compute_waits_for_is_part_of_a_prediction(model, resident, compression):
    """Compares with the plan replayed on two clocks, around the tokens with which both lanes take as long."""
    made = plan(model, 118, resident=resident, weights_compression=compression)
    work, rates = pass_work(made), replace(made.rates, pass_latency_s=0.0)
    free, lanes_alone = free_tokens(work, rates), replace(work, waited_bytes=0)
    for share in (0.8, 0.97, 1.0, 1.05, 1.2):
        shape = PassShape(int(share * free), 1, 0)
        replayed_s = timeline_s(predict_timeline(made.pass_plan, *step_seconds(made, shape)))
        assert predict_pass(work, shape, rates).total_s == pytest.approx(replayed_s, rel=0.01)
    assert predict_pass(lanes_alone, shape, rates).total_s < 0.98 * replayed_s
    assert free < free_tokens(lanes_alone, rates)
    assert pass_work(plan(model, 200, resident="all", weights_compression="none")).waited_bytes == 0


def test_what_is_kept_of_rows_is_claimed():
    """Counts the sampler's state, the logits that it copies at a time, and page tables, for about 1,800 rows."""
    made = plan("Llama-3-8B", 118, resident="none")
    sampler = Sampler(made.max_num_seqs, made.spec.vocab_size, "meta")
    kept = sampler.occurrences.nbytes + sampler.floats.nbytes + sampler.ints.nbytes
    copied = 2 * 4 * COPIED_ROWS * made.spec.vocab_size
    tables = 4 * made.max_num_seqs * made.residency.max_model_len // 16
    assert kept + copied + tables <= dict(made.residency.claims)["workspace"] <= 3 * (kept + copied + tables)


@pytest.mark.parametrize("num_pages, held", [(256, 1), (257, 2), (384, 2), (385, 3), (10_000, 4)])
def test_a_page_holds_no_sequence(num_pages, held):
    """Counts the first page, to which padding is written."""
    made = plan("Llama-3-8B", 40, num_pages=num_pages, max_num_seqs=4)
    assert most_seqs(made.kept, made.residency, 2048) == held


def test_a_head_that_is_the_embedding_is_not_compressed():
    """Plans a tied head, from which the embedding's rows are gathered."""
    tied, untied = (plan(model, 24, weights_compression="lossless") for model in ("Llama-3.2-1B", "Llama-3-8B"))
    assert tied.spec.tied and not untied.spec.tied
    layers = {group for group, _ in tied.demand.groups[:-1]}
    assert tied.demand.compressed.keys() == layers
    assert untied.demand.compressed.keys() == dict(untied.demand.groups).keys()


def test_a_job_says_its_number():
    assert EngineConfig().for_job(3).max_num_seqs == 3
    assert EngineConfig().for_job(1000).max_num_seqs is None  # planned
    assert EngineConfig(max_num_batched_tokens=50).for_job(200).max_num_seqs == 50
    assert EngineConfig(max_num_seqs=7).for_job(3).max_num_seqs == 7
    assert EngineConfig().for_job(0).max_num_seqs is None  # not known


@pytest.mark.parametrize("model, tp_size", [("Llama-3-8B", 1), ("Llama-3-70B", 4), ("wide", 2)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_claim_of_the_kv_cache_is_what_is_allocated(model, tp_size, dtype):
    """Counts the cache, and what attention copies of it in a layer for a row that is as long as may be."""
    made = plan(model, 30, tp_size, dtype=dtype, page_size=32)
    spec = made.spec
    angles = torch.empty(2, 8, spec.rope.rotary_dim // 2, dtype=getattr(torch, dtype), device="meta")
    cache = make_cache(made, 32, max(spec.num_kv_heads // tp_size, 1), angles)
    every = torch.empty(made.residency.max_model_len, dtype=torch.int64, device="meta")
    gathered = gather(cache.layer(0), every, every)
    claims = dict(made.residency.claims)
    assert claims["KV cache"] == cache.data.nbytes
    assert claims["gathered context"] == sum(tensor.nbytes for tensor in gathered)


@pytest.mark.parametrize("model, tp_size", [("Llama-3-8B", 1), ("Llama-3.1-8B", 2), ("wide", 2)])
def test_the_claim_of_attentions_partials_suffices(model, tp_size):
    """The workspace is allocated for any number of rows (Cutting)."""
    made = plan(model, 60, tp_size)
    residency, sizes = made.residency, (made.spec.num_heads // tp_size, made.spec.head_dim)
    num_cached, most = residency.num_pages * 16, residency.max_model_len
    rows = range(1, made.max_num_seqs + 1)
    items = max(map(segments.Segments(made.spec.num_kv_heads // tp_size, most, num_cached).most, rows))
    begun = 4 * segments.partials_size(made.max_num_seqs, *sizes)  # which the workspace's claim holds
    nbytes = 4 * segments.partials_size(items, *sizes)
    claims = dict(residency.claims)
    assert begun < claims["workspace"] and nbytes <= claims["attention partials"] + begun


def test_memory_that_others_hold_is_not_planned_with():
    config = EngineConfig(model="x")
    spec, rates = MODELS["Llama-3-8B"], load_profile("h200")
    alone = make_engine_plan(config, spec, 1, DeviceMemory(24 * GIB, 24 * GIB), rates)
    beside = make_engine_plan(config, spec, 1, DeviceMemory(24 * GIB, 9 * GIB), rates)
    assert alone.residency.memory_bytes == int(24 * GIB * 0.9) and not alone.notes
    assert beside.residency.claimed_bytes <= beside.residency.memory_bytes == 9 * GIB
    (note,) = beside.notes
    assert note.startswith("other processes hold 15.00 GiB") and "9.00 GiB that are free" in note
    assert not make_engine_plan(config, spec, 1, DeviceMemory(24 * GIB, 22 * GIB), rates).notes
    asked = replace(config, gpu_memory="10GiB")
    with pytest.raises(ValueError, match="gpu_memory=10.00 GiB: the device has 24.00 GiB, of which 9.00 GiB are free"):
        make_engine_plan(asked, spec, 1, DeviceMemory(24 * GIB, 9 * GIB), rates)


def test_the_least_memory_of_all_ranks_counts():
    class Other:
        """A group of two: the other rank has a smaller GPU, of which more is free."""

        def largest(self, ints):
            return [max(own, other) for own, other in zip(ints, (-20 * GIB, -19 * GIB), strict=True)]

    assert start.least_memory(DeviceMemory(24 * GIB, 9 * GIB), Other()) == DeviceMemory(20 * GIB, 9 * GIB)
    assert start.least_memory(None, Other()) is None


def test_what_this_process_holds_unused_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 * GIB)
    found = start.device_memory(torch.device("cuda:0"))
    assert found == DeviceMemory(24 * GIB, 7 * GIB + start.LEAST_CONTEXT_BYTES)
    assert start.device_memory(torch.device("cpu")) is None


def random_case(rng: random.Random) -> tuple[ModelSpec, int, int, dict]:
    """A random model, ranks, device memory and options; some of them are impossible."""
    kv_heads, head_dim, num_layers = rng.choice((1, 2, 8)), rng.choice((64, 128)), rng.randint(1, 40)
    heads = kv_heads * rng.choice((1, 4, 8))
    spec = replace(
        rng.choice(list(MODELS.values())),
        num_layers=num_layers,
        windows=(None,) * num_layers,
        num_kv_heads=kv_heads,
        num_heads=heads,
        head_dim=head_dim,
        hidden_size=heads * head_dim,
        ffn_size=rng.randint(100, 30_000),
        vocab_size=rng.choice((1000, 32_000, 256_000)),
        max_position=rng.choice((512, 8192, 131_072)),
        tied=rng.random() < 0.3,
        parallel_residual=rng.random() < 0.2,
        dtype=rng.choice(("bfloat16", "bfloat16", "float32")),
    )
    options = {
        "gpu_memory": int(2 ** rng.uniform(29, 37)),
        "resident": rng.choice(("auto", "auto", "auto", "all", "none", 0.5)),
        "weights_compression": rng.choice(("auto", "auto", "none")),
        "max_num_seqs": rng.choice((None, None, 1, 16, 256, 8192)),
        "max_model_len": rng.choice((None, None, 256)),
        "ring": rng.choice((None, None, None, "300MiB")),
        "num_pages": rng.choice((None, None, None, 500)),
    }
    return spec, rng.choice((1, 1, 2, 4)), 2**38, options


def check_plan(made: EnginePlan) -> None:
    """Asserts that bytes add up and memory is not exceeded."""
    residency, groups = made.residency, dict(made.demand.groups)
    assert residency.claimed_bytes <= residency.memory_bytes
    names = {group for group, _ in residency.streamed}
    assert names.isdisjoint(residency.resident) and names | residency.resident == groups.keys()
    held = {group: made.kept.compressed[group] if group in residency.compressed else groups[group] for group in groups}
    kept = residency.resident_bytes + residency.host_bytes
    assert kept == sum(held.values()) + made.layout.embed.nbytes
    assert made.pass_plan.streamed_bytes == residency.streamed_bytes
    if most_seqs(made.kept, residency, made.kept.kv_len):
        chosen_by = made.offer.cost.tokens_s(made.kept, residency)
        assert chosen_by == pytest.approx(tokens_s(made))  # which is shown
    work = pass_work(made)
    assert work.streamed_bytes + work.resident_bytes == sum(held.values())  # of the embedding a few rows are read
    assert residency.ring.ring_bytes <= max(roomy_ring_bytes(list(residency.streamed)), made.demand.ring_bytes or 0)
    assert dict(residency.claims)["KV cache"] == residency.num_pages * made.demand.page_bytes
    assert made.pass_plan.decompression_buffer_bytes <= dict(residency.claims).get("decompression buffer", 0)
    assert made.activations_bytes == dict(residency.claims)["activations"]
    assert 1 <= made.max_num_seqs <= max(made.demand.max_num_seqs, made.demand.most_let_in)


def check_random(seed: int) -> bool:
    """Tells whether there is a plan. A refusal is one line."""
    spec, tp_size, memory, options = random_case(random.Random(seed))
    start = time.process_time()
    try:
        made = make_engine_plan(EngineConfig(**options), spec, tp_size, memory, load_profile("h200", tp_size))
        check_plan(made)
    except ValueError as error:
        assert "\n" not in str(error)
        return False
    finally:
        assert time.process_time() - start < 10
    return True


def test_random_configurations():
    """Checks sixty configurations. More can be checked by hand, in the root of the checkout:
    `python -c "import tests.engine.planning.test_planning as t; print(sum(map(t.check_random, range(3000))))"`."""
    assert sum(map(check_random, range(60))) > 30
