"""The sentences about a probe's figures: each is in the report if the figures show it, and only then."""

from dataclasses import replace

import pytest
from penstock.engine.measure.probe_report import meanings, pcie_speed, report

from tests.support.probes import CPU, FOUR

SINGLE = replace(FOUR, num_ranks=1, link_gb_s=[55.1], link_alone_gb_s=[55.1], link_together_gb_s=[55.1], reduces=[])


@pytest.mark.parametrize(
    "rate_gb_s, words",
    [
        (1.0, "below the speed of PCIe 3 x4 or 4 x2, which is 2.96 to 3.74 GB/s"),
        (3.2, "at the speed of PCIe 3 x4 or 4 x2"),
        (6.5, "at the speed of PCIe 3 x8 or 4 x4"),
        (13.0, "at the speed of PCIe 3 x16, 4 x8 or 5 x4"),
        (26.0, "at the speed of PCIe 4 x16 or 5 x8"),
        (
            40.0,
            "below the speed of PCIe 5 x16 or 6 x8, which is 47.2 to 59.8 GB/s, and above that of PCIe 4 x16 or 5 x8",
        ),
        (55.3, "at the speed of PCIe 5 x16 or 6 x8"),
        (105.0, "at the speed of PCIe 6 x16"),
        (350.0, "above the speed of PCIe 6 x16"),
    ],
)
def test_a_link_s_speed(rate_gb_s, words):
    assert pcie_speed(rate_gb_s) == words


def test_four_ranks_that_share_their_host():
    lines = meanings(FOUR)
    assert "the links of ranks 0, 1, 2 and 3 run at the speed of PCIe 5 x16 or 6 x8 (55.0 to 55.2 GB/s alone)" in lines
    shared = "what they share binds (the host's memory, or a PCIe switch)"
    assert f"all links at once sum to 161.7 GB/s: {shared}: each rank gets 73% to 74% of its link alone" in lines
    assert "an all-reduce of 16 KiB takes 41.0 us eager, 9.0 us in a graph; by NCCL 17.4 us in a graph" in lines
    assert "while a weight crosses the link, GEMMs could use it for about 18,000 tokens" in lines
    assert lines[-1] == "an operation that computes nothing takes 2.5 us, 1.0 us in a graph"


def test_one_slow_link_is_named():
    slow = replace(FOUR, link_alone_gb_s=[55.1, 13.0, 55.1, 55.0], link_together_gb_s=[53.0, 13.0, 53.0, 53.0])
    lines = meanings(slow)
    assert "the link of rank 1 runs at the speed of PCIe 3 x16, 4 x8 or 5 x4 (13.0 GB/s alone)" in lines
    assert "the link of rank 1 alone has 24% of rank 0's rate; passes wait for the slowest" in lines
    assert "the links of ranks 0, 2 and 3 run at the speed of PCIe 5 x16 or 6 x8 (55.0 to 55.1 GB/s alone)" in lines
    assert any("each rank keeps at least 96% of its link alone" in line for line in lines)
    assert not any("share binds" in line for line in lines)


def test_one_rank_shares_nothing_and_reduces_nothing():
    text = report(SINGLE)
    assert "all links" not in text and "links all at once" not in text and "all-reduce" not in text
    assert "the link of rank 0 runs at the speed of PCIe 5 x16 or 6 x8 (55.1 GB/s alone)" in text
    assert text.startswith("1 rank of NVIDIA H200\n") and "in a graph" in text


def test_without_a_gpu_no_word_of_pcie():
    text = report(CPU)
    assert "PCIe" not in text and text.startswith("4 ranks of x86_64\n") and "takes 2.5 us\n" in text + "\n"
    assert "all links at once sum to 161.7 GB/s: each rank gets 73% to 74% of its link alone" in text


def test_float32_says_nothing_of_tokens():
    assert not any("tokens" in line for line in meanings(replace(SINGLE, dtype="float32")))


def test_tables():
    lines = report(FOUR).splitlines()
    assert lines[2].split() == ["rank", "0", "1", "2", "3"]
    assert lines[3].split() == ["link", "alone,", "GB/s", "55.1", "55.2", "55.1", "55"]
    assert lines[5].split()[-4:] == ["4100", "4130", "4120", "4110"]
    head = next(index for index, line in enumerate(lines) if line.startswith("all-reduce, us"))
    assert lines[head].split("  ")[-1].strip() == "NCCL in a graph"
    assert lines[head + 1].split() == ["4", "KiB", "40.0", "8.0", "42.0", "17.0"]
    assert lines[head + 3].split() == ["64", "MiB", "330.0", "332.0", "325.0", "332.0"]
