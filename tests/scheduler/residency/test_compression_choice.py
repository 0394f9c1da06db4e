"""The choice of what is kept compressed: only where it makes passes faster, never more than memory holds, and plain
what memory allows."""

from dataclasses import replace

import pytest
from penstock.engine.planning.device_profile import load_profile
from penstock.scheduler.cost.pass_work import StepWork
from penstock.scheduler.passes.pass_plan import GroupId
from penstock.scheduler.residency.compression_choice import (
    CompressionDoesNotPay,
    CompressionOffer,
    choose_compression,
    settle,
)
from penstock.scheduler.residency.decide import Residency, plan_residency
from penstock.scheduler.residency.demand import Demand
from penstock.scheduler.residency.family import Cost
from penstock.scheduler.residency.search import plan_fastest
from penstock.scheduler.units import GIB, MIB

ATTN, FFN, HEAD = 84 * MIB, 352 * MIB, 1050 * MIB
GROUPS = (*((GroupId(i, name), n) for i in range(32) for name, n in (("attn", ATTN), ("ffn", FFN))),)
GROUPS += ((GroupId(32, "head"), HEAD),)
SIZES = dict(GROUPS)
COMPRESSED = {group: nbytes * 7 // 10 for group, nbytes in GROUPS}
LARGEST = {"attn": ATTN, "ffn": FFN, "head": HEAD}
STEPS = ((StepWork("linear", weight_bytes=sum(SIZES.values()) // 64), 64),)


def demand(**changes) -> Demand:
    """A demand like that of Llama-3-8B in bf16, for a few sequences."""
    base = Demand(
        groups=GROUPS,
        embed_bytes=HEAD,
        page_bytes=2 * MIB,
        page_size=16,
        max_num_seqs=4,
        max_position=8192,
        compressed=COMPRESSED,
        buffer_bytes=lambda names: max(LARGEST[name] for name in names),
        memory_bytes=12 * GIB,
        fixed=(("activations", GIB),),
    )
    return replace(base, **changes)


def offer(choice: str, decompress_gb_s: float = 2000.0) -> CompressionOffer:
    return CompressionOffer(choice, Cost(STEPS, replace(load_profile("h200"), decompress_gb_s=decompress_gb_s)))


def chosen(choice: str, decompress_gb_s: float = 2000.0, **changes) -> Residency:
    return choose_compression(offer(choice, decompress_gb_s), demand(**changes))[1]


def pass_s(residency: Residency) -> float:
    """Predicted seconds of a pass of one row."""
    decompressed = len(residency.compressed), sum(dict(demand().groups)[group] for group in residency.compressed)
    return offer("auto").cost.pass_s(1, demand().kv_len, residency.streamed_bytes, *decompressed)


def test_none_and_nothing_to_compress_plan_plain():
    assert not chosen("none").compressed
    assert chosen("lossless", compressed={}) == chosen("auto", compressed={}) == chosen("none")


def test_auto_leaves_alone_what_does_not_stream():
    residency = chosen("auto", memory_bytes=40 * GIB)
    assert not residency.compressed and not residency.streamed and residency.embed_resident


def test_auto_compresses_what_streams_and_all_that_would_cost_more_plain():
    residency, plain = chosen("auto", memory_bytes=8 * GIB), chosen("none", memory_bytes=8 * GIB)
    assert residency.streamed and {group for group, _ in residency.streamed} <= residency.compressed
    assert residency.streamed_bytes < 0.7 * plain.streamed_bytes - 0.1 * GIB  # more stays as well
    assert pass_s(residency) < 0.7 * pass_s(plain)
    assert residency.claimed_bytes <= 8 * GIB


@pytest.mark.parametrize("gib", [6, 8, 10, 12, 13, 14])
def test_the_decompression_buffer_is_that_of_what_is_compressed(gib):
    residency = chosen("auto", memory_bytes=gib * GIB)
    largest = max((SIZES[group] for group in residency.compressed), default=0)
    assert dict(residency.claims).get("decompression buffer", 0) == largest


def test_auto_does_not_compress_where_decompressing_is_slow():
    assert not chosen("auto", decompress_gb_s=0.1, memory_bytes=8 * GIB).compressed
    assert chosen("lossless", decompress_gb_s=0.1, memory_bytes=8 * GIB).compressed


def test_a_model_that_fits_only_compressed_stays():
    asked = {"memory_bytes": 14 * GIB, "resident": "all"}
    with pytest.raises(ValueError, match="resident=all needs"):
        chosen("none", **asked)
    residency = chosen("auto", **asked)
    assert not residency.streamed and residency.compressed and residency.embed_resident
    assert residency.claimed_bytes <= 14 * GIB


@pytest.mark.parametrize("gib", [13, 14, 15])
def test_what_memory_is_left_keeps_groups_plain(gib):
    """Plans with ever more memory: fewer bytes are decompressed, and passes are faster."""
    few, many = (chosen("lossless", memory_bytes=n * GIB, max_num_seqs=1) for n in (gib, gib + 1))
    assert pass_s(many) < pass_s(few)
    assert sum(map(SIZES.get, many.compressed)) < sum(map(SIZES.get, few.compressed))
    assert few.num_pages >= demand().pages(8192) + 1 and few.claimed_bytes <= gib * GIB


def test_plain_groups_are_spread_over_depth():
    residency = chosen("auto", memory_bytes=15 * GIB, resident="all", max_num_seqs=1)
    compressed = sorted(group.layer_idx for group in residency.compressed if group.name == "ffn")
    assert 4 < len(compressed) < 32
    assert (
        max(b - a for a, b in zip(compressed, compressed[1:])) - min(b - a for a, b in zip(compressed, compressed[1:]))
        <= 1
    )


@pytest.mark.parametrize("choice", ["auto", "lossless"])
@pytest.mark.parametrize("gib, pays", [(32, True), (64, True), (100, False), (140, False)])
def test_what_stays_is_compressed_only_where_that_gains_its_share(choice, gib, pays):
    """Plans three quarters of the layers to stay beside a KV cache that takes more sequences the less they take."""
    asked = demand(memory_bytes=gib * GIB, resident=0.75, max_num_seqs=512)
    cost = offer(choice).cost
    kept, fastest = plan_fastest(asked, cost, compressed=True)
    plain = plan_residency(kept, replace(fastest.split, compressed=fastest.compressed - fastest.resident))
    gain = cost.tokens_s(kept, fastest) / cost.tokens_s(kept, plain) - 1
    assert fastest.compressed & fastest.resident and (gain >= 0.05) == pays
    assert choose_compression(offer(choice), asked) == (kept, fastest if pays else plain)


def test_what_stays_is_compressed_where_sequences_would_be_shorter_otherwise():
    asked = {"memory_bytes": 14 * GIB, "resident": 0.75, "max_num_seqs": 1, "max_position": 32768}
    made = chosen("lossless", **asked)
    plain = plan_residency(demand(**asked), replace(made.split, compressed=made.compressed - made.resident))
    assert made.compressed > made.resident and plain.max_model_len < made.max_model_len
    assert pass_s(plain) == pass_s(made)


def test_what_stays_is_compressed_where_the_ring_would_be_cut_otherwise():
    """Plans memory that is a quarter of a GiB less than plain groups take beside ring and KV cache."""
    asked = {"memory_bytes": 27 * GIB // 2, "resident": 0.75, "max_num_seqs": 1, "max_model_len": 2048}
    made = chosen("lossless", **asked)
    plain = plan_residency(demand(**asked), replace(made.split, compressed=made.compressed - made.resident))
    assert made.compressed & made.resident and any("ring cut" in note for note in plain.notes)


def test_nothing_that_stays_is_compressed_in_memory_without_limit():
    assert not chosen("lossless", memory_bytes=None, resident="all").compressed
    assert chosen("lossless", memory_bytes=None, resident="none").compressed == set(SIZES)


def test_compression_must_gain_more_than_its_loading_takes():
    """Finds the rate of decompression at which both are as fast: there auto leaves weights plain."""
    asked, low, high = {"memory_bytes": 8 * GIB, "max_num_seqs": 1}, 20.0, 200.0
    while high - low > 0.05:
        middle = (low + high) / 2
        low, high = (low, middle) if chosen("auto", middle, **asked).compressed else (middle, high)
    plain = offer("none").cost.tokens_s(demand(**asked), chosen("none", **asked))
    for rate in (low, high):
        compressed = offer("auto", rate).cost.tokens_s(demand(**asked), chosen("lossless", rate, **asked))
        assert compressed / plain == pytest.approx(1.005, abs=0.002)


def test_settling_keeps_the_choice_and_takes_the_bytes():
    planned = choose_compression(offer("auto"), demand(memory_bytes=12 * GIB))
    sizes = {group: COMPRESSED[group] * 98 // 100 // 256 * 256 for group in planned[1].compressed}
    _, settled = settle(offer("auto"), planned, sizes)
    assert settled.split == planned[1].split
    assert settled.streamed_bytes == sum(sizes[group] for group, _ in planned[1].streamed)
    assert settled.ring.ring_bytes < planned[1].ring.ring_bytes and settled.num_pages >= planned[1].num_pages
    assert settled.claimed_bytes <= 12 * GIB


@pytest.mark.parametrize(("choice", "kind"), [("auto", CompressionDoesNotPay), ("lossless", ValueError)])
def test_weights_that_shrink_less_than_planned_are_refused_where_they_do_not_fit(choice, kind):
    planned = choose_compression(offer(choice), demand(memory_bytes=14 * GIB, resident="all"))
    with pytest.raises(ValueError, match="weights_compression.*planned.*none") as raised:
        settle(offer(choice), planned, {group: SIZES[group] * 9 // 10 for group in planned[1].compressed})
    assert raised.type is kind


def test_weights_that_do_not_shrink_stay_plain_unless_compression_is_asked_for():
    asked = demand(memory_bytes=40 * GIB, resident="none")
    planned = choose_compression(offer("auto"), asked)
    with pytest.raises(CompressionDoesNotPay, match="plain ones"):
        settle(offer("auto"), planned, SIZES)
    assert settle(offer("lossless"), planned, SIZES)[1].streamed_bytes == sum(SIZES.values())


def test_what_is_quantised_need_not_shrink():
    """Settles groups of which a tenth is floats: a third of these is saved, and a thirtieth of all."""
    floats = {group: nbytes // 10 for group, nbytes in GROUPS}
    compressed = {group: nbytes - floats[group] // 3 for group, nbytes in GROUPS}
    asked = demand(memory_bytes=40 * GIB, resident="none", compressed=compressed, decompressed=floats)
    planned = choose_compression(offer("auto"), asked)
    for share, pays in ((0.021, True), (0.019, False)):
        sizes = {group: nbytes - int(floats[group] * share) for group, nbytes in GROUPS}
        if pays:
            assert settle(offer("auto"), planned, sizes)[1].streamed_bytes == sum(sizes.values())
            continue
        with pytest.raises(CompressionDoesNotPay):
            settle(offer("auto"), planned, sizes)


def test_a_kind_may_have_groups_that_are_not_compressed():
    """Plans layers of which every other one may be compressed, as where a file quantised the others."""
    some = {group: nbytes for group, nbytes in COMPRESSED.items() if group.layer_idx % 2}
    residency = chosen("lossless", memory_bytes=8 * GIB, compressed=some)
    assert residency.streamed and residency.compressed and residency.compressed <= some.keys()
    assert {group for group, _ in residency.streamed} & some.keys() <= residency.compressed
    assert (
        dict(residency.streamed) == {group: some.get(group, SIZES[group]) for group, _ in residency.streamed}
        and residency.claimed_bytes <= 8 * GIB
    )


def test_nothing_is_claimed_for_decompressing_where_all_stays_plain():
    residency = chosen("lossless", memory_bytes=40 * GIB)
    assert not residency.compressed and residency == chosen("none", memory_bytes=40 * GIB)
