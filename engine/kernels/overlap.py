"""Programmatic dependent launch: a kernel starts while the one before it on its stream still ends, and waits for it
before it touches anything that a kernel wrote: so its launch hides behind the end of the one before. What that one does
not write, such as a norm's weights, it may read before it waits: all kernels before that one have ended. (Where weights
are compressed, kernels decompress them, but a group's norm is never the last of it: see compressed_group.py.)

Every kernel launched with `options` calls `wait_for_inputs` before its first store and its first load of activations,
and then waits for all kernels before it, since the one before it has waited too. Kernels of libraries, copies and
events between are waited for as ever. From compute capability 9.0 on; elsewhere nothing changes.
Source: CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization".
"""

import functools
from typing import Any

import torch
from penstock.engine.kernels.triton_door import tl, triton


@functools.cache
def options(device: torch.device) -> dict[str, Any]:
    """Options of a kernel's launch, OVERLAPS among them, which the kernel takes as a tl.constexpr."""
    overlaps = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"OVERLAPS": overlaps} | ({"launch_pdl": True} if overlaps else {})


@triton.jit
def wait_for_inputs(OVERLAPS: tl.constexpr):
    """Returns when all kernels before have ended; from then on the next one may start."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
