"""The four mistakes of the first GPT-NeoX engine with fused kernels, each put into this one: 1. a serial residual where
it is parallel, 2. a kernel that is never called, 3. inputs that are not contiguous, not aligned or bf16, which a kernel
takes for others, 4. another order of additions. The step of each is found, and nothing is found without a mistake.
"""

import pytest
import torch
from penstock.engine.compute.bind import Binder
from penstock.engine.llm import LLM
from penstock.engine.runtime import pass_runner

from scripts.check_numerics import TOLERANCES, Row, compare, first_fault
from tests.support.engine_proof import AS_ON_GPU, PROMPT, prove_calls, watched
from tests.support.kernel_proof import CONTIGUOUS, DEVICE, Layout
from tests.support.kernel_registry import KERNELS, STORED
from tests.support.oracle.cases import NUM_LAYERS, RUN, TOKENS
from tests.support.oracle.checkpoints import write_checkpoint
from tests.support.oracle.faults import attention_added_first, other_residual, residual_added_last
from tests.support.oracle.kernel_faults import (
    bf16_as_fp16,
    by_kernels,
    from_16_bytes,
    laid_out,
    never_called,
    together,
    without_gaps,
)

NARROW = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}  # interpreted
SHORT = {"max_tokens": 2, "device": DEVICE, "resident": "none", "max_num_seqs": 1, "max_num_batched_tokens": 8}
GAPS, MISALIGNED = Layout("sliced", before=16, between=16), Layout("misaligned", before=1)
MISREADINGS = {  # what a kernel takes its tensors for, where that is wrong, and whom it misleads
    "gaps": (without_gaps, GAPS, "float32", ("embedding", "residual_norm", "rope_append", "gated_activation")),
    "misaligned": (
        *(from_16_bytes, MISALIGNED, "float32"),
        ("embedding", "residual_norm", "rope_append", "gated_activation", "decode_attention", "linear"),
    ),
    "bf16": (
        *(bf16_as_fp16, CONTIGUOUS, "bfloat16"),
        ("residual_norm", "rope_append", "gated_activation", "decode_attention"),
    ),
}
FIRST_STEPS = {
    "embedding": (-1, "embedding"),
    "residual_norm": (0, "attn_norm"),
    "rope_append": (0, "rope"),
    "decode_attention": (0, "attention"),
    "gated_activation": (0, "activation"),
    "linear": (0, "attn_qkv"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The directory of a variant's checkpoint, written once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def directory(variant: str, **config) -> str:
        path = folder / "-".join([variant, *map(str, config.values())])
        if not path.exists():
            write_checkpoint(path, variant, **config)
        return str(path)

    return directory


def named(rows: list[Row]) -> tuple[int, str] | None:
    first = first_fault(rows)
    return first and (first.layer_idx, first.step)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_1_serial_residual_where_it_is_parallel(checkpoint, dtype):
    """Makes mistake 1: GPT-NeoX's use_parallel_residual is not followed."""
    rows = compare(checkpoint("neox_parallel"), TOKENS, dtype, **RUN, mutate=other_residual)
    assert named(rows) == (0, "attn_residual") and "no such step" in first_fault(rows).fault
    norms = [row for row in rows if row.step == "ffn_norm"]
    assert len(norms) == NUM_LAYERS and all("differs" in row.fault for row in norms)
    assert dtype != "float32" or rows[-1].drift > 1e-3


def test_1_parallel_residual_where_it_is_serial(checkpoint):
    """Makes mistake 1 the other way round."""
    rows = compare(checkpoint("neox_serial"), TOKENS, **RUN, mutate=other_residual)
    assert named(rows) == (0, "ffn_norm")
    absent = [(row.layer_idx, row.step) for row in rows if row.fault and "our plan has no" in row.fault]
    assert absent == [(layer_idx, "attn_residual") for layer_idx in range(NUM_LAYERS)]


@pytest.mark.parametrize("name", [name for name in KERNELS if KERNELS[name].names and name not in STORED])
def test_2_kernel_never_called(checkpoint, monkeypatch, name):
    """Makes mistake 2: the kernel is there and its own tests pass, but the engine computes without it. No state and no
    token shows that: the calls do. (tests/engine/kernels/test_kernels.py shows that they pass where the kernel
    runs.)"""
    kernel = KERNELS[name]
    options = (
        {"dtype": "bfloat16", "weights_compression": "lossless"}
        if name == "decompress_weights"
        else {"dtype": "float32"}
    )
    options |= {name: value for name, value in SHORT.items() if name != "max_tokens"}
    with LLM(
        checkpoint("neox_parallel", **NARROW), enforce_eager=True, num_pages=16, debug=AS_ON_GPU, **options
    ) as llm:
        never_called(monkeypatch, name)(llm)
        run = watched(llm, PROMPT, kernel.params)
    with pytest.raises(AssertionError, match=f"^{name}: 0 of {run.due[name]} calls"):
        prove_calls(run, [name])


@pytest.mark.parametrize("kind", MISREADINGS)
def test_3_kernels_take_their_inputs_as_they_are(checkpoint, monkeypatch, kind):
    """Makes no mistake: every kernel respects gaps between rows, odd addresses and bf16."""
    _, layout, dtype, names = MISREADINGS[kind]
    mutate = together(by_kernels(monkeypatch, *names), laid_out(layout))
    rows = compare(checkpoint("neox_parallel", **NARROW), TOKENS[:6], dtype, **SHORT, debug=AS_ON_GPU, mutate=mutate)
    assert first_fault(rows) is None


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, row in MISREADINGS.items() for name in row[3]])
def test_3_kernel_takes_its_inputs_for_others(checkpoint, monkeypatch, kind, name):
    """Makes mistake 3: a kernel takes rows to follow each other, addresses to be multiples of 16 bytes, or bf16 for
    fp16."""
    misread, layout, dtype, _ = MISREADINGS[kind]
    mutate = together(by_kernels(monkeypatch, name, misread=misread), laid_out(layout))
    rows = compare(checkpoint("neox_parallel", **NARROW), TOKENS[:7], dtype, **SHORT, debug=AS_ON_GPU, mutate=mutate)
    assert named(rows) == FIRST_STEPS[name]


