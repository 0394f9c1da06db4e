"""Programmatic dependent launch: a kernel starts while its predecessor on the stream still ends, so that its launch
hides behind that end. It waits for the predecessor before it touches anything that a kernel wrote. It may read before
it waits what the predecessor does not write, such as a norm's weights, since all earlier kernels have ended. (Where
weights are compressed, kernels decompress them, but a group's norm is never the last of it: see compressed_group.py.)

Every kernel launched with `options` calls `wait_for_inputs` before its first store and its first load of activations.
It then waits for all kernels before it, since its predecessor has waited too. Kernels of libraries, copies and events
in between are waited for as usual. This works from compute capability 9.0 on; elsewhere nothing changes.
Source: CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization".
"""

import functools
from typing import Any

import torch
from penstock.parallel.triton_door import tl, triton


@functools.cache
def options(device: torch.device) -> dict[str, Any]:
    """The options of a kernel's launch. One of them is OVERLAPS, which the kernel takes as a tl.constexpr."""
    overlaps = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"OVERLAPS": overlaps} | ({"launch_pdl": True} if overlaps else {})


@triton.jit
def wait_for_inputs(OVERLAPS: tl.constexpr):
    """Waits until all earlier kernels have ended, and lets the next one start."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
