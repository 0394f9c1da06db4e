"""GGUF models give transformers' logits and tokens on the gguf package's floats, on every number of ranks; and the same
bits wherever their weights lie."""

import pytest
import torch
from penstock.engine.model.layout import model_layout
from penstock.engine.weights.read_model import read_model
from safetensors.torch import load_file

from tests.support.gguf_models import load_reference, write_model
from tests.support.gguf_runs import GGUFCase, launch_gguf, run_gguf
from tests.support.oracle.compare import reference_logits, relative_difference

pytestmark = pytest.mark.timeout(300)  # the first test of a tp_size waits for the launch that serves all of it
MODELS = {"llama": {}, "qwen2": {}, "qwen3": {}, "llama_rope": {"rope_freqs": True}}
CASES = [GGUFCase(model, 1, resident) for model in MODELS for resident in ("none", "all")]
CASES += [GGUFCase("llama", 1, 0.5), GGUFCase("llama", 2, "none"), GGUFCase("llama", 2, "all")]
CASES += [GGUFCase("qwen2", 2, 0.5), GGUFCase("llama", 4, "none"), GGUFCase("qwen2", 4, "all")]
CASES += [GGUFCase("qwen3", 2, "none"), GGUFCase("qwen3", 4, "none")]
CASES += [GGUFCase("llama", 1, resident, "cpu") for resident in ("none", 0.5, "all")]
CASES += [GGUFCase("qwen2", 2, resident, "cpu") for resident in ("none", "all")]
BOUND = 1e-5  # of the largest logit


class Runs:
    """Models, references and results of this module, each made when it is first asked for."""

    def __init__(self, folder):
        self.folder, self.models, self.results = folder, {}, {}
        for model, options in MODELS.items():
            write_model(folder / f"{model}.gguf", model.split("_")[0], **options)

    def reference(self, case: GGUFCase):
        if case.model not in self.models:
            file, arch = self.folder / f"{case.model}.gguf", case.model.split("_")[0]
            self.models[case.model] = load_reference(file, arch, **MODELS[case.model])
        return reference_logits(self.models[case.model], self.result(case)["tokens"])

    def result(self, case: GGUFCase):
        if case not in self.results:
            if case.tp_size == 1:
                self.results[case] = run_gguf(case, self.folder)
            else:
                told = launch_gguf([each for each in CASES if each.tp_size == case.tp_size], self.folder)
                for each in CASES:
                    if each.tp_size == case.tp_size:
                        file = self.folder / f"{each.id}.safetensors"
                        assert file.exists(), f"the ranks did not come to {each.id}:\n{told[-4000:]}"
                        self.results[each] = load_file(file)
        return self.results[case]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("gguf"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_logits_and_tokens_are_transformers(runs, case):
    result, reference = runs.result(case), runs.reference(case)
    assert relative_difference(result["logits"], reference).max() < BOUND
    assert torch.equal(result["tokens"], reference.argmax(-1))
    assert (result["copied_bytes"] > 0) == (case.resident != "all")
    assert (result["float_bytes"] > 0) == (case.way == "gpu" or case.resident != "all")


ALIKE = [*((model, 1, "none") for model in MODELS), ("llama", 1, 0.5), ("llama", 2, "none")]


@pytest.mark.parametrize("model, tp_size, resident", ALIKE)
def test_bits_do_not_depend_on_where_weights_lie(runs, model, tp_size, resident):
    one, other = (runs.result(GGUFCase(model, tp_size, kept)) for kept in (resident, "all"))
    assert torch.equal(one["logits"], other["logits"]) and torch.equal(one["float_bytes"], other["float_bytes"])


@pytest.mark.parametrize("model, tp_size, resident", [("llama", 1, "none"), ("llama", 1, 0.5), ("qwen2", 2, "none")])
def test_weights_that_stay_on_a_cpu_are_floats_of_the_same_bits(runs, model, tp_size, resident):
    one, other = (runs.result(GGUFCase(model, tp_size, kept, "cpu")) for kept in (resident, "all"))
    assert torch.equal(one["logits"], other["logits"]) and one["float_bytes"] > other["float_bytes"] == 0


def test_what_streams_is_what_is_stored(runs):
    """Ten passes, and the first groups once more before them; in fp32 what is stored as F16 or BF16 doubles."""
    spec = read_model(runs.folder / "llama.gguf").spec
    streamed = sum(group.stored_bytes for group in model_layout(spec, spec.names, "float32", 1, 0).groups)
    copied = int(runs.result(GGUFCase("llama", 1, "none"))["copied_bytes"])
    assert 10 * streamed <= copied < 11 * streamed
    assert streamed < 1.3 * (runs.folder / "llama.gguf").stat().st_size
