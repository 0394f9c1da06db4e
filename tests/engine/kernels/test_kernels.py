"""Every kernel inside the engine: hidden states and tokens are those of its reference, and the right steps call it."""

import ast
from pathlib import Path

import pytest
from penstock.engine.llm import LLM

from tests.support.engine_proof import (
    PROMPT,
    apart,
    first_difference,
    prove_calls,
    prove_states_and_tokens,
    run_with,
    watched,
)
from tests.support.gguf_models import SMALL, write_model
from tests.support.kernel_proof import DEVICE
from tests.support.kernel_registry import ALL, DRAWN, GREEDY, KERNELS, OVER_RANKS, STORED
from tests.support.oracle.checkpoints import write_checkpoints

ROOT = Path(__file__).resolve().parents[3]
VARIANTS = ("qwen3", "neox_parallel")  # RMSNorm, norms of q and k, gated; LayerNorm, biases, partial rotation
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
OPTIONS = {"resident": "none", "max_num_seqs": 1, "max_num_batched_tokens": 8, "num_pages": 16}
COMPRESSED = {"weights_compression": "lossless"}
ALONE = [name for name in KERNELS if name not in OVER_RANKS]
DTYPES = ("float32", "bfloat16")
PROOFS = {"prove", "prove_refusal", "counted"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = write_checkpoints(tmp_path_factory.mktemp("checkpoints"), VARIANTS, **TINY)
    write_model(folder / "stored.gguf", "llama", sizes=SMALL)
    return folder


@pytest.fixture(scope="module")
def plain(checkpoints):
    """A run in which no kernel is replaced, made once."""
    made = {}

    def get(variant, params=DRAWN, **options):
        key = (variant, params, *options.items())
        if key not in made:
            made[key] = run_with(str(checkpoints / variant), params=params, **OPTIONS | options)
        return made[key]

    return get


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if KERNELS[name].exact else pytest.mark.tolerance) for name in ALONE]
)
def test_states_and_tokens_are_the_references(checkpoints, plain, name, variant, dtype):
    """The kernel ran in one of the two runs, once for each step that has to call it, and never in the other."""
    kernel, compressed = KERNELS[name], name == "decompress_weights"
    if compressed and dtype != "bfloat16":
        pytest.skip("only bfloat16 is compressed")
    costly = DEVICE == "cpu" and name in ("linear", "filter", "decompress_weights")
    if costly and (variant, dtype) != ("neox_parallel", "bfloat16" if compressed else "float32"):
        pytest.skip("seconds in the interpreter: once is enough there")
    if name in STORED:
        if (variant, dtype) != (VARIANTS[0], STORED[name]):
            pytest.skip("one quantised model has all of their calls")
        variant = "stored.gguf"
    options = {"dtype": dtype, **(COMPRESSED if compressed else {"weights_compression": "none"})}
    first = plain(variant, kernel.params, **options)
    other = run_with(str(checkpoints / variant), name, params=kernel.params, **OPTIONS | options)
    if kernel.exact or dtype == "float32":
        prove_states_and_tokens(first, other, 0.0 if kernel.exact else apart(first, dtype))
    else:
        assert first_difference(first, other, apart(first, dtype)) is None  # a token may fall otherwise
    by_kernel, by_reference = (other, first) if DEVICE == "cpu" else (first, other)
    prove_calls(by_kernel, [name])
    assert by_reference.made[name]["triton"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("params", [GREEDY, ALL], ids=["greedy", "sampled"])
def test_every_kernel_runs_in_the_demo_model(params, eager):
    """Weights stream and are compressed. A captured pass calls its kernels when it is warmed up and captured, not when
    it is replayed."""
    options = {"resident": "none", "weights_compression": "lossless", "max_num_seqs": 1, "gpu_memory": "4GiB"}
    with LLM("demo", dtype="bfloat16", enforce_eager=eager, capture="lazy", **options) as llm:
        run = watched(llm, PROMPT, params, states=False)
        graphs = llm.engine.worker.runner.graphs
        assert eager if graphs is None else graphs.passes
    stages = {"draw", "filter", "penalty", "occurrences", "logprobs"}
    others = (stages if params is GREEDY else {"argmax"}) | {*STORED}
    prove_calls(run, [name for name in ALONE if name not in others])


def test_no_kernel_is_left_out():
    """A kernel is a module that counts its calls."""
    files = [*(ROOT / "engine/kernels").glob("*.py"), *(ROOT / "parallel").glob("*.py")]
    assert {file.stem for file in files if "\ncalls = {" in file.read_text()} == set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_has_the_proofs_of_a_kernel_alone(name):
    """Its own tests use layouts, refusal, counters and the time in a graph. One process cannot time sums over ranks, so
    tests/gpu/test_push_reduce.py does; decompress_weights replaces nothing, so it is compared with a copy."""
    files = [path for path in ROOT.glob("tests/**/test_*.py") if path.stem in (f"test_{name}", f"test_{name}_kernel")]
    (file,) = [path for path in files if path.parent.name in ("kernels", "parallel")]
    called = {node.func.id for node in ast.walk(ast.parse(file.read_text())) if _calls_a_name(node)}
    timed = set() if name in OVER_RANKS else {"time_per_call" if name == "decompress_weights" else "prove_faster"}
    assert called >= PROOFS | timed


def _calls_a_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
