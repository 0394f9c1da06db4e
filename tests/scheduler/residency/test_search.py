"""The search against brute force, which lays out and tries each number of groups that stay and of those that are
compressed."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from penstock.engine.planning.device_profile import load_profile
from penstock.scheduler.cost.pass_work import PassShape, PassWork, StepWork
from penstock.scheduler.cost.time_model import predict_pass
from penstock.scheduler.passes.build import default_ring_bytes
from penstock.scheduler.passes.pass_plan import GroupId
from penstock.scheduler.residency import search
from penstock.scheduler.residency.compression_choice import CompressionOffer, choose_compression
from penstock.scheduler.residency.decide import Residency
from penstock.scheduler.residency.demand import Demand, Split
from penstock.scheduler.residency.family import Cost, Family
from penstock.scheduler.residency.search import most_per_second, plan_fastest
from penstock.scheduler.residency.spread import by_name, every

from tests.support.plan_worth import most_instead, worth

H200 = load_profile("h200")


def layers(num_layers: int, sizes: dict[str, int], codable: str, share: float, floats: float, **others) -> Demand:
    """Layers and a head of these bytes by name. Groups of the names in `codable` may be compressed, to `share` of their
    bytes; to decompress one writes `floats` of them."""
    groups = [(GroupId(i, name), sizes[name]) for i in range(num_layers) for name in ("attn", "ffn")]
    groups.append((GroupId(num_layers, "head"), sizes["head"]))
    may_be = [(group, nbytes) for group, nbytes in groups if group.name in codable.split()]
    asked = Demand(
        groups=tuple(groups),
        page_size=16,
        compressed={group: int(nbytes * share) + 1 for group, nbytes in may_be},
        decompressed={group: int(nbytes * floats) for group, nbytes in may_be},
        buffer_bytes=lambda names: max(sizes[name] for name in names),
        fixed_of=lambda n: (("workspace", 1000 * n),),
        **others,
    )
    return replace(asked, fixed=asked.fixed_of(asked.max_num_seqs))


@st.composite
def demands(draw) -> tuple[Demand, Cost]:
    """Models of 2 to 8 layers of odd sizes, in memory between what their ring and what all of them takes."""
    num_layers = draw(st.integers(2, 8))
    attn, ffn, head = (draw(st.integers(1, most)) * 10007 for most in (40, 160, 400))
    codable = "attn ffn head" if draw(st.booleans()) else "attn ffn"
    share, floats = draw(st.floats(0.5, 0.9)), draw(st.sampled_from((1.0, 0.9, 0.3)))
    total = num_layers * (attn + ffn) + head
    asked = layers(
        num_layers,
        {"attn": attn, "ffn": ffn, "head": head},
        codable,
        share,
        floats,
        embed_bytes=draw(st.sampled_from((0, head))),
        page_bytes=draw(st.integers(1, 10**5)),
        gathered_page_bytes=draw(st.integers(0, 10**5)),
        max_num_seqs=draw(st.integers(1, 6)),
        max_position=draw(st.integers(1, 100)),
        memory_bytes=int(total * draw(st.floats(0.2, 1.3))) + 1000,
        plans_num_seqs=draw(st.booleans()),
    )
    rates = replace(
        H200,
        link_gb_s=10 ** draw(st.floats(-2, 3)),
        decompress_gb_s=10 ** draw(st.floats(-1, 3)),
        pass_latency_s=draw(st.sampled_from((0.0, 1e-4))),
    )
    steps = ((StepWork("linear", weight_bytes=total // 8, token_flops=total * draw(st.integers(0, 3000))), 8),)
    return asked, Cost(steps, rates)


@st.composite
def demands_that_just_fit(draw) -> tuple[Demand, Cost]:
    """Memory in which all groups just stay beside some sequences, and compute that takes long: streaming makes room for
    more sequences, which gain little or much."""
    asked, cost = draw(demands())
    asked = replace(asked, max_num_seqs=12, page_bytes=draw(st.integers(10**3, 10**5)), gathered_page_bytes=0)
    fitting = asked.asked_for(draw(st.integers(1, 11)))
    everything = Split(frozenset(group for group, _ in asked.groups), frozenset(), False)
    held = needed_bytes(fitting, everything) + fitting.kv_bytes(fitting.wanted_pages(fitting.max_num_seqs))
    total, share = sum(nbytes for _, nbytes in asked.groups), 10 ** draw(st.floats(-2, 1))
    slow = StepWork("linear", weight_bytes=total, token_flops=int(share * total * H200.gemm_tflops * 1e12 / 4.25e12))
    rates = replace(cost.rates, link_gb_s=1000.0, pass_latency_s=0.0)
    return replace(asked, memory_bytes=held + draw(st.integers(0, 10**5))), Cost(((slow, 1),), rates)


def plain_beside_two() -> tuple[Demand, Cost]:
    """All weights stay, as they are stored beside two sequences, or some of them compressed beside three, which give
    3.8 % more tokens/s."""
    sizes = {"attn": 120_000, "ffn": 1_150_000, "head": 10_000}
    asked = layers(
        5,
        sizes,
        codable="attn ffn",
        share=0.75,
        floats=1.0,
        embed_bytes=0,
        page_bytes=1,
        gathered_page_bytes=70_000,
        max_num_seqs=3,
        max_position=81,
        memory_bytes=7_350_000,
    )
    rates = replace(H200, link_gb_s=1.0, decompress_gb_s=316.0, pass_latency_s=1e-4)
    return asked, Cost(((StepWork("linear", weight_bytes=800_000), 8),), rates)


def splits(asked: Demand, compressed: bool):
    """All splits of the family."""
    kinds = by_name([group for group, _ in asked.groups])
    for counts in itertools.product(*(range(len(members) + 1) for members in kinds.values())):
        staying = [every(members, count) for members, count in zip(kinds.values(), counts)]
        resident = frozenset(itertools.chain(*staying))
        if not compressed:
            yield Split(resident, frozenset(), False)
            continue
        for plain in itertools.product(*(range(len(members) + 1) for members in staying)):
            kept_plain = itertools.chain(*(every(members, count) for members, count in zip(staying, plain)))
            yield Split(resident, frozenset(asked.compressed) - frozenset(kept_plain), False)


def seconds_of(asked: Demand, cost: Cost, split: Split, num_seqs: int) -> float:
    decompressed = sum(asked.decompressed[group] for group in split.compressed)
    streamed = sum(nbytes for _, nbytes in asked.streamed(split))
    work = PassWork(streamed, 0, cost.steps, len(split.compressed), decompressed)
    shape = PassShape(num_seqs, num_seqs, num_seqs * asked.kv_len)
    return predict_pass(work, shape, cost.rates).total_s


def needed_bytes(asked: Demand, split: Split) -> int:
    claims = sum(nbytes for _, nbytes in asked.claims(split))
    return asked.weights_bytes(split) + default_ring_bytes(asked.streamed(split)) + claims


def brute_force(asked: Demand, cost: Cost, compressed: bool, resident: frozenset[GroupId] | None = None) -> float:
    """The most that any split, or any with these groups that stay, and number of sequences is worth; 0 where nothing
    fits."""
    best = 0.0
    tried = [split for split in splits(asked, compressed) if resident is None or split.resident == resident]
    for num_seqs in range(1, asked.max_num_seqs + 1):
        settled = asked.planned_for(num_seqs)
        left = settled.memory_bytes - settled.kv_bytes(settled.wanted_pages(num_seqs))
        fitting = (split for split in tried if needed_bytes(settled, split) <= left)
        best = max(best, *(worth(num_seqs / seconds_of(asked, cost, s, num_seqs), stays(asked, s)) for s in fitting), 0)
    return best


def stays(asked: Demand, kept: Split | Residency) -> bool:
    """Tells whether all groups stay as they are stored."""
    return len(kept.resident) == len(asked.groups) and not kept.compressed


@settings(max_examples=40)
@given(demands())
def test_plain_splits_are_the_best_there_are(case):
    check(*case, compressed=False)


@settings(max_examples=40)
@given(demands_that_just_fit())
def test_all_that_fits_stays_unless_streaming_gains_its_share(case):
    check(*case, compressed=False)


@settings(max_examples=20)
@given(demands())
@example(plain_beside_two())
def test_compressed_splits_are_the_best_there_are(case):
    check(*case, compressed=True)


def check(asked: Demand, cost: Cost, compressed: bool) -> None:
    best = brute_force(asked, cost, compressed)
    assume(best)
    settled, residency = plan_fastest(asked, cost, compressed)
    num_seqs = settled.seqs_in(residency.num_pages)
    assert residency.claimed_bytes <= asked.memory_bytes
    tokens_s = num_seqs / seconds_of(asked, cost, residency.split, num_seqs)
    assert worth(tokens_s, stays(asked, residency)) >= 0.99 * best
    assert settled.max_num_seqs == (num_seqs if asked.plans_num_seqs else asked.max_num_seqs)


@settings(max_examples=60)
@given(demands(), st.sampled_from(("auto", 0.25, 0.5, 0.75)), st.floats(1.0, 4.0))
def test_what_stays_is_compressed_only_where_it_has_no_room_or_gains_its_share(case, resident, more):
    """Compares with all splits, or those of the groups that were to stay; and where some that stay are compressed, with
    the same groups plain and as many sequences as then fit."""
    asked, cost = case
    asked = replace(asked, resident=resident, memory_bytes=int(asked.memory_bytes * more))
    try:
        settled, residency = choose_compression(CompressionOffer("lossless", cost), asked)
    except ValueError:
        assume(False)
    best = brute_force(asked, cost, True, None if resident == "auto" else residency.resident)
    assume(best)
    tokens_s = cost.tokens_s(settled, residency)
    assert most_instead(tokens_s, residency) >= 0.99 * best
    if residency.compressed & residency.resident:
        assert tokens_s > 1.0499 * plain_tokens_s(settled, cost, residency)


def plain_tokens_s(settled: Demand, cost: Cost, residency: Residency) -> float:
    """Tokens/s with the same groups, those that stay plain; 0 where not one sequence fits."""
    split = replace(residency.split, compressed=residency.compressed - residency.resident)
    ring_bytes = min(residency.ring.ring_bytes, default_ring_bytes(settled.streamed(split)))
    left = settled.memory_bytes - ring_bytes - settled.weights_bytes(split) - settled.claims_bytes(split)
    fitting = [n for n in range(1, settled.max_num_seqs + 1) if settled.kv_bytes(settled.wanted_pages(n)) <= left]
    return max((n / seconds_of(settled, cost, split, n) for n in fitting), default=0.0)


@settings(max_examples=40)
@given(demands(), st.booleans())
def test_no_ring_is_smaller_than_the_bound_by_which_splits_are_dismissed(case, compressed):
    """Nor does the bound leave more room where more groups of the largest kind stay, so that one search finds where it
    ends."""
    family = Family(*case, compressed)
    kind = family.kinds[-1]
    for others in family._others:
        left = [family._room_beside_ring(others, count, 0) for count in kind.stay]
        assert all(more <= fewer + 1e-6 for fewer, more in itertools.pairwise(left))
        for count, room in zip(kind.stay, left):
            assert -room <= count * kind.kept_bytes + family._ring((*others.stay, count))


@settings(max_examples=60)
@given(demands(), st.sampled_from(("auto", "none")), st.floats(1.0, 3.0), st.sampled_from(("link", "memory")))
def test_more_memory_or_a_faster_link_is_never_worse(case, choice, factor, what):
    asked, cost = case
    if what == "memory":
        more, faster = replace(asked, memory_bytes=int(asked.memory_bytes * factor)), cost
    else:
        more, faster = asked, Cost(cost.steps, replace(cost.rates, link_gb_s=cost.rates.link_gb_s * factor))
    try:
        before = choose_compression(CompressionOffer(choice, cost), asked)
    except ValueError:
        assume(False)
    after = choose_compression(CompressionOffer(choice, faster), more)
    least = worth(cost.tokens_s(*before), stays(asked, before[1]))
    assert most_instead(faster.tokens_s(*after), after[1]) >= 0.99 * least


@given(st.lists(st.floats(0, 3), min_size=1, max_size=60), st.integers(0, 60))
@example([0.99, 0, 0.51], 3)  # 1, 2 and 1.987 a second: what lies between the ends is the best by 0.7 %
def test_the_best_number_is_found_in_few_steps(steps, fitting):
    """Tries times of all kinds that never fall."""
    times = [t + 0.01 for t in itertools.accumulate(steps)]
    times = [t if n < fitting else math.inf for n, t in enumerate(times)]
    found = most_per_second(len(times), lambda n: times[n - 1])
    best = max(n / t for n, t in enumerate(times, 1))
    assert (found is None and best == 0) or found / times[found - 1] > best * 0.996


def test_a_large_number_is_not_counted_to():
    asked = []

    def seconds(n: int) -> float:
        asked.append(n)
        return 1 + n / 1000 if n <= 70_000 else math.inf

    assert most_per_second(10**9, seconds) == pytest.approx(70_000, rel=0.003)
    assert len(set(asked)) < 800


def plan(gib: float, cost: Cost, groups, **changes):
    asked = Demand(
        groups=groups,
        embed_bytes=2**30,
        page_bytes=2**21,
        page_size=16,
        max_num_seqs=1,
        max_position=2048,
        memory_bytes=int(gib * 2**30),
    )
    return plan_fastest(replace(asked, **changes), cost, compressed=False)[1]


def test_the_embedding_is_the_first_that_goes_and_costs_nothing():
    """Plans memory in which all but the embedding fits: all but the embedding stays, and no ring is claimed."""
    groups = tuple((GroupId(i, name), n << 20) for i in range(4) for name, n in (("attn", 84), ("ffn", 352)))
    groups += ((GroupId(4, "head"), 1 << 30),)
    cost = Cost((), H200)
    held = (sum(nbytes for _, nbytes in groups) + 129 * 2**21) / 2**30
    tight, roomy = plan(held, cost, groups), plan(held + 1, cost, groups)
    assert not tight.streamed and not tight.embed_resident and tight.host_bytes == 2**30
    assert tight.ring.ring_bytes == 0 and roomy.embed_resident and roomy.host_bytes == 0
    assert plan(held - 0.01, cost, groups).streamed


def uneven_groups() -> tuple[tuple[GroupId, int], ...]:
    """Layers of which every fourth is twice as large."""
    sizes = (("attn", 84), ("ffn", 352))
    groups = tuple((GroupId(i, name), n * (1 if i % 4 else 2) << 20) for i in range(16) for name, n in sizes)
    return (*groups, (GroupId(16, "head"), 1 << 30))


def test_groups_of_different_sizes_stay_where_all_of_them_fit():
    groups, cost = uneven_groups(), Cost((), H200)
    total = sum(nbytes for _, nbytes in groups)
    held = (total + 129 * 2**21) / 2**30
    assert not plan(held, cost, groups).streamed and plan(held - 0.01, cost, groups).streamed


@pytest.mark.parametrize("left", [0.2, 0.4, 0.6, 0.8])
@pytest.mark.parametrize("changes", [{}, {"max_num_seqs": 9, "plans_num_seqs": True}, {"memory_bytes": None}])
def test_groups_of_different_sizes_are_no_slower_and_no_shorter_than_if_all_were_the_largest(
    monkeypatch, left, changes
):
    """As much more stays as the mean is smaller than the largest, but for a few groups."""
    groups, cost = uneven_groups(), Cost((), H200)
    total = sum(nbytes for _, nbytes in groups)
    gib = (left * total + 257 * 2**21) / 2**30
    found = plan(gib, cost, groups, **changes)
    monkeypatch.setattr(search, "are_alike", lambda demand: True)
    largest = plan(gib, cost, groups, **changes)
    assert found.max_model_len >= largest.max_model_len
    assert found.streamed_bytes <= largest.streamed_bytes
    if "memory_bytes" not in changes:
        assert found.claimed_bytes <= found.memory_bytes
    if not changes:
        assert found.streamed_bytes < largest.streamed_bytes - 0.05 * total


@pytest.mark.parametrize("attn_share, ffn_share", [(0.5, 0.9), (0.9, 0.5), (0.7, 0.7)])
def test_of_many_layers_those_are_plain_that_save_most(attn_share, ffn_share):
    """Plans memory in which all groups stay and some of them are plain: it is as good as the best of all numbers."""
    groups = tuple((GroupId(i, name), n << 20) for i in range(60) for name, n in (("attn", 84), ("ffn", 352)))
    groups += ((GroupId(60, "head"), 1 << 30),)
    shares = {"attn": attn_share, "ffn": ffn_share, "head": 0.7}
    compressed = {group: int(nbytes * shares[group.name]) for group, nbytes in groups}
    extra = {group.name: nbytes - compressed[group] for group, nbytes in groups}
    saved = {group.name: nbytes for group, nbytes in groups}
    room = int(0.4 * sum(nbytes - compressed[group] for group, nbytes in groups))
    asked = Demand(groups, 0, 1, 16, 1, 16, "all", compressed, memory_bytes=sum(compressed.values()) + room + 2)
    _, residency = plan_fastest(asked, Cost((), H200), compressed=True)
    plain_bytes = sum(nbytes for group, nbytes in groups if group not in residency.compressed)
    best = max(
        attn * saved["attn"] + min(60, left // extra["ffn"]) * saved["ffn"] + head * saved["head"]
        for attn, head in itertools.product(range(61), range(2))
        if (left := room - attn * extra["attn"] - head * extra["head"]) >= 0
    )
    assert plain_bytes >= 0.99 * best


def long_demand(gib: float, **changes) -> Demand:
    """A demand whose longest sequence has 64 times the 64 MiB that its sequences are taken to have, and no weights that
    could stay beside one. A sequence costs 16 MiB more."""
    asked = Demand(
        groups=tuple((GroupId(i, name), 1 << 30) for i in range(8) for name in ("attn", "ffn")),
        embed_bytes=0,
        page_bytes=2**19,
        page_size=16,
        max_num_seqs=256,
        max_position=2**17,
        memory_bytes=int(gib * 2**30),
        fixed_of=lambda n: (("workspace", n << 24),),
        plans_num_seqs=True,
    )
    return replace(asked, fixed=asked.fixed_of(256), **changes)


@pytest.mark.parametrize(
    "gib, full", [(5.0, False), (7.9, False), (7.90625, False), (8.2, False), (8.9, False), (9.1, True)]
)
def test_as_many_sequences_as_fit_come_before_the_longest_one(gib, full):
    """Figures by hand: a ring of 4 GiB, a page, and 80 MiB for each sequence; the longest one alone takes 4 GiB and
    16 MiB."""
    settled, residency = plan_fastest(long_demand(gib), Cost((), H200), compressed=False)
    held = int((gib * 1024 - 4 * 1024 - 0.5) // 80)
    assert settled.max_num_seqs == settled.seqs_in(residency.num_pages) == held
    assert (residency.max_model_len == 2**17) == full
    (asked, _) = plan_fastest(long_demand(8.2, max_model_len=2**17), Cost((), H200), compressed=False)
    assert asked.max_num_seqs == 12  # beside the longest, which was asked for


def test_a_cpu_plans_as_many_sequences_as_its_cache_holds():
    """Figures by hand: a GiB of cache where its size is not given, and 64 MiB for each sequence."""
    asked = long_demand(0, memory_bytes=None, max_model_len=2048)
    settled, residency = plan_fastest(asked, Cost((), H200), compressed=False)
    assert settled.max_num_seqs == settled.seqs_in(residency.num_pages) == 16


def test_the_ring_that_was_asked_for_is_kept_to():
    groups = tuple((GroupId(i, name), n << 20) for i in range(4) for name, n in (("attn", 84), ("ffn", 352)))
    groups += ((GroupId(4, "head"), 1 << 30),)
    small = plan(2.0, Cost((), H200), groups, ring_bytes=400 * 2**20)
    assert small.ring.ring_bytes <= 400 * 2**20 and GroupId(4, "head") in small.resident
    with pytest.raises(ValueError, match="ring=.*the largest streamed group has"):
        plan(1.0, Cost((), H200), groups, ring_bytes=2**20)
