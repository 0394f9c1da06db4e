"""The server's metrics, for Prometheus: vLLM's names where it has them, under `penstock:`.

They have a registry of their own, and labels of a few fixed values, so their number never grows. What passes give is
added once a pass, as the engine tells of it. Gauges are set when somebody asks. Bytes are those of one rank.
"""

from collections import Counter as Tally
from collections.abc import Sequence

from penstock.engine.runtime.pass_times import PassTimes, Timed
from penstock.engine.server.engine_state import EngineFacts, EngineState
from penstock.engine.server.histogram import Histogram
from penstock.engine.server.journey import Journey
from penstock.scheduler.batching.counts import Wait
from penstock.scheduler.batching.request import FinishReason
from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest

__all__ = ["CONTENT_TYPE", "INVALID", "REJECTIONS", "Metrics", "link_use", "pass_kind", "stall_s"]

INVALID = "invalid"  # the client's mistake
REJECTIONS = ("loading", "queue_full", "shutting_down", "engine_dead", "invalid_api_key", INVALID)
KINDS = ("prefill", "decode")


class Metrics:
    """All of them, in the event loop. `facts`, `state` and `times` are those that the engine told."""

    def __init__(self):
        disable_created_metrics()  # a second series for each counter, with the time at which it began
        self.registry = CollectorRegistry()
        self._make_counters()
        self._make_histograms()
        self._make_gauges()
        self._before: Tally[str] = Tally()  # of numbers that the engine counts itself

    def _make_counters(self) -> None:
        counter = self._counter
        self._prompt_tokens = counter("prompt_tokens", "tokens of prompts that were computed or found cached")
        self._generation_tokens = counter("generation_tokens", "tokens that were generated")
        self._preemptions = counter("num_preemptions", "rows that gave way to others")
        self._recomputed = counter("recompute_tokens", "tokens of rows that gave way, computed once more")
        self._cache_queries = counter("prefix_cache_queries", "tokens that were looked for in the prefix cache")
        self._cache_hits = counter("prefix_cache_hits", "tokens that were found there")
        self._free = counter("free_tokens", "tokens that the link hid in passes, whether or not there were so many")
        self._free_used = counter("free_tokens_used", "those of them that were computed")
        self._streamed = counter("weight_stream_bytes", "bytes of weights that crossed the link of a rank")
        self._disconnects = counter("client_disconnects", "clients that went before their answer was whole")
        reasons = [reason.value for reason in FinishReason]
        self._success = counter("request_success", "sequences that ended", "finished_reason", reasons)
        self._rejected = counter("admission_rejections", "requests that were not taken in", "reason", REJECTIONS)

    def _make_histograms(self) -> None:
        histogram = self._histogram
        self._first_token = histogram("time_to_first_token", "from a request's arrival to its first token")
        self._gap = histogram("inter_token_latency", "between two tokens of a sequence")
        self._per_token = histogram("request_time_per_output_token", "a sequence's mean time between two tokens")
        self._e2e = histogram("e2e_request_latency", "from a request's arrival to its end")
        self._queue = histogram("request_queue_time", "from a request's arrival to its row")
        self._prefill = histogram("request_prefill_time", "from a request's row to its first token")
        self._decode = histogram("request_decode_time", "from a request's first token to its last")
        self._stall = histogram("weight_stream_stall", "by which a pass took longer than its compute was predicted to")
        self._pass = histogram("pass", "of a pass", "kind", KINDS)

    def _make_gauges(self) -> None:
        gauge = self._gauge
        self._running = gauge("num_requests_running", "sequences that hold a row")
        self._waiting = gauge("num_requests_waiting", "sequences that wait for a row")
        what = "those of them for whose first this was lacking in the last pass"
        self._waiting_for = gauge("num_requests_waiting_by_reason", what, "reason", [why.value for why in Wait])
        self._pages = gauge("kv_cache_usage_perc", "share of the KV pages that are held; 1 is all of them")
        self._link = gauge("link_utilisation", "share of the last pass in which the link was busy; 1 is all of it")
        self._resident_bytes = gauge("weights_resident_bytes", "bytes of weights that stay on a rank's device")
        self._streamed_bytes = gauge("weights_streamed_bytes", "bytes of weights that cross a rank's link in a pass")

    def observe_pass(self, facts: EngineFacts, state: EngineState, last: Timed, moved: Sequence[Journey]) -> None:
        """Notes a pass that ended, and those that got a token in it."""
        self._pass.observe(last.measured_s, value=pass_kind(last))
        if facts.streamed_bytes:
            self._streamed.inc(facts.streamed_bytes)
            self._stall.observe(stall_s(last))
        self._generation_tokens.inc(len(moved))
        for gap_s, times in Tally(journey.gap_s for journey in moved).items():
            if gap_s is not None:
                self._gap.observe(gap_s, times)
        for journey in moved:
            if journey.gap_s is None:
                self._first_token.observe(journey.first_token_s - journey.came_s)
                self._prompt_tokens.inc(len(journey.sequence.request.prompt_token_ids))
        self._follow(self._preemptions, "preemptions", state.num_preemptions)
        self._follow(self._recomputed, "recomputed", state.num_recomputed_tokens)
        self._follow(self._cache_queries, "asked", state.num_asked_tokens)
        self._follow(self._cache_hits, "hit", state.num_hit_tokens)
        self._follow(self._free, "free", state.num_free_tokens)
        self._follow(self._free_used, "free used", state.num_free_tokens_used)

    def _follow(self, counter: Counter, name: str, number: int) -> None:
        """Brings a counter up to a number that grows elsewhere."""
        counter.inc(number - self._before[name])
        self._before[name] = number

    def sequence_ended(self, journey: Journey) -> None:
        """Notes the end of a sequence, for whatever reason."""
        self._success.labels(journey.sequence.request.finish_reason.value).inc()
        row_s, first_s, last_s = journey.row_s, journey.first_token_s, journey.last_token_s
        self._e2e.observe(journey.ended_s - journey.came_s)
        if row_s is not None:
            self._queue.observe(row_s - journey.came_s)
        if row_s is not None and first_s is not None:
            self._prefill.observe(first_s - row_s)
            self._decode.observe(last_s - first_s)
        if journey.num_tokens > 1:
            self._per_token.observe((last_s - first_s) / (journey.num_tokens - 1))

    def request_rejected(self, reason: str) -> None:
        """Notes a request that was not taken in; the reason is one of REJECTIONS."""
        self._rejected.labels(reason).inc()

    def client_disconnected(self) -> None:
        """Notes a client that went before its answer was whole."""
        self._disconnects.inc()

    def text(self, facts: EngineFacts | None, state: EngineState, times: PassTimes) -> bytes:
        """All metrics as Prometheus reads them; there are no facts until the engine is loaded."""
        if facts is not None:
            self._running.set(state.num_running)
            self._waiting.set(state.num_waiting)
            for why in Wait:
                self._waiting_for.labels(why.value).set(state.num_waiting if state.why_waiting == why else 0)
            self._pages.set(1.0 - state.num_available_pages / facts.num_pages)
            self._resident_bytes.set(facts.resident_bytes)
            self._streamed_bytes.set(facts.streamed_bytes)
            self._link.set(link_use(times.last))
        return generate_latest(self.registry)

    def _counter(self, *what: str | Sequence[str]) -> Counter:
        return self._made(Counter, *what)

    def _gauge(self, *what: str | Sequence[str]) -> Gauge:
        return self._made(Gauge, *what)

    def _made(self, kind: type, name: str, what: str, label: str = "", values: Sequence[str] = ()) -> Counter | Gauge:
        made = kind(f"penstock:{name}", what, [label] if label else [], registry=self.registry)
        for value in values:
            made.labels(value)
        return made

    def _histogram(self, name: str, what: str, label: str = "", values: Sequence[str] = ()) -> Histogram:
        return Histogram(self.registry, f"penstock:{name}_seconds", f"seconds {what}", label, values)


def pass_kind(timed: Timed) -> str:
    """The kind of a pass: decode, or prefill if a part of a prompt was in it."""
    return "decode" if timed.shape.is_decode else "prefill"


def link_use(timed: Timed | None) -> float:
    """The share of a pass in which the link was busy, at the rate that is planned with."""
    return min(timed.predicted.link_s / timed.measured_s, 1.0) if timed is not None else 0.0


def stall_s(timed: Timed) -> float:
    """The seconds by which a pass took longer than its compute was predicted to: those that it waited for weights."""
    return max(timed.measured_s - timed.predicted.lane_s, 0.0)
