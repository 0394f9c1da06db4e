"""Ranks agree on a call before it runs: alike on all, refused by one or by all, other prompts, another call."""

import pytest
from penstock.engine.config import EngineConfig
from penstock.engine.runtime.calls import Call, config_objection, digest, objection, pack_config
from penstock.scheduler.batching.request import SamplingParams

ASKED = [("a", [1, 2], SamplingParams()), (None, [3], SamplingParams(seed=1))]
FIRST = Call("generate", digest(ASKED), number=3)
SAYS = "under torchrun all ranks make the same calls"


def travelled(*calls: Call) -> str:
    """The objection of ranks that have sent each other their parts."""
    return objection([Call.unpack(call.pack()) for call in calls])


def test_ranks_that_agree():
    assert travelled(FIRST, FIRST, FIRST) == ""
    assert travelled(FIRST, Call("generate", number=3)) == "", "a rank without prompts takes rank 0's"


@pytest.mark.parametrize(
    "other",
    [
        ASKED[:1],
        ASKED[::-1],
        [("b", *ASKED[0][1:]), ASKED[1]],
        [(*ASKED[0][:2], SamplingParams(temperature=0.5)), ASKED[1]],
        [("a", [1], SamplingParams()), (None, [2, 3], SamplingParams(seed=1))],
    ],
    ids=["fewer", "another order", "another text", "other parameters", "another border"],
)
def test_other_prompts_are_found(other):
    assert travelled(FIRST, FIRST, Call("generate", digest(other), number=3)) == (
        f"call 3 (generate): rank 2 was given other prompts or parameters than rank 0; {SAYS}"
    )


def test_a_refusal_of_all_is_its_own_message():
    refusal = Call("generate", refusal="prompt 0: wrong", number=3)
    assert travelled(refusal, refusal) == "prompt 0: wrong"
    assert travelled(FIRST, refusal) == "call 3 (generate): refused by rank 1: prompt 0: wrong"
    assert travelled(refusal, FIRST) == "call 3 (generate): refused by rank 0: prompt 0: wrong"


def test_another_call_is_found():
    assert travelled(FIRST, Call("measure", number=2)) == f"call 3 (generate): rank 1 calls measure instead; {SAYS}"
    assert travelled(FIRST, Call("generate", FIRST.digest, number=4)) == (
        f"call 3 (generate): for rank 1 it is call 4; {SAYS}"
    )


def test_a_long_refusal_is_cut():
    long = Call("generate", refusal="é" * 5000, number=1)
    assert travelled(long, long).strip("é") == "" and len(travelled(long, long)) > 400


def test_configs_that_differ_are_found_by_field():
    def objection_to(digest="a", **options) -> str:
        return config_objection([pack_config(EngineConfig(), "a"), pack_config(EngineConfig(**options), digest)])

    assert objection_to(model="elsewhere", max_num_seqs=3) == ""
    alike = "under torchrun all ranks are configured alike"
    assert objection_to("b") == f"what the files of the model say is not the same on ranks 0 and 1: {alike}"
    assert objection_to(trace="mine.json") == f"trace=None on rank 0, but 'a file' on rank 1: {alike}"
    both = [pack_config(EngineConfig(trace=path), "a") for path in ("a.json", "b.json")]
    assert config_objection(both) == "", "each rank may have a path of its own"
    assert objection_to(page_size=8) == f"page_size=16 on rank 0, but 8 on rank 1: {alike}"
    assert objection_to(debug={"poison": True}) == f"poison=False on rank 0, but True on rank 1: {alike}"
