"""Metrics as Prometheus reads them: vLLM's names, values that are what the engine did, and no more work than one note a
pass."""

import time

import pytest
from penstock.engine.output import Sequence
from penstock.engine.runtime.pass_times import PassTimes
from penstock.engine.server.engine_facts import facts_of, row_pass_s, state_of
from penstock.engine.server.engine_state import EngineState
from penstock.engine.server.histogram import SECONDS, Series
from penstock.engine.server.journey import Journey
from penstock.engine.server.metrics import CONTENT_TYPE, REJECTIONS, Metrics
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from penstock import LLM, SamplingParams

OPTIONS = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "max_num_seqs": 3, "page_size": 4}
GAUGES = "num_requests_running num_requests_waiting kv_cache_usage_perc link_utilisation weights_resident_bytes"
COUNTERS = "prompt_tokens generation_tokens request_success num_preemptions recompute_tokens admission_rejections"
HISTOGRAMS = "time_to_first_token inter_token_latency request_time_per_output_token e2e_request_latency"
NAMES = {
    "gauge": [*GAUGES.split(), "weights_streamed_bytes", "num_requests_waiting_by_reason"],
    "counter": [*COUNTERS.split(), "client_disconnects", "weight_stream_bytes", "prefix_cache_queries", "free_tokens"],
    "histogram": [
        *(f"{name}_seconds" for name in HISTOGRAMS.split()),
        *(f"request_{part}_time_seconds" for part in ("queue", "prefill", "decode")),
        *("weight_stream_stall_seconds", "pass_seconds"),
    ],
}


def told_by(llm: LLM | None) -> tuple:
    """The things that an engine tells: its facts, state and pass times."""
    if llm is None:
        return None, EngineState(), PassTimes()
    return facts_of(llm), state_of(llm, row_pass_s(llm, 1)), llm.engine.times


def families(metrics: Metrics, llm: LLM | None = None) -> dict:
    return {one.name: one for one in text_string_to_metric_families(metrics.text(*told_by(llm)).decode())}


def values(metrics: Metrics, llm: LLM | None = None) -> dict[str, float]:
    """Every sample by its name without `penstock:`, labels in braces."""
    samples = [sample for family in families(metrics, llm).values() for sample in family.samples]
    shown = lambda labels: "{" + ",".join(labels.values()) + "}" if labels else ""  # noqa: E731
    return {one.name.removeprefix("penstock:") + shown(one.labels): one.value for one in samples}


def observe_pass(llm: LLM, metrics: Metrics, moved: list[Journey]) -> None:
    facts, state, times = told_by(llm)
    metrics.observe_pass(facts, state, times.last, moved)


def serve(llm: LLM, metrics: Metrics, prompts: list[str], params: SamplingParams) -> list[Sequence]:
    """Runs prompts, and tells the metrics of each pass as the server does."""
    ways = {}
    for prompt in prompts:
        for sequence in llm.sequences(prompt, params):
            ways[sequence.request.id] = Journey(sequence, None, 0, time.perf_counter())
            llm.loop.add(sequence)
    while llm.loop.has_unfinished:
        num_passes, events = llm.engine.times.num_passes, llm.loop.advance()
        now_s, moved = time.perf_counter(), []
        for event in events:
            way = ways[event.sequence.request.id]
            way.row_s = way.row_s or now_s
            way.take(event.text, event.is_last, now_s)
            moved += [way] if way.last_token_s == now_s else []
            if event.is_last:
                metrics.sequence_ended(way)
        if llm.engine.times.num_passes > num_passes:
            observe_pass(llm, metrics, moved)
    return [way.sequence for way in ways.values()]


def test_names_are_vllms_and_labels_are_fixed():
    """Each counter has one series, not one more for when it was made; nothing enters the library's own registry."""
    metrics = Metrics()
    there, shown = families(metrics), values(metrics)
    for kind, names in NAMES.items():
        for name in names:
            assert there[f"penstock:{name}"].type == kind, name
    assert all(f"request_success_total{{{reason}}}" in shown for reason in ("stop", "length", "abort", "error"))
    assert all(f"admission_rejections_total{{{reason}}}" in shown for reason in REJECTIONS)
    assert not [name for name in shown if "_created" in name] and set(shown.values()) == {0.0}
    assert not [one.name for one in REGISTRY.collect() if "penstock" in one.name]
    assert values(Metrics()) == shown and CONTENT_TYPE.startswith("text/plain")


