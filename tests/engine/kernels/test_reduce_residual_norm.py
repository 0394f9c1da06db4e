"""All-reduce, residual and norm in one kernel: the result is that of push_reduce and then residual_norm, on every
rank."""

import functools
from types import SimpleNamespace

import pytest
import torch
from penstock.engine.compute.ops import STEPS
from penstock.engine.kernels import reduce_residual_norm as module
from penstock.engine.kernels.reduce_residual_norm import reduce_residual_norm
from penstock.engine.kernels.residual_norm import residual_norm_reference
from penstock.parallel.push_reduce import DTYPES, EMPTY, MAX_PROGRAMS, push_reduce

from tests.support.emulated_ranks import assert_at_rest, connect_ranks, no_hang, run_together, sum_of
from tests.support.kernel_proof import (
    DEVICE,
    adversarial,
    counted,
    equal,
    poisoned,
    prove,
    prove_refusal,
    same_bits,
    within,
)
from tests.support.norm_oracle import assert_normed
from tests.support.rounding import norm_ulps


def inputs_of(size, kind, dtype, width, num_rows=3, seed=0):
    """Makes the ranks' parts, and the tensors that they have in common: x, weight, bias."""
    parts = [adversarial(num_rows, width, dtype, seed=seed + rank) for rank in range(size)]
    x = adversarial(num_rows, width, dtype, seed=seed + size).nan_to_num(1.0)
    weight = (torch.rand(width, device=DEVICE) + 0.5).to(dtype)
    bias = torch.randn(width, device=DEVICE).to(dtype) if kind == "layer" else None
    return parts, x, weight, bias


