"""Residency: what stays is what was asked for, spread evenly; memory is never exceeded; what cannot be is refused."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from penstock.engine.planning.device_profile import load_profile
from penstock.scheduler.cost.pass_work import GATHERED_TOKENS, StepWork
from penstock.scheduler.cost.time_model import PassTime
from penstock.scheduler.passes.build import default_ring_bytes, minimum_ring_bytes
from penstock.scheduler.passes.pass_plan import GroupId
from penstock.scheduler.residency.decide import Residency
from penstock.scheduler.residency.demand import CPU_KV_BYTES, Demand
from penstock.scheduler.residency.family import Cost
from penstock.scheduler.residency.residency_table import Prediction, Variant, gives_up, table
from penstock.scheduler.residency.search import plan_fastest
from penstock.scheduler.residency.spread import counts_within, spread
from penstock.scheduler.units import GIB, MIB, show_bytes

ATTN, FFN, HEAD = 84 * MIB, 352 * MIB, 1050 * MIB


def layers(num_layers=32, attn=ATTN, ffn=FFN):
    return tuple((GroupId(i, name), n) for i in range(num_layers) for name, n in (("attn", attn), ("ffn", ffn)))


def demand(num_layers=32, **changes) -> Demand:
    """A demand like that of Llama-3-8B in bf16: 15 GiB of weights, 2 MiB a page of 16 tokens."""
    base = Demand(
        groups=(*layers(num_layers), (GroupId(num_layers, "head"), HEAD)),
        embed_bytes=HEAD,
        page_bytes=2 * MIB,
        page_size=16,
        max_num_seqs=256,
        max_position=8192,
        memory_bytes=24 * GIB,
        fixed=(("activations", GIB // 2), ("context", GIB)),
    )
    return replace(base, **changes)


def plan_residency(asked: Demand) -> Residency:
    """The residency of plain weights on an H200."""
    steps = ((StepWork("linear", weight_bytes=(ATTN + FFN) // 2), 64),)
    return plan_fastest(asked, Cost(steps, load_profile("h200")), compressed=False)[1]


def resident_layer_bytes(planned, asked):
    return sum(n for g, n in asked.groups[:-1] if g in planned.resident)


@given(st.integers(1, 1000), st.integers(0, 1000), st.integers(1, 300), st.integers(0, 10**5))
def test_as_many_pages_as_fit_beside_a_copy_of_the_longest_sequence(page_bytes, gathered, longest, nbytes):
    asked = demand(page_bytes=page_bytes, gathered_page_bytes=gathered, max_position=longest)
    num_pages, copied = asked.pages_in(nbytes), GATHERED_TOKENS // 16  # longer than any of these
    assert asked.kv_bytes(num_pages) <= nbytes < asked.kv_bytes(num_pages + 1)
    assert asked.kv_bytes(num_pages) == num_pages * page_bytes + min(num_pages, copied) * gathered


def test_a_copy_of_the_longest_sequence_is_claimed():
    plain, copying = (plan_residency(demand(gathered_page_bytes=nbytes)) for nbytes in (0, MIB))
    assert dict(copying.claims)["gathered context"] == 8192 // 16 * MIB and "gathered context" not in dict(plain.claims)
    assert copying.claimed_bytes <= 24 * GIB


def test_everything_stays_where_it_fits():
    planned = plan_residency(demand(max_num_seqs=8))
    assert planned.streamed == () and planned.embed_resident and planned.host_bytes == 0
    assert planned.ring.ring_bytes == 0 and planned.max_model_len == 8192
    assert planned.claims[0] == ("resident weights", planned.resident_bytes)


def test_kv_comes_before_residency_where_not_all_fits():
    few, many = (plan_residency(demand(memory_bytes=12 * GIB, max_num_seqs=n)) for n in (1, 256))
    assert few.streamed_bytes < many.streamed_bytes and few.num_pages < many.num_pages
    assert few.num_pages >= 8192 // 16 + 1  # one full sequence at least
    assert any("max_num_seqs=256" in note for note in many.notes)
    assert [name for name, _ in few.claims] == ["ring", "activations", "context", "KV cache", "resident weights"]


@pytest.mark.parametrize("choice", ["none", 0.0])
def test_none_streams_layers_and_head(choice):
    asked = demand(resident=choice)
    planned = plan_residency(asked)
    assert planned.streamed == asked.groups and not planned.resident and not planned.embed_resident
    assert planned.ring.ring_bytes == default_ring_bytes(list(asked.groups))
    assert planned.host_bytes == sum(n for _, n in asked.groups) + asked.embed_bytes


def test_a_tied_head_and_embedding_share_their_bytes():
    streamed = plan_residency(demand(embed_bytes=0, resident="none"))
    assert streamed.host_bytes == streamed.streamed_bytes and not streamed.embed_resident
    assert plan_residency(demand(embed_bytes=0, resident="all")).embed_resident


def test_half_is_every_second_layer():
    asked = demand(resident=0.5)
    planned = plan_residency(asked)
    assert resident_layer_bytes(planned, asked) * 2 == sum(n for _, n in asked.groups[:-1])
    assert planned.resident == {g for g, _ in asked.groups[:-1] if g.layer_idx % 2}
    assert planned.streamed[-1][0].name == "head"


def test_one_is_all():
    assert plan_residency(demand(resident=1.0)) == plan_residency(demand(resident="all"))


@settings(max_examples=100)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.floats(0, 1))
def test_a_fraction_is_the_most_whole_groups_not_above_it_spread_evenly(num_layers, attn, ffn, fraction):
    groups = layers(num_layers, attn, ffn)
    most = int(fraction * num_layers * (attn + ffn))
    chosen = spread([group for group, _ in groups], counts_within(groups, most))
    counts = {name: sum(g.name == name for g in chosen) for name in ("attn", "ffn")}
    possible = [a * attn + f * ffn for a in range(num_layers + 1) for f in range(num_layers + 1)]
    assert counts["attn"] * attn + counts["ffn"] * ffn == max(n for n in possible if n <= most)
    for name, count in counts.items():
        for depth in range(num_layers + 1):  # of the first layers, their share stays, to less than one group
            before = sum(g.name == name and g.layer_idx < depth for g in chosen)
            assert abs(before - depth * count / num_layers) < 1


@settings(max_examples=150)
@given(
    st.integers(1, 10),
    st.integers(1, 60 * MIB),
    st.sampled_from(["auto", "all", "none", 0.25, 0.6]),
    st.integers(1, 64),
    st.one_of(st.none(), st.integers(1, 4096)),
)
def test_memory_is_never_exceeded(num_layers, memory_bytes, resident, max_num_seqs, max_model_len):
    asked = Demand(
        groups=(*layers(num_layers, 256 * 300, 256 * 1200), (GroupId(num_layers, "head"), 256 * 4000)),
        embed_bytes=256 * 4000,
        page_bytes=4096,
        page_size=16,
        max_num_seqs=max_num_seqs,
        max_position=4096,
        resident=resident,
        memory_bytes=memory_bytes,
        fixed=(("activations", 2**20),),
        max_model_len=max_model_len,
    )
    try:
        planned = plan_residency(asked)
    except ValueError as error:
        assert "What would fit" in str(error)
        return
    assert planned.claimed_bytes <= memory_bytes
    assert planned.max_model_len <= (planned.num_pages - 1) * 16
    assert planned.max_model_len == max_model_len or max_model_len is None
    assert planned.ring.ring_bytes >= minimum_ring_bytes(list(planned.streamed))
    everything = sum(n for _, n in asked.groups) + asked.embed_bytes
    assert planned.resident_bytes + planned.host_bytes == everything
    assert planned.resident.isdisjoint(g for g, _ in planned.streamed)


def test_what_a_refusal_says_would_fit_does():
    asked = demand(memory_bytes=3 * GIB, fixed=(("activations", GIB // 2),))
    planned = plan_residency(asked)
    tight = replace(asked, memory_bytes=GIB)
    with pytest.raises(ValueError, match="resident=auto needs .* and there are 1.00 GiB") as error:
        plan_residency(tight)
    need = asked.fixed_bytes + minimum_ring_bytes(list(asked.groups)) + (2048 // 16 + 1) * asked.page_bytes
    assert show_bytes(need) in str(error.value)
    assert plan_residency(replace(asked, memory_bytes=need)).max_model_len == 2048
    assert planned.num_pages > 2048 // 16


def test_all_that_does_not_fit_names_auto():
    with pytest.raises(ValueError, match="resident=all needs .*resident=auto"):
        plan_residency(demand(memory_bytes=12 * GIB, resident="all"))


def test_a_long_max_model_len_is_refused_with_the_length_that_fits():
    long = demand(memory_bytes=4 * GIB, max_position=2**17, max_model_len=2**17)
    with pytest.raises(ValueError, match=r"max_model_len up to (\d+)") as error:
        plan_residency(long)
    length = int(str(error.value).split("max_model_len up to ")[1].split(",")[0])
    assert plan_residency(replace(long, max_model_len=length)).max_model_len == length
    with pytest.raises(ValueError):
        plan_residency(replace(long, max_model_len=length + 16))


def test_an_unset_max_model_len_shrinks_and_says_so():
    planned = plan_residency(demand(memory_bytes=5 * GIB, max_position=2**17))
    assert 2048 <= planned.max_model_len < 2**17
    assert any("max_model_len shrunk" in note for note in planned.notes)


def test_the_ring_is_cut_before_a_demand_is_refused():
    asked = demand(memory_bytes=3 * GIB, max_model_len=2048)
    planned = plan_residency(asked)
    assert any("ring cut" in note for note in planned.notes)
    assert planned.ring.ring_bytes < default_ring_bytes(list(planned.streamed))


def test_a_ring_as_asked():
    assert plan_residency(demand(resident="none", ring_bytes=3 * GIB)).ring.ring_bytes == 3 * GIB
    with pytest.raises(ValueError, match="ring=1048576 bytes"):
        plan_residency(demand(resident="none", ring_bytes=2**20))
    small = demand(num_layers=1, resident="none", ring_bytes=3 * GIB)
    planned = plan_residency(small)
    assert planned.ring.ring_bytes == planned.streamed_bytes and any("ring cut" in n for n in planned.notes)


def test_pages_as_asked():
    planned = plan_residency(demand(num_pages=65))
    assert planned.num_pages == 65 and planned.max_model_len == 64 * 16
    with pytest.raises(ValueError, match="max_model_len=4096 is asked"):
        plan_residency(demand(num_pages=65, max_model_len=4096))
    with pytest.raises(ValueError, match="page 0 is reserved"):
        plan_residency(demand(num_pages=1))


def test_longer_than_trained_is_refused():
    with pytest.raises(ValueError, match="trained for 8192"):
        plan_residency(demand(max_model_len=8193))


def test_a_cpu_has_no_limit_but_bounds_its_kv():
    assert plan_residency(demand(memory_bytes=None)).streamed == ()
    planned = plan_residency(demand(memory_bytes=None, resident="none"))
    assert planned.ring.ring_bytes > 0 and len(planned.streamed) == 65
    assert planned.num_pages * 2 * MIB <= CPU_KV_BYTES + 2 * MIB


def test_auto_keeps_the_head_where_its_part_of_the_ring_costs_as_much():
    planned = plan_residency(demand(memory_bytes=12 * GIB))
    assert GroupId(32, "head") in planned.resident


def variant(label: str, num_seqs: int, pass_s: float, max_model_len: int = 8192) -> Variant:
    """A variant whose passes all take `pass_s`."""
    time = PassTime(pass_s, 0.004, 0.001, 0.002, 0.0, 0.0, pass_s, "link")
    return Variant(label, 0, max_model_len, Prediction("batch 1", 1, time), Prediction("best", num_seqs, time))


def test_the_table_has_every_claim_with_its_unit():
    planned = plan_residency(demand(memory_bytes=12 * GIB))
    more = variant("more", 32, 0.25, max_model_len=4096)
    predictions = [more.one, more.best]
    rates = replace(load_profile("h200"), gemm_tflops=0.205583)
    text = table(planned, 16, "32 as asked", rates, predictions, [(more, "a leg")], 9000)
    for name, nbytes in planned.claims:
        assert name in text and show_bytes(nbytes) in text
    assert "link (250.00 ms)" in text and "128.00" in text and "9000 tokens" in text and "32 as asked" in text
    assert "memory 4250 GB/s, 0.2056 TFLOP/s a rank" in text
    assert "assumed: h200" in text and all(note in text for note in planned.notes)
    (row,) = [line for line in text.splitlines() if line.startswith("  more ")]
    assert "4096" in row and row.endswith("a leg")


@pytest.mark.parametrize(
    "other, lost",
    [
        (variant("same", 32, 0.25), "nothing of these"),
        (variant("faster", 32, 0.2), "nothing of these"),
        (variant("short", 32, 0.2, max_model_len=2048), "contexts over 2048 tokens"),
        (variant("few", 16, 0.1), "16 sequences at once"),
        (variant("one", 1, 0.2), "31 sequences at once, 96% of the tokens/s"),
        (variant("slow", 32, 0.5), "50% of the tokens/s, 50% of the tokens/s of one sequence"),
    ],
)
def test_what_another_split_gives_up(other, lost):
    assert gives_up(variant("this", 32, 0.25), other) == lost
