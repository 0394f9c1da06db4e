"""The benchmarks of link and collectives on two gloo ranks, small: every case is measured and recorded."""

import itertools
import json
import sys

import pytest
from penstock.scheduler.units import MIB

from scripts.bench import collectives as benchmark_collectives
from scripts.bench.link import REDUCE_BYTES, cases
from tests.support.forked_ranks import fork_ranks

pytestmark = pytest.mark.timeout(120)
RANK = """
import sys
from penstock.parallel.launch import run_rank
from scripts.bench import collectives as benchmark_collectives, link as benchmark_link

def main():
    for script, *arguments in (
        (benchmark_link, "--piece-mib", "1", "64", "--in-flight", "2", "--buffer-mib", "2", "--total-mib", "4"),
        (benchmark_collectives, "--size-kib", "4", "64", "--dtype", "float32"),
    ):
        sys.argv = [script.__name__, "--device", "cpu", *arguments, "--output-json", f"{script.__name__}.json"]
        script.main()

sys.exit(run_rank(main))
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "rank.py").write_text(RANK)
    done = fork_ranks(2, "rank.py", timeout=100, cwd=folder)
    assert done.all_ended, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    kept = [json.loads((folder / f"scripts.bench.{name}.json").read_text()) for name in ("link", "collectives")]
    assert printed == kept  # rank 0 alone speaks, once for each script
    return kept


def test_link(records):
    record = records[0]
    assert record["benchmark"] == "link" and record["tp_size"] == 2 and record["hardware"].startswith("2 x ")
    named = ("direction", "ranks", "piece_bytes", "in_flight", "load")
    seen = {tuple(row[name] for name in named): row for row in record["rows"]}
    assert len(seen) == len(record["rows"]) == len(cases([MIB], [2], 2))
    for piece, direction, ranks in itertools.product((MIB, None), ("h2d", "d2h"), ("alone", "together")):
        assert (direction, ranks, piece, None, "none") in seen  # 64 MiB is more than the buffer
    for load, in_flight in itertools.product(("reads", *REDUCE_BYTES), (None, 2)):
        assert ("h2d", "together", MIB, in_flight, load) in seen
    for row in record["rows"]:
        assert len(row["rates_gb_s"]) == 2 and row["gb_s"] == min(row["rates_gb_s"]) > 0
        assert row["sum_gb_s"] == pytest.approx(sum(row["rates_gb_s"])) and 0 < row["fraction_of_best"] <= 1
    for direction, ranks in itertools.product(("h2d", "d2h"), ("alone", "together")):
        alike = [row for row in record["rows"] if (row["direction"], row["ranks"]) == (direction, ranks)]
        assert max(row["fraction_of_best"] for row in alike) == 1


def test_collectives(records):
    record = records[1]
    assert record["benchmark"] == "collectives" and record["collectives"] == "Gloo" and record["copies_gb_s"] > 0
    assert [row["bytes"] for row in record["rows"]] == [4096, 65536]
    for row in record["rows"]:
        assert row["bus_gb_s"] == pytest.approx(row["bytes"] / row["eager_s"] / 1e9)  # 2 (n - 1) / n is 1
        assert row["eager_s"] > 0 and row["eager_s_beside_copies"] > 0


def test_one_rank_has_no_collectives(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["collectives.py"])
    assert benchmark_collectives.main() == 2
    assert "torchrun" in capsys.readouterr().err
