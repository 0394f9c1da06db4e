"""What is kept coded: only where it makes passes faster, never more than memory holds, and plain what memory allows."""

from dataclasses import replace

import pytest

from engine.device_profile import load_profile
from scheduler.code_choice import CodeDoesNotPay, CodeOffer, choose_code, settle
from scheduler.demand import Demand
from scheduler.pass_work import PassShape, PassWork, StepWork
from scheduler.residency import Residency, plan_residency
from scheduler.step_plan import GroupId
from scheduler.time_model import predict_pass

GIB = 2**30
ATTN, FFN, HEAD = 84 * 2**20, 352 * 2**20, 1050 * 2**20
GROUPS = (*((GroupId(i, name), n) for i in range(32) for name, n in (("attn", ATTN), ("ffn", FFN))),)
GROUPS += ((GroupId(32, "head"), HEAD),)
SIZES = dict(GROUPS)
CODED = {group: nbytes * 7 // 10 for group, nbytes in GROUPS}
STEPS = ((StepWork("linear", weight_bytes=sum(SIZES.values()) // 64), 64),)


def demand(**changes) -> Demand:
    """Like Llama-3-8B in bf16, for a few sequences."""
    base = Demand(
        groups=GROUPS,
        embed_bytes=HEAD,
        page_bytes=2 * 2**20,
        page_size=16,
        max_num_seqs=4,
        max_position=8192,
        memory_bytes=12 * GIB,
        fixed=(("activations", GIB),),
    )
    return replace(base, **changes)


def pass_s(residency: Residency, decode_gb_s: float = 2000.0) -> float:
    rates = replace(load_profile("h200"), decode_gb_s=decode_gb_s)
    decoded_bytes = sum(SIZES[group] for group in residency.coded)
    work = PassWork(residency.streamed_bytes, residency.resident_bytes, STEPS, len(residency.coded), decoded_bytes)
    return predict_pass(work, PassShape(1, 1, 0), rates).total_s


def offer(choice: str, decode_gb_s: float = 2000.0, coded=CODED) -> CodeOffer:
    return CodeOffer(choice, coded, HEAD, lambda residency: pass_s(residency, decode_gb_s))


def test_none_and_nothing_to_code_plan_as_before():
    assert choose_code(offer("none"), demand()) == (demand(), plan_residency(demand()))
    assert choose_code(offer("lossless", coded={}), demand()) == (demand(), plan_residency(demand()))


def test_auto_leaves_alone_what_does_not_stream():
    _, residency = choose_code(offer("auto"), demand(memory_bytes=40 * GIB))
    assert not residency.coded and not residency.streamed


def test_auto_codes_what_streams_and_all_that_would_cost_more_plain():
    asked = demand(memory_bytes=8 * GIB)
    kept, residency = choose_code(offer("auto"), asked)
    plain = plan_residency(asked)
    assert residency.streamed and {group for group, _ in residency.streamed} <= residency.coded
    assert residency.streamed_bytes < 0.7 * plain.streamed_bytes - 0.1 * GIB  # more stays as well
    assert pass_s(residency) < 0.7 * pass_s(plain)
    assert residency.claimed_bytes <= asked.memory_bytes
    assert ("decode buffer", HEAD) in residency.claims and kept.coded == CODED


def test_auto_does_not_code_where_decoding_is_slow():
    _, residency = choose_code(offer("auto", decode_gb_s=0.1), demand(memory_bytes=8 * GIB))
    assert not residency.coded
    assert choose_code(offer("lossless", decode_gb_s=0.1), demand(memory_bytes=8 * GIB))[1].coded


def test_a_model_that_fits_only_coded_stays():
    asked = demand(memory_bytes=14 * GIB, resident="all")
    with pytest.raises(ValueError, match="resident=all needs"):
        choose_code(offer("none"), asked)
    _, residency = choose_code(offer("auto"), asked)
    assert not residency.streamed and residency.coded
    assert residency.claimed_bytes <= asked.memory_bytes


@pytest.mark.parametrize("gib", [13, 14, 15])
def test_what_memory_is_left_keeps_groups_plain(gib):
    """The more memory, the fewer bytes are decoded and the faster a pass; the KV cache does not pay for it."""
    asked, more = (demand(memory_bytes=n * GIB, max_num_seqs=1) for n in (gib, gib + 1))
    (_, few), (_, many) = (choose_code(offer("auto"), each) for each in (asked, more))
    assert pass_s(many) < pass_s(few)
    assert sum(map(SIZES.get, many.coded)) < sum(map(SIZES.get, few.coded))
    assert few.num_pages >= asked.wanted_pages and few.claimed_bytes <= asked.memory_bytes


def test_plain_groups_are_spread_over_depth():
    _, residency = choose_code(offer("auto"), demand(memory_bytes=15 * GIB, resident="all", max_num_seqs=1))
    coded = sorted(group.layer_idx for group in residency.coded if group.name == "ffn")
    assert 4 < len(coded) < 32
    assert max(b - a for a, b in zip(coded, coded[1:])) - min(b - a for a, b in zip(coded, coded[1:])) <= 1


def test_nothing_is_coded_in_memory_without_limit():
    _, residency = choose_code(offer("lossless"), demand(memory_bytes=None, resident="all"))
    assert not residency.coded
    _, residency = choose_code(offer("lossless"), demand(memory_bytes=None, resident="none"))
    assert residency.coded == set(SIZES)


def test_settling_keeps_the_choice_and_takes_the_bytes():
    planned = choose_code(offer("auto"), demand(memory_bytes=12 * GIB))
    sizes = {group: CODED[group] * 98 // 100 // 256 * 256 for group in planned[1].coded}
    _, settled = settle(offer("auto"), planned, sizes)
    assert (settled.resident, settled.coded) == (planned[1].resident, planned[1].coded)
    assert settled.streamed_bytes == sum(sizes[group] for group, _ in planned[1].streamed)
    assert settled.ring.ring_bytes < planned[1].ring.ring_bytes and settled.num_pages >= planned[1].num_pages
    assert settled.claimed_bytes <= 12 * GIB


@pytest.mark.parametrize(("choice", "kind"), [("auto", CodeDoesNotPay), ("lossless", ValueError)])
def test_weights_that_shrink_less_than_planned_are_refused_where_they_do_not_fit(choice, kind):
    planned = choose_code(offer(choice), demand(memory_bytes=14 * GIB, resident="all"))
    with pytest.raises(ValueError, match="weights_code.*planned.*none") as raised:
        settle(offer(choice), planned, {group: SIZES[group] * 9 // 10 for group in planned[1].coded})
    assert raised.type is kind


def test_weights_that_do_not_shrink_stay_plain_unless_coding_is_asked_for():
    asked = demand(memory_bytes=40 * GIB, resident="none")
    planned = choose_code(offer("auto"), asked)
    with pytest.raises(CodeDoesNotPay, match="plain ones"):
        settle(offer("auto"), planned, SIZES)
    assert settle(offer("lossless"), planned, SIZES)[1].streamed_bytes == sum(SIZES.values())


def test_nothing_is_claimed_for_decoding_where_all_stays_plain():
    asked = demand(memory_bytes=40 * GIB)
    assert choose_code(offer("lossless"), asked) == (asked, plan_residency(asked))
