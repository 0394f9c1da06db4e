"""What every kernel is held to, as far as a kernel alone goes: against its reference on tensors that lie in memory in
every way, poisoned around and before; against float64; its calls counted; its time in a CUDA graph. What it is held to
inside the engine is in engine_proof.py.

Where there is no GPU the kernels run under Triton's interpreter, which drops the low bits when it casts to bf16 where
hardware rounds to nearest; and triton 3.6 interprets scalars as arrays of one element, which numpy 2.4 no longer takes
as integers. Both are corrected here.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory: how many elements before it, how many between its rows, in which order of dims,
    how many from one element to the next."""

    name: str
    before: int = 0
    between: int = 0
    permuted: bool = False
    step: int = 1

    def lay_out(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Lays `values` in memory; returns a view of them, and the poisoned memory around it."""
        sizes = list(values.shape)
        inner_first = [values.ndim - 1, *reversed(range(values.ndim - 1))]
        if self.permuted:
            inner_first = inner_first[:-2] + inner_first[-2:][::-1] if values.ndim > 2 else inner_first[::-1]
        strides, stride = [0] * values.ndim, self.step
        for index, dim in enumerate(inner_first):
            strides[dim] = stride
            stride = stride * sizes[dim] + (self.between if index == 0 else 0)
        memory = poisoned((self.before + stride + 64,), values.dtype)
        view = memory.as_strided(sizes, strides, self.before)
        view.copy_(values)
        return view, memory


CONTIGUOUS = Layout("contiguous")
RESPECTED = (
    CONTIGUOUS,
    Layout("viewed", before=64),
    Layout("misaligned", before=1),
    Layout("sliced", before=16, between=16),
    Layout("sliced and misaligned", before=3, between=5),
)
PERMUTED = Layout("permuted", permuted=True)  # of a matrix: columns lie together
STEPPED = Layout("stepped", step=2)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """NaN, or the most negative integer: whatever reads it, or does not write it, shows."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    return torch.full(shape, torch.iinfo(dtype).min, dtype=dtype, device=DEVICE)


def adversarial(num_rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows (num_rows, width) of all kinds in turn: random, tiny, huge, one spike, constant, zeros of both signs,
    alternating, and one with a NaN, which has to stay in its row."""
    normal = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))
    signs = 1.0 - 2.0 * (torch.arange(width) % 2)
    spike = torch.zeros(width).index_fill_(0, torch.tensor(width // 2), 300.0)
    with_nan = normal[0].index_fill(0, torch.tensor(width - 1), float("nan"))
    for row in range(num_rows):
        kinds = (normal[row], normal[row] * 1e-6, normal[row] * 1e4, spike, torch.full((width,), 0.1), 0.0 * signs)
        normal[row] = (*kinds, signs * 3.0, with_nan)[row % 8]
    return normal.to(dtype=dtype, device=DEVICE)


def prove(
    kernel: Callable[..., None],
    reference: Callable[..., None],
    inputs: Mapping[str, Tensor],
    outputs: Iterable[str],
    agree: Callable[[Tensor, Tensor], None],
    layouts: Iterable[Layout] = RESPECTED,
    names: Iterable[str] | None = None,
) -> None:
    """Calls kernel and reference with `inputs` as keywords, and asserts that they agree; `outputs` are those that they
    may change. The kernel is called as often as there are layouts, and each tensor of `names`, by default all of
    floats, takes its turn with each. Memory around a tensor, and every tensor that is no output, keep their bits."""
    expected = {name: tensor.clone() for name, tensor in inputs.items()}
    reference(**expected)
    layouts, names = list(layouts), list(names or _floating(inputs))
    for turn in range(len(layouts)):
        variant = {name: layouts[(index + turn) % len(layouts)] for index, name in enumerate(names)}
        laid = {name: variant.get(name, CONTIGUOUS).lay_out(tensor) for name, tensor in inputs.items()}
        around = {name: memory.clone() for name, (_, memory) in laid.items()}
        kernel(**{name: view for name, (view, _) in laid.items()})
        for name, (view, memory) in laid.items():
            if name in outputs:
                agree(view, expected[name])
                view.fill_(0)
                around[name].as_strided(view.shape, view.stride(), view.storage_offset()).fill_(0)
            assert same_bits(memory, around[name]), f"{name} ({variant}): memory was written that is not an output's"


def prove_refusal(kernel: Callable[..., None], inputs: Mapping[str, Tensor], *names: str) -> None:
    """Tensors whose rows are not contiguous are refused with a message about strides, not computed wrongly."""
    for name, layout in itertools.product(names or _floating(inputs), (PERMUTED, STEPPED)):
        if layout is STEPPED or inputs[name].ndim == 2:
            with pytest.raises((AssertionError, ValueError), match="stride"):
                kernel(**{**inputs, name: layout.lay_out(inputs[name])[0]})


def _floating(inputs: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in inputs.items() if tensor.is_floating_point()]


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = _BITS[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def equal(actual: Tensor, expected: Tensor) -> None:
    """Asserts that every value is the same; zeros may differ in sign and NaNs in their bits."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def within(ulps: float, share: float = 1.0, scale: float | Tensor = 0.0) -> Callable[[Tensor, Tensor], None]:
    """Agreement to so many units in the last place of a value, or of what it may be taken for: `scale` times the
    largest value of its row, or the sizes themselves. No more than `share` of the values may differ at all."""

    def agree(actual: Tensor, expected: Tensor) -> None:
        wide, exact = actual.double(), expected.double()
        finite = exact.isfinite() & (exact.abs() <= torch.finfo(actual.dtype).max)
        assert torch.equal(wide[~finite].isnan(), exact[~finite].isnan())
        size = exact.masked_fill(~finite, 0.0).abs()
        least = scale if isinstance(scale, Tensor) else scale * size.amax(-1, keepdim=True)
        size = torch.maximum(size, least).clamp_(min=torch.finfo(actual.dtype).tiny)
        error = ((wide - exact).abs() / (size * torch.finfo(actual.dtype).eps))[finite]
        assert error.numel() == 0 or error.max() <= ulps, f"{float(error.max()):.3g} ulp, {ulps} are allowed"
        assert (error > 0).double().mean() <= share, f"{int((error > 0).sum())} of {error.numel()} differ"

    return agree


@contextlib.contextmanager
def counted(calls: dict[str, int], **expected: int) -> Iterator[None]:
    """Exactly these calls happen inside: a kernel that never ran proves nothing."""
    before = dict(calls)
    yield
    assert {kind: calls[kind] - before[kind] for kind in calls} == {**dict.fromkeys(calls, 0), **expected}


def time_per_call(fn: Callable[[], None], repeats: int = 50) -> float:
    """Seconds of one call on a GPU, many in one CUDA graph: what a captured step costs, without Python's launches."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            fn()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3 / repeats


def prove_faster(kernel: Callable[[], None], reference: Callable[[], None], nbytes: int, label: str) -> None:
    """The kernel takes less time than what it replaces, in a graph, where no launch hides it. `nbytes` must cross the
    memory at least; prints what was reached."""
    ours, theirs = time_per_call(kernel), time_per_call(reference)
    print(f"{label}: {ours * 1e6:.2f} us, {nbytes / ours * 1e-9:.0f} GB/s; reference {theirs * 1e6:.2f} us")
    assert ours < theirs


def _convert_float(values: np.ndarray, source, target, rounding):
    """The interpreter's cast, with bf16 rounded to nearest even; values and result are bit patterns."""
    names = (source.name, target.name)
    if names == ("fp32", "bf16"):
        tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        return tensor.bfloat16().view(torch.int16).numpy().view(np.uint16)
    if names == ("bf16", "fp32"):
        return values.astype(np.uint32) << 16
    return _interpreters_own(values, source, target, rounding)


_interpreters_own, interpreter._convert_float = interpreter._convert_float, _convert_float


def _patch_lang_tensor(tensor, scope) -> None:
    """The interpreter's tensors, whose scalars may bound a loop."""
    _interpreters_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


_interpreters_tensor, interpreter._patch_lang_tensor = interpreter._patch_lang_tensor, _patch_lang_tensor
