"""Parts of quantised blocks: all bytes of a block, each once, in the order that the table says."""

import pytest
import torch
from penstock.engine.kernels.block_parts import in_parts, split_parts
from penstock.engine.kernels.ggml_types import BY_NAME, PARTS

from tests.support.ggml_blocks import QUANTISED, random_blocks


@pytest.mark.parametrize("kind", QUANTISED)
def test_every_byte_is_in_one_part(kind):
    found = sorted(byte for start, nbytes in PARTS[kind] for byte in range(start, start + nbytes))
    assert found == list(range(BY_NAME[kind].nbytes))


@pytest.mark.parametrize("kind", QUANTISED)
def test_parts_are_the_bytes_of_the_blocks(kind):
    blocks = torch.from_numpy(random_blocks(kind, 21))
    kept = in_parts(kind, blocks)
    assert kept.shape == blocks.shape
    for (start, nbytes), part in zip(PARTS[kind], split_parts(kind, kept), strict=True):
        assert torch.equal(part, blocks[:, start : start + nbytes])


@pytest.mark.parametrize("kind", QUANTISED)
def test_parts_are_aligned_for_any_number_of_blocks(kind):
    """Kernels read pairs of words of codes, of further bits and of 16 scales at once, and words of other scales."""
    before = 0
    for index, (_, nbytes) in enumerate(PARTS[kind]):
        unit = next(size for size in (16, 8, 4, 2) if nbytes % size == 0)
        assert before % unit == 0 and (index > 0 or unit == 16)
        before += nbytes