@pytest.mark.parametrize("resident", ["all", "none"])
def test_values_are_what_happened(resident):
    params, metrics = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, n=2), Metrics()
    with LLM("demo", **OPTIONS, resident=resident, link_gb_s=0.001) as llm:  # which hides all that is computed
        sequences = serve(llm, metrics, ["Return the", "def"], params)
        passes, work = llm.engine.times.num_passes, llm.engine.work
        found = values(metrics, llm)
        counts = llm.loop.scheduler.counts
    num_tokens = sum(len(one.request.output_token_ids) for one in sequences)
    assert num_tokens == 4 * 6 == found["generation_tokens_total"]
    assert found["prompt_tokens_total"] == sum(len(one.request.prompt_token_ids) for one in sequences)
    assert found["request_success_total{length}"] == 4 and found["request_success_total{stop}"] == 0
    assert found["pass_seconds_count{decode}"] + found["pass_seconds_count{prefill}"] == passes
    assert found["weight_stream_bytes_total"] == passes * work.streamed_bytes
    assert found["weight_stream_stall_seconds_count"] == (passes if resident == "none" else 0)
    assert found["inter_token_latency_seconds_count"] == num_tokens - 4
    for name in ("time_to_first_token", "request_time_per_output_token", "e2e_request_latency", "request_queue_time"):
        assert found[f"{name}_seconds_count"] == 4 and found[f"{name}_seconds_sum"] >= 0
    assert found["prefix_cache_queries_total"] == counts.num_asked_tokens > 0
    assert found["prefix_cache_hits_total"] == counts.num_hit_tokens
    assert found["free_tokens_total"] == counts.num_free_tokens
    assert found["free_tokens_used_total"] == counts.num_free_tokens_used
    assert (counts.num_free_tokens_used > 0) == (resident == "none")
    assert (found["num_requests_running"], found["num_requests_waiting"], found["kv_cache_usage_perc"]) == (0, 0, 0)
    assert found["weights_resident_bytes"] + found["weights_streamed_bytes"] > 0
    assert (found["link_utilisation"] > 0) == (resident == "none") and found["link_utilisation"] <= 1


def test_gauges_are_those_of_the_moment_and_rejections_are_counted():
    metrics = Metrics()
    with LLM("demo", **OPTIONS) as llm:
        for prompt in ("Return the", "def", "class", "import"):
            llm.loop.add(llm.sequences(prompt, SamplingParams(max_tokens=20, ignore_eos=True))[0])
        llm.loop.advance()
        found = values(metrics, llm)
        assert (found["num_requests_running"], found["num_requests_waiting"]) == (3, 1)
        lacking = [found[f"num_requests_waiting_by_reason{{{why}}}"] for why in ("rows", "pages", "tokens")]
        assert lacking == [1, 0, 0]
        assert 0 < found["kv_cache_usage_perc"] <= 1
        llm.loop.clear()
    metrics.request_rejected("queue_full")
    metrics.client_disconnected()
    found = values(metrics)
    assert found["admission_rejections_total{queue_full}"] == found["client_disconnects_total"] == 1


def test_a_pass_of_many_rows_is_one_note(monkeypatch):
    noted, observe = [], Series.observe
    monkeypatch.setattr(Series, "observe", lambda self, *given: noted.append(given) or observe(self, *given))
    metrics = Metrics()
    with LLM("demo", **OPTIONS) as llm:
        (sequence,) = serve(llm, metrics, ["def"], SamplingParams(max_tokens=2, ignore_eos=True))
        noted.clear()
        ways = [Journey(sequence, None, 0, 0.0, 0.1, 0.2, 0.7, gap_s=0.5, num_tokens=3) for _ in range(1000)]
        observe_pass(llm, metrics, ways)
    assert noted == [(llm_pass, 1) for llm_pass, _ in noted[:1]] + [(0.5, 1000)]


def test_buckets_are_cumulative():
    series = Series((1.0, 2.0))
    for value, times in ((0.5, 3), (1.0, 1), (1.5, 2), (9.0, 4)):
        series.observe(value, times)
    assert series.buckets() == [("1.0", 4), ("2.0", 6), ("+Inf", 10)] and series.sum == 41.5
    assert list(SECONDS) == sorted(SECONDS)
