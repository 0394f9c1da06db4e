"""Random blocks of every quantised type, with scales of all sizes, and what the gguf package makes of them."""

import gguf
import numpy as np
import torch
from penstock.engine.kernels.block_parts import in_parts
from penstock.engine.kernels.ggml_types import BY_NAME
from torch import Tensor

HALVES = {  # where a block has its fp16
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
QUANTISED = tuple(HALVES)


def random_blocks(kind: str, num_blocks: int, seed: int = 0, scale: float | None = None) -> np.ndarray:
    """Blocks (num_blocks, bytes) uint8 whose codes are any bits, and whose scales are normal with this deviation; or,
    without it, any finite fp16: zeros of both signs, subnormal and huge ones too."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (num_blocks, BY_NAME[kind].nbytes), dtype=np.uint8)
    for at in HALVES[kind]:
        if scale is None:
            bits = rng.integers(0, 2**16, num_blocks, dtype=np.uint16)
            bits = np.where(bits & 0x7C00 == 0x7C00, bits & 0x83FF, bits)
            bits[:4] = (0, 0x8000, 1, 0x7BFF)
            halves = bits.astype(np.uint16).view(np.float16)
        else:
            halves = (rng.standard_normal(num_blocks) * scale).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks


def stored(kind: str, blocks: np.ndarray) -> Tensor:
    """Blocks (N, bytes) as they are kept once they are read, in parts."""
    return in_parts(kind, torch.from_numpy(blocks))


def oracle(kind: str, blocks: np.ndarray) -> Tensor:
    """The weights of blocks (N, bytes), (N, block) fp32."""
    return torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]))