@pytest.mark.parametrize("layer_idx", range(NUM_LAYERS))
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "variant, fault", [("neox_parallel", attention_added_first), ("neox_serial", residual_added_last)]
)
def test_4_another_order_of_additions(checkpoint, variant, fault, dtype, layer_idx):
    """Makes mistake 4: `ffn + (attn + x)` where the residual is parallel, `(ffn + attn) + x` where it is serial. No
    tolerance would show it in one layer: the bits do."""
    rows = compare(checkpoint(variant), TOKENS, dtype, **RUN, mutate=fault(layer_idx))
    first = first_fault(rows)
    assert named(rows) == (layer_idx, "ffn_residual") and "order of additions" in first.fault
    assert [row for row in rows if row.fault] == [first]
    assert 0 < first.step_error < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("variant", ["neox_parallel", "neox_serial", "qwen3"])
def test_additions_in_fused_steps(checkpoint, monkeypatch, variant, dtype):
    """Makes no mistake: the kernel that adds and norms adds in transformers' order, layer by layer, in every bit."""
    mutate = by_kernels(monkeypatch, "residual_norm")
    rows = compare(checkpoint(variant, **NARROW), TOKENS[:6], dtype, **SHORT, debug=AS_ON_GPU, mutate=mutate)
    assert first_fault(rows) is None
    residuals = [row.step for row in rows if row.step.endswith("residual") and row.bits_equal]
    assert residuals.count("ffn_residual") == NARROW["num_hidden_layers"]
    assert residuals.count("attn_residual") == (0 if variant == "neox_parallel" else NARROW["num_hidden_layers"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_4_another_order_of_additions_in_fused_steps(checkpoint, monkeypatch, dtype):
    """Makes mistake 4 in the kernel that adds and norms: half of x comes before the delta, half after. Only bits show
    it."""
    kernel = KERNELS["residual_norm"].kernel

    def adds_in_another_order(x, delta, *rest):
        if delta is not None:
            x.copy_((x * 0.5 + delta) + x * 0.5)
        kernel(x, None, *rest)

    def mutate(llm):
        by_kernels(monkeypatch)(llm)
        KERNELS["residual_norm"].put_in(monkeypatch, adds_in_another_order)

    rows = compare(checkpoint("neox_parallel", **NARROW), TOKENS[:6], dtype, **SHORT, debug=AS_ON_GPU, mutate=mutate)
    first = first_fault(rows)
    assert first.step == "ffn_residual" and "order of additions" in first.fault
    assert 0 < first.step_error < TOLERANCES[dtype]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("variant", ["neox_parallel", "neox_serial", "qwen3", "llama_gqa"])
def test_nothing_is_found_where_steps_are_fused(checkpoint, monkeypatch, variant, dtype, device):
    """Compares all kernels, fused steps and decode passes, layer by layer. In fp32, whose prompts a GPU does not pad,
    the last layer attends by the last token of a prompt alone."""
    of_lasts, selected = Binder._of_lasts, []
    monkeypatch.setattr(pass_runner, "takes_padding", lambda dtype, device: dtype != torch.float32)
    monkeypatch.setattr(Binder, "_of_lasts", lambda *given: selected.append(given) or of_lasts(*given))
    debug = RUN["debug"] | {"as_on_gpu": device == "cpu"}
    rows = compare(checkpoint(variant), TOKENS, dtype, **RUN | {"device": device, "debug": debug})
    assert first_fault(rows) is None and (selected or dtype != "float32")
