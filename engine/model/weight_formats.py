"""The formats in which weights are stored, as data: a row of FORMATS each. Torch-free.

A format says how many weights of a row lie together, in how many bytes, and so where a rank may cut a row; a matrix
may be cut between any two rows. Floats are the format in which a weight is its own block. What is stored in another one
is kept in it, on the host and on the device, and becomes floats when a step needs it, or is read as it is by a kernel
(weights/kept_group.py). The lossless code of compressed_size.py has no row here: no file has it. It is made while a
model is loaded, of rows of floats, and its lengths are known only then.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from penstock.engine.kernels.ggml_types import BY_NAME, PARTS
from penstock.engine.model.spec import DTYPE_BYTES

QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# Passes of up to so many tokens, by the dtype of the pass, read a quantised weight as it is stored; all others read
# floats. Of these, passes of few tokens multiply in registers (stored_linear), others through tensor cores
# (stored_matmul, which has bf16 alone). So what runs is a function of dtype, format, shape and tokens: never of where
# the weight lies, so that streamed and resident bits are equal. On an H200 floats first took 3.6 to 4.6 times as long
# at one token, 1.8 to 2.3 at four, 2.2 to 2.8 at eight and 1.4 to 1.9 at 64.
AS_STORED = {"bfloat16": 64, "float16": 4, "float32": 4}
MOST_FEW = 4  # tokens that stored_linear multiplies at most
# Fewer in bf16, where tensor cores took less for a tile of 8 tokens than registers for 4 on an H200, in each matrix of
# an 8B (tests/engine/compute/test_project.py). With Q6_K they took longer; others were not timed.
FEW_TOKENS = {"Q4_0": 3, "Q8_0": 3, "Q4_K": 3}


@dataclass(frozen=True)
class WeightFormat:
    """A format: `block` consecutive weights of a row lie in `nbytes` bytes, `parts` of so many, which are kept apart
    from each other. A block of zeros is a block of zeros."""

    name: str
    block: int
    parts: tuple[int, ...]
    as_stored: int = 0  # tokens of the largest pass that reads it as it is stored (format_in)
    few_tokens: int = 0  # and of the largest that multiplies it in registers

    @property
    def nbytes(self) -> int:
        return sum(self.parts)

    @property
    def is_quantised(self) -> bool:
        return self.block > 1

    def row_bytes(self, num_weights: int) -> int:
        """Bytes of consecutive weights of a row, or of the distance to a weight in it; they are whole blocks."""
        assert num_weights % self.block == 0, (self.name, num_weights)
        return num_weights // self.block * self.nbytes

    def ranges(self, num_cols: int, num_rows: int, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """The places of the rows [first, stop) among `num_rows` rows of so many weights that are kept together: of each
        part the first byte and the number of bytes."""
        row_blocks, start = num_cols // self.block, 0
        for size in self.parts:
            yield start + first * row_blocks * size, (stop - first) * row_blocks * size
            start += num_rows * row_blocks * size


FORMATS = {name: WeightFormat(name, 1, (nbytes,)) for name, nbytes in DTYPE_BYTES.items()}
FORMATS |= {name: WeightFormat(name, BY_NAME[name].block, tuple(size for _, size in PARTS[name])) for name in QUANTISED}


def format_in(name: str, dtype: str) -> WeightFormat:
    """The format in passes of a dtype."""
    kind, as_stored = FORMATS[name], AS_STORED[dtype]
    if not kind.is_quantised:
        return kind
    few_tokens = FEW_TOKENS.get(name, MOST_FEW) if as_stored > MOST_FEW else MOST_FEW
    return replace(kind, as_stored=as_stored, few_tokens=few_tokens)


def stored_shapes(
    shapes: Mapping[str, tuple[int, ...]], formats: Iterable[tuple[str, str]]
) -> dict[str, tuple[int, int]]:
    """The shapes in bytes, rows and bytes of a row, of the tensors that `formats` says to be quantised."""
    return {name: (shapes[name][0], FORMATS[kind].row_bytes(shapes[name][1])) for name, kind in formats}
