"""RMSNorm and LayerNorm in float64, for the kernels that hold a norm."""

import torch
from torch import Tensor

from tests.support.kernel_proof import within
from tests.support.rounding import norm_ulps


def assert_normed(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> None:
    """Asserts that `out` is the norm of the rows of x, as near as its dtype allows. Values that cancel in a LayerNorm
    leave their rounding."""
    wide, weight = x.double(), weight.double()
    centred = wide - wide.mean(-1, keepdim=True) if kind == "layer" else wide
    factor = weight / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    exact = centred * factor + (0.0 if bias is None else bias.double())
    cancelled = (wide.nan_to_num().abs().amax(-1, keepdim=True) * factor.nan_to_num()) if kind == "layer" else 0.0
    sums = norm_ulps(x.shape[-1])
    ulps = sums if out.dtype == torch.float32 else 1.6
    in_fp32 = torch.finfo(torch.float32).eps / torch.finfo(out.dtype).eps
    within(ulps, scale=sums / ulps * in_fp32 * cancelled)(out, exact)
