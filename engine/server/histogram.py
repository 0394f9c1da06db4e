"""Histograms that take a value many times over at once: a pass gives a thousand rows the same time between two
tokens."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0,
           7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip


class Series:
    """The values of one label: how many lie in each bucket, and their sum."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Adds a value, so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """The cumulative counts, by their upper bounds."""
        found, below = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), list(self.counts), strict=True):
            below += count
            found.append((bound, below))
        return found


class Histogram(Collector):
    """A histogram of seconds with a series for each of `values` of its label, or one alone. Registers itself."""

    def __init__(self, registry: CollectorRegistry, name: str, what: str, label: str = "", values: Iterable[str] = ()):
        self._name, self._what, self._labels = name, what, [label] if label else []
        self.series = {value: Series(SECONDS) for value in (values if label else ("",))}
        registry.register(self)

    def observe(self, seconds: float, times: int = 1, value: str = "") -> None:
        """Adds seconds, so many times, to the series of a label's value."""
        self.series[value].observe(seconds, times)

    def describe(self) -> Iterator[HistogramMetricFamily]:
        yield HistogramMetricFamily(self._name, self._what, labels=self._labels)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._what, labels=self._labels)
        for value, series in self.series.items():
            family.add_metric([value] * len(self._labels), series.buckets(), series.sum)
        yield family
