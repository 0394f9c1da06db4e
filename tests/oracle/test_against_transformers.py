"""The engine's logits and greedy tokens agree with transformers', for every family and variant."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from tests.support.oracle.cases import (
    MEET_ALL,
    PROMPT_LENGTHS,
    RESIDENCIES,
    SUMS_ALIKE,
    TP_SIZES,
    Case,
    fp32_cases,
    half_cases,
    usual_cases,
)
from tests.support.oracle.checkpoints import write_checkpoint, write_off
from tests.support.oracle.compare import apart, choices, reference_logits, relative_difference, shared_prefix
from tests.support.oracle.engine_runs import launch_cases, run_case
from tests.support.oracle.variants import VARIANTS
from tests.support.rounding import LOUD, assert_apart

pytestmark = pytest.mark.timeout(600)  # the first test of a tp_size waits for the launch that serves all of it
MOST_NEAR_TIES = 2  # of the 192 tokens of a case, or 48, or 24


class Runs:
    """Checkpoints, models and results of the session; each is made when it is first asked for."""

    def __init__(self, folder, selected: list[Case]):
        self.folder, self.selected = folder, selected
        self.models, self.results, self.references, self.launches = {}, {}, {}, {}

    def model(self, case: Case):
        if case.checkpoint not in self.models:
            model = write_checkpoint(self.folder / case.checkpoint, case.variant, case.dtype)
            model.set_attn_implementation("eager" if case.dtype == "float32" else "sdpa")
            self.models[case.checkpoint] = model
        return self.models[case.checkpoint]

    def result(self, case: Case):
        if case not in self.results:
            self.model(case)
            if case.tp_size == 1:
                self.results[case] = run_case(case, self.folder / case.checkpoint)
            else:
                self.results[case] = self.launched(case)
        return self.results[case]

    def launched(self, case: Case):
        if case.tp_size not in self.launches:
            cases = [other for other in self.selected if other.tp_size == case.tp_size]
            for other in cases:
                self.model(other)
            self.launches[case.tp_size] = launch_cases(cases, self.folder)
        file = self.folder / f"{case.id}.safetensors"
        assert file.exists(), f"the ranks did not come to {case.id}:\n{self.launches[case.tp_size][-4000:]}"
        return load_file(file)

    def apart(self, case: Case) -> float:
        """The relative difference that another order of sums may make; twice that, two logits are as good as equal."""
        return apart(self.model(case), max(PROMPT_LENGTHS) + case.max_tokens)

    def reference(self, case: Case):
        """Logits of transformers for the tokens that this case generated; most cases of a variant generate the same."""
        tokens = self.result(case)["tokens"]
        key = case.checkpoint, tuple(tokens.flatten().tolist())
        if key not in self.references:
            self.references[key] = reference_logits(self.model(case), tokens)
        return self.references[key]


@pytest.fixture(scope="session")
def runs(request, tmp_path_factory):
    params = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    selected = dict.fromkeys(case for case in params if isinstance(case, Case))
    return Runs(tmp_path_factory.mktemp("oracle"), list(selected))


def each_case(cases):
    """Parametrizes by cases, those that are not usual marked with `soak`; and marks with `tolerance` those that stand
    for all where the order of sums is the question: variants on one rank, streamed, and two of them on two ranks, which
    add up partial sums."""
    alike, usual = {1: SUMS_ALIKE, 2: MEET_ALL}, {*usual_cases(), *half_cases()}

    def marked(case: Case):
        sums = case.resident == "none" and case.variant in alike.get(case.tp_size, ())
        marks = [pytest.mark.tolerance] * sums + [pytest.mark.soak] * (case not in usual)
        return pytest.param(case, id=case.id, marks=marks)

    return pytest.mark.parametrize("case", [*map(marked, cases)])


@each_case(fp32_cases())
def test_fp32_logits_and_tokens(case, runs, record_property):
    result, reference, bound = runs.result(case), runs.reference(case), runs.apart(case)
    assert_apart(relative_difference(result["logits"], reference), bound)
    assert torch.equal(result["tokens"], result["logits"].argmax(-1)), "these are not the logits that were sampled from"
    chosen = choices(result["tokens"], reference)
    assert not len(wrong := chosen.wrong(2 * bound)), f"another token at (prompt, position) {wrong.tolist()}"
    record_property("near_ties", num_near_ties := chosen.num_near_ties(2 * bound))
    assert num_near_ties <= MOST_NEAR_TIES


@each_case(fp32_cases())
def test_the_case_ran_as_meant(case, runs):
    """Compares all tokens after prompts in several chunks; weights crossed the link exactly where they should."""
    result = runs.result(case)
    assert result["tokens"].shape[1] == case.max_tokens
    assert result["num_passes"] == case.num_passes
    assert (result["copied_bytes"] > 0) == (case.resident != "all")


@each_case([case for case in fp32_cases() if case.tp_size > 1])
def test_fp32_ranks_agree_with_one(case, runs):
    """Compares ranks as long as both have the same tokens behind them: to the end, unless a near tie parts them. On the
    one rank all weights stream."""
    many, one = runs.result(case), runs.result(Case(case.variant, 1, "none"))
    one_logits, one_tokens = one["logits"][:, : case.max_tokens], one["tokens"][:, : case.max_tokens]
    shared = shared_prefix(many["tokens"], one_tokens)
    assert_apart(relative_difference(many["logits"], one_logits)[shared], bound := runs.apart(case))
    chosen = choices(many["tokens"], one_logits)
    assert not (chosen.differ & shared & (chosen.gaps >= 2 * bound)).any()


@each_case(half_cases())
def test_half_precision(case, runs):
    """Compares in this dtype: the engine is as near to transformers as its rounding allows, and about as near to fp32
    as transformers is."""
    result, reference, bound = runs.result(case), runs.reference(case), runs.apart(case)
    assert result["logits"].dtype == getattr(torch, case.dtype)
    assert_apart(relative_difference(result["logits"], reference), bound)
    exact = reference_logits(copy.deepcopy(runs.model(case)).float(), result["tokens"])
    ours, theirs = relative_difference(result["logits"], exact), relative_difference(reference, exact)
    assert ours.mean() <= 1.5 * theirs.mean()
    chosen = choices(result["tokens"], reference)
    assert not len(wrong := chosen.wrong(2 * bound)), f"another token at (prompt, position) {wrong.tolist()}"
    assert (chosen.gaps >= 2 * bound).float().mean() > 0.2, "hardly any gap is wide: this compared nothing"


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.can_be_off])
def test_variant_matters(name, runs, tmp_path):
    """Switches the variant off: the same weights give other logits, so the case does test the variant."""
    case = Case(name, 1, "none")
    logits = runs.result(case)["logits"][:, :1]
    write_off(runs.folder / case.checkpoint, tmp_path, name)
    off = run_case(case, tmp_path, max_tokens=1)["logits"]
    assert relative_difference(off, logits).max() > LOUD * runs.apart(case)


def test_only_dynamic_has_no_switch():
    """Lists variants that cannot be switched off: dynamic, which is the default inside the trained length."""
    assert {name for name, variant in VARIANTS.items() if not variant.can_be_off} == {"llama_dynamic"}
    assert {name for name, variant in VARIANTS.items() if variant.no_switch} == {"llama_dynamic"}


def test_every_family_meets_every_residency():
    met = {(VARIANTS[case.variant].model_type, case.tp_size, case.resident) for case in usual_cases()}
    families = {variant.model_type for variant in VARIANTS.values()}
    assert met == {(family, n, resident) for family in families for n in TP_SIZES for resident in RESIDENCIES}
