"""The activations of a pass: one device allocation, laid out by their lifetimes, cut to the pass's tokens and rows."""

import torch
from penstock.engine.model.steps import most_rows
from penstock.engine.weights.views import byte_range
from penstock.scheduler.passes.pass_plan import Slot
from torch import Tensor

ALIGN = 4096


def aligned_bytes(nbytes: int, device: torch.device) -> Tensor:
    """Bytes, uint8 (nbytes,), that start at a page on every device: kernels are chosen by alignment."""
    raw = torch.empty(nbytes + ALIGN, dtype=torch.uint8, device=device)
    start = -raw.data_ptr() % ALIGN
    return raw[start : start + nbytes]


def slot_of(memory: Tensor, slot: Slot) -> Tensor:
    """The bytes of a plan's slot; `memory` is the ring or the decompression buffer."""
    return byte_range(memory, slot.offset, slot.nbytes)


class ActivationArena:
    """Memory of the activations: `cut` gives views of it, and activations whose lifetimes do not overlap share bytes.
    It is allocated once and never moved.

    `offsets` are bytes in the arena of `nbytes`, as planned for `most_tokens` and `most_sampled` rows; `widths` give
    for each activation what its rows are, and their width in elements.
    """

    def __init__(
        self,
        offsets: dict[str, int],
        nbytes: int,
        widths: dict[str, tuple[str, int]],
        most_tokens: int,
        most_sampled: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.offsets, self.dtype = offsets, dtype
        self.most = most_rows(most_tokens, most_sampled)
        self.widths = {name: widths[name] for name in offsets}
        for name, (unit, width) in self.widths.items():
            end = offsets[name] + self.most[unit] * width * dtype.itemsize
            assert end <= nbytes, f"{name} was planned for fewer {unit}"
        self.data = aligned_bytes(nbytes, device)

    def cut(self, num_tokens: int, num_rows: int) -> dict[str, Tensor]:
        """Views of all activations by name, (T, width) or (N, width): never more than was planned, since the next
        activation lies behind. Where rows of prompts are scored there are as many as at a time."""
        lengths = self.most | {"tokens": num_tokens, "rows": num_rows}
        for unit, length in lengths.items():
            assert length <= self.most[unit], f"{length} {unit}, and the arena has room for {self.most[unit]}"
        views = {}
        for name, (unit, width) in self.widths.items():
            nbytes = lengths[unit] * width * self.dtype.itemsize
            flat = self.data[self.offsets[name] : self.offsets[name] + nbytes]
            views[name] = flat.view(self.dtype).view(lengths[unit], width)
        return views
