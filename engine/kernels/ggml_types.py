"""The types of GGUF's tensors in numbers: how many weights a block has, and in how many bytes. Torch-free.

All types that the format knows are here, so that a header can be checked and a type that is not read refused by name.
"""

from typing import NamedTuple


class GGMLType(NamedTuple):
    """A type: `block` consecutive weights of a row lie in `nbytes` bytes."""

    name: str
    block: int
    nbytes: int

    def row_bytes(self, num_weights: int) -> int:
        """Bytes of a row of so many weights, a multiple of the block."""
        assert num_weights % self.block == 0, (self.name, num_weights)
        return num_weights // self.block * self.nbytes


_SIZES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
GGML_TYPES = {number: GGMLType(*sizes) for number, sizes in _SIZES.items()}  # by their id in a file
BY_NAME = {each.name: each for each in GGML_TYPES.values()}

# How blocks are kept once they are read, codes apart from scales: of each part its first byte in a file's block and its
# bytes. They are codes (of Q6_K their four lower bits), the bits that codes have beyond, integer scales, and the fp16
# scale, with the fp16 minimum behind it if there is one.
PARTS = {
    "Q4_0": ((2, 16), (0, 2)), "Q4_1": ((4, 16), (0, 4)), "Q5_0": ((6, 16), (2, 4), (0, 2)),
    "Q5_1": ((8, 16), (4, 4), (0, 4)), "Q8_0": ((2, 32), (0, 2)), "Q2_K": ((16, 64), (0, 16), (80, 4)),
    "Q3_K": ((32, 64), (0, 32), (96, 12), (108, 2)), "Q4_K": ((16, 128), (4, 12), (0, 4)),
    "Q5_K": ((48, 128), (16, 32), (4, 12), (0, 4)), "Q6_K": ((0, 128), (128, 64), (192, 16), (208, 2)),
}  # fmt: skip