def run_ranks(peers, parts, x, weight, bias, kind, apart=False):
    """Runs all ranks; returns (x, out) of each. The result overwrites the part, or lies apart."""
    xs, given = [x.clone() for _ in peers], parts if apart else [part.clone() for part in parts]
    outs = [poisoned(x.shape, x.dtype) if apart else part for part in given]
    run_together(
        functools.partial(reduce_residual_norm, *rank, weight, bias, 1e-5, out, kind)
        for *rank, out in zip(peers, xs, given, outs)
    )
    return list(zip(xs, outs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("size, width", [(2, 40), (3, 96), (4, 1500)])
def test_all_ranks_have_the_sum_and_its_norm(size, kind, dtype, width):
    """The residual has the same bits as after an all-reduce; all ranks have the same bits."""
    parts, x, weight, bias = inputs_of(size, kind, dtype, width, num_rows=8)
    peers, summed = connect_ranks(size), [part.clone() for part in parts]
    run_together(functools.partial(push_reduce, *rank) for rank in zip(connect_ranks(size), summed))
    results = run_ranks(peers, parts, x, weight, bias, kind)
    expected = x + summed[0]
    for got_x, got_out in results:
        equal(got_x, expected)
        assert same_bits(got_x, results[0][0]) and same_bits(got_out, results[0][1])
    rows = expected.isfinite().all(-1)
    assert results[0][1][expected.isnan().any(-1)].isnan().all() and rows.sum() >= 6
    assert_normed(results[0][1][rows], expected[rows], weight, bias, 1e-5, kind)
    assert_at_rest(peers, 1)


@pytest.mark.tolerance
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_in_every_layout(kind, dtype):
    """Every tensor but the part, which must be contiguous, takes each layout. The reference is a sum, then the norm."""
    (part, other), x, weight, bias = inputs_of(2, kind, dtype, 40)
    tensors = {"x": x, "delta": part, "weight": weight, "out": poisoned(x.shape, dtype)}
    tensors |= {} if bias is None else {"bias": bias}

    def kernel(x, delta, weight, out, bias=None):
        here, there = connect_ranks(2)
        with no_hang():
            reduce_residual_norm(there, x.clone(), other, weight, bias, 1e-5, other.clone(), kind, collects=False)
            reduce_residual_norm(here, x, delta, weight, bias, 1e-5, out, kind)

    def reference(x, delta, weight, out, bias=None):
        residual_norm_reference(x, sum_of([delta, other]), weight, bias, 1e-5, out, kind)

    fp32 = dtype == torch.float32
    near = within(norm_ulps(40) if fp32 else 2, share=1.0 if fp32 else 0.05, scale=1.0 if kind == "layer" else 0.0)
    prove(kernel, reference, tensors, ("x", "out"), near, names=tensors.keys() - {"delta"})


def test_the_result_may_lie_apart():
    """The bits are the same, and the parts keep theirs."""
    parts, x, weight, bias = inputs_of(2, "layer", torch.bfloat16, 64)
    before = [part.clone() for part in parts]
    in_place, apart = (run_ranks(connect_ranks(2), parts, x, weight, bias, "layer", apart) for apart in (False, True))
    assert all(same_bits(a, b) for one, other in zip(in_place, apart) for a, b in zip(one, other))
    assert all(map(same_bits, parts, before))


def test_calls_follow_each_other_with_others_between():
    """Calls have batches of any size, and plain sums go through the same buffers in between."""
    peers = connect_ranks(2)
    for index, num_rows in enumerate([1, 5, MAX_PROGRAMS, 3]):
        parts, x, weight, bias = inputs_of(2, "rms", torch.bfloat16, 24, num_rows, seed=10 * index)
        (got, _), *_ = run_ranks(peers, parts, x, weight, bias, "rms")
        assert torch.equal((x + sum_of(parts)).nan_to_num(7.0), got.nan_to_num(7.0))
        plain = [part.clone() for part in parts]
        run_together(functools.partial(push_reduce, *rank) for rank in zip(peers, plain))
        assert torch.equal(plain[0].nan_to_num(7.0), sum_of(parts).nan_to_num(7.0))
        assert_at_rest(peers, 2 * index + 2)


def test_the_empty_word_and_its_row():
    """A part that holds the word EMPTY gives NaN in its row and in no other, and nobody waits for it."""
    parts, x, weight, bias = inputs_of(2, "rms", torch.bfloat16, 32, num_rows=2)
    parts[1].view(torch.int32)[0, 3] = EMPTY
    for got, out in run_ranks(connect_ranks(2), parts, x, weight, bias, "rms"):
        assert got[0].isnan().nonzero().flatten().tolist() == [6, 7]
        assert out[0].isnan().all() and out[1].isfinite().all()


def test_a_row_does_not_depend_on_its_batch():
    parts, x, weight, bias = inputs_of(4, "layer", torch.bfloat16, 700, num_rows=5)
    (batch_x, batch_out), *_ = run_ranks(connect_ranks(4), parts, x, weight, bias, "layer")
    (one_x, one_out), *_ = run_ranks(connect_ranks(4), [p[2:3] for p in parts], x[2:3], weight, bias, "layer")
    assert same_bits(batch_x[2:3], one_x) and same_bits(batch_out[2:3], one_out)


def test_what_the_kernel_cannot_take_is_refused():
    parts, x, weight, bias = inputs_of(2, "layer", torch.float32, 16)
    tensors = {"x": x, "delta": parts[0], "weight": weight, "bias": bias, "out": parts[0].clone()}
    kernel = functools.partial(reduce_residual_norm, connect_ranks(2)[0], eps=1e-5, kind="layer", collects=False)
    prove_refusal(kernel, tensors)
    with pytest.raises(ValueError, match="16386"):
        wide = torch.zeros(1, 16386, dtype=torch.bfloat16, device=DEVICE)
        kernel(x=wide, delta=wide, weight=wide[0], bias=wide[0], out=wide)


@pytest.mark.parametrize("name", [name for name in STEPS if "allreduce+" in name])
@pytest.mark.parametrize("pushes", [True, False], ids=["kernel", "fallback"])
def test_the_step_takes_the_kernel_where_ranks_have_buffers(name, pushes):
    """The step reduces and norms where there are no buffers, with the same result. Rank 1 has pushed already."""
    parts, x, weight, _ = inputs_of(2, "rms", torch.float32, 16)
    label, _, norm = name.split("+")
    peers = connect_ranks(2) if pushes else None
    ranks = SimpleNamespace(
        peer_buffers=lambda rows, given: peers[0] if pushes and given == label else None,
        all_reduce=lambda tensor, given: tensor.add_(parts[1]) if given == label else None,
    )
    act = {"x": x.clone(), "x_": parts[0].clone()}
    spec = SimpleNamespace(norm="rms", norm_eps=1e-5)
    if pushes:
        reduce_residual_norm(peers[1], x.clone(), parts[1], weight, None, 1e-5, parts[1], "rms", collects=False)
    with counted(module.calls, triton=int(pushes)), no_hang():
        model = SimpleNamespace(spec=spec, collectives=ranks)
        STEPS[name](SimpleNamespace(act=act, model=model), {norm: weight}, 0)
    equal(act["x"], x + sum_of(parts))
    assert_normed(act["x_"], act["x"], weight, None, 1e-5, "rms")


def test_calls_are_counted():
    with counted(module.calls, triton=4):
        run_ranks(connect_ranks(2), *inputs_of(2, "rms", torch.float32, 8), "rms")
