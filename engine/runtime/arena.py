"""The activations of a pass: one device allocation, laid out by their lifetimes, cut to the pass's tokens and rows."""

import torch
from torch import Tensor

from engine.model.spec import ModelSpec
from engine.model.steps import activation_bytes, activation_widths
from scheduler.plan_check import lay_out_activations
from scheduler.step_plan import StepPlan

ALIGN = 4096


def aligned_bytes(nbytes: int, device: torch.device) -> Tensor:
    """uint8 (nbytes,) that starts at a page on every device: kernels are chosen by alignment."""
    raw = torch.empty(nbytes + ALIGN, dtype=torch.uint8, device=device)
    start = -raw.data_ptr() % ALIGN
    return raw[start : start + nbytes]


class ActivationArena:
    """`cut` gives views; names whose lifetimes do not overlap share bytes. Created once and never moved."""

    def __init__(
        self, plan: StepPlan, spec: ModelSpec, dtype: torch.dtype, tp_size: int, max_tokens: int, max_rows: int, device
    ):
        name = str(dtype).removeprefix("torch.")
        sizes = activation_bytes(spec, name, tp_size, max_tokens, max_rows)
        self.offsets = lay_out_activations(plan, sizes)
        self.widths = {name: activation_widths(spec, tp_size)[name] for name in self.offsets}
        self.nbytes = max(offset + sizes[name] for name, offset in self.offsets.items())
        self.data = aligned_bytes(self.nbytes, device)
        self.dtype = dtype

    def cut(self, num_tokens: int, num_rows: int) -> dict[str, Tensor]:
        """Every activation by name, (T, width) or (N, width)."""
        lengths = {"tokens": num_tokens, "rows": num_rows}
        views = {}
        for name, (unit, width) in self.widths.items():
            nbytes = lengths[unit] * width * self.dtype.itemsize
            flat = self.data[self.offsets[name] : self.offsets[name] + nbytes]
            views[name] = flat.view(self.dtype).view(lengths[unit], width)
        return views
