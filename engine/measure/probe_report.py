"""Shows the figures of a probe as tables, and says in plain words what they mean, but no more than they show.
Torch-free.
"""

from penstock.engine.planning.device_profile import Probe, ranks
from penstock.scheduler.units import KIB, show_size, us

# rates in 1e9 bytes/s, one way and before packet headers, and the links that have them
PCIE = (
    (3.94, "PCIe 3 x4 or 4 x2"),
    (7.88, "PCIe 3 x8 or 4 x4"),
    (15.75, "PCIe 3 x16, 4 x8 or 5 x4"),
    (31.5, "PCIe 4 x16 or 5 x8"),
    (63.0, "PCIe 5 x16 or 6 x8"),
    (121.0, "PCIe 6 x16"),
)
LEAST, MOST = 0.75, 0.95  # the share of such a rate that copies reach
SAME = 0.95  # rates this near to each other count as equal
REDUCE_BYTES = 16 * KIB  # of a reduce in a decode pass of few rows
WAYS = {"eager_s": "eager", "graph_s": "in a graph", "nccl_eager_s": "NCCL eager", "nccl_graph_s": "NCCL in a graph"}


def report(probe: Probe) -> str:
    """The whole report, for a terminal."""
    parts = [f"{ranks(probe.num_ranks)} of {probe.device}", _by_rank(probe)]
    if probe.reduces:
        parts.append(reduce_lines(probe.reduces))
    parts.append("\n".join(f"- {line}" for line in meanings(probe)))
    return "\n\n".join(parts)


def _by_rank(probe: Probe) -> str:
    rows = [("link alone, GB/s", probe.link_alone_gb_s)]
    if probe.num_ranks > 1:
        rows.append(("links all at once, GB/s", probe.link_together_gb_s))
    rows += [("memory read, GB/s", probe.memory_gb_s), (f"GEMM {probe.dtype}, TFLOP/s", probe.gemm_tflops)]
    rows.append(("decompression of weights, GB/s", probe.decompress_gb_s))
    head = f"{'rank':<32}" + "".join(f"{rank:>10}" for rank in range(probe.num_ranks))
    return "\n".join([head, *(f"{name:<32}" + "".join(f"{rate:>10.4g}" for rate in rates) for name, rates in rows)])


def reduce_lines(rows: list[dict[str, float]], ways: dict[str, str] = WAYS) -> str:
    """A table with a line for each size, in microseconds, and a column for each of `ways` (key of a row -> title) that
    was measured."""
    shown = {key: title for key, title in ways.items() if key in rows[0]}
    lines = [f"{'all-reduce, us':<14}" + "".join(f"{title:>{len(title) + 3}}" for title in shown.values())]
    for row in rows:
        times = (f"{us(row[key]):>{len(title) + 3}.1f}" for key, title in shown.items())
        lines.append(f"{show_size(row['bytes']):<14}" + "".join(times))
    return "\n".join(lines)


def meanings(probe: Probe) -> list[str]:
    """One sentence for each thing that the figures show."""
    lines = _links(probe) if probe.device_type == "cuda" else ["no GPU: the link is a copy within host memory"]
    lines += _together(probe)
    slowest = probe.link_gb_s[-1]
    ratio, tokens = min(probe.memory_gb_s) / slowest, min(probe.gemm_tflops) * 1e3 / slowest
    lines.append(f"memory is read {ratio:.3g} times as fast as the link brings weights")
    if probe.dtype != "float32":  # two bytes a weight, two FLOPs a token
        lines.append(f"while a weight crosses the link, GEMMs could use it for about {_round(tokens)} tokens")
    lines.append(_decompression(probe))
    lines += _reduces(probe)
    graph = "" if probe.node_s is None else f", {us(probe.node_s):.1f} us in a graph"
    return [*lines, f"an operation that computes nothing takes {us(probe.launch_s):.1f} us{graph}"]


def _links(probe: Probe) -> list[str]:
    """Sentences about the speed of each link alone, one for all ranks with the same; then about a slower one."""
    same: dict[str, list[int]] = {}
    for rank, rate in enumerate(probe.link_alone_gb_s):
        same.setdefault(pcie_speed(rate), []).append(rank)
    lines = []
    for speed, members in same.items():
        rates = [probe.link_alone_gb_s[rank] for rank in members]
        shown = f"{min(rates):.1f}" + (f" to {max(rates):.1f}" if max(rates) - min(rates) >= 0.1 else "")
        who = f"link of rank {members[0]} runs" if len(members) == 1 else f"links of ranks {_list(members)} run"
        lines.append(f"the {who} {speed} ({shown} GB/s alone)")
    best, worst = max(probe.link_alone_gb_s), min(probe.link_alone_gb_s)
    if worst < SAME * best:
        slow, fast = probe.link_alone_gb_s.index(worst), probe.link_alone_gb_s.index(best)
        lines.append(
            f"the link of rank {slow} alone has {worst / best:.0%} of rank {fast}'s rate; passes wait for the slowest"
        )
    return lines


def pcie_speed(rate_gb_s: float) -> str:
    """The end of the sentence "the link runs ..."."""
    below = ""
    for raw, name in PCIE:
        if rate_gb_s < LEAST * raw:
            return f"below the speed of {name}, which is {LEAST * raw:.3g} to {MOST * raw:.3g} GB/s{below}"
        if rate_gb_s <= MOST * raw:
            return f"at the speed of {name}"
        below = f", and above that of {name}"
    return f"above the speed of {PCIE[-1][1]}"


def _together(probe: Probe) -> list[str]:
    if probe.num_ranks == 1:
        return []
    shares = [both / alone for both, alone in zip(probe.link_together_gb_s, probe.link_alone_gb_s)]
    total = f"all links at once sum to {sum(probe.link_together_gb_s):.4g} GB/s"
    if min(shares) >= SAME:
        return [f"{total}: each rank keeps at least {min(shares):.0%} of its link alone"]
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    got = f"{low} to {high}" if low != high else low
    binds = " what they share binds (the host's memory, or a PCIe switch):" if probe.device_type == "cuda" else ""
    return [f"{total}:{binds} each rank gets {got} of its link alone"]


def _decompression(probe: Probe) -> str:
    times = min(probe.decompress_gb_s) / probe.link_gb_s[-1]
    if times < 1:
        return (
            "compressed weights are decompressed more slowly than the link brings plain ones: compression does not pay"
        )
    return f"compressed weights are decompressed {times:.3g} times as fast as the link brings plain ones"


def _reduces(probe: Probe) -> list[str]:
    lines = []
    for row in probe.reduces:
        if row["bytes"] != REDUCE_BYTES:
            continue
        shown = [f"{us(row[key]):.1f} us {title}" for key, title in list(WAYS.items())[:2] if key in row]
        text = f"an all-reduce of {show_size(REDUCE_BYTES)} takes {', '.join(shown)}"
        if "nccl_graph_s" in row:
            text += f"; by NCCL {us(row['nccl_graph_s']):.1f} us in a graph"
        lines.append(text)
    return lines


def _round(number: float) -> str:
    """Rounds an estimate to two digits."""
    return f"{float(f'{number:.2g}'):,.0f}" if number >= 1 else f"{number:.2g}"


def _list(members: list[int]) -> str:
    return ", ".join(map(str, members[:-1])) + f" and {members[-1]}"
