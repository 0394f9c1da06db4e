"""Counter-based random numbers: Philox4x32-10 in plain torch integer operations.

Shapes: R rows, V vocab, B blocks of four words: ceil(V / 4).
A number depends on (seed, position, token id) alone: neither a token's row, nor the batch, nor tp_size changes it, and
nothing has to be stored or replayed. The integers are equal on CPU and CUDA.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; a test compares it with the
known answers of its authors' library, Random123.

A word is a uint32 held in an int64. A product of two words wraps around modulo 2**64 there; its sign means nothing, but
its bits are right, so a shift and a mask give the upper word.

Temporaries take about 16 bytes a number. The kernel of draw.py computes the same integers in registers.
"""

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key in each round: golden ratio and sqrt(3) - 1
ROUNDS = 10
WORD = 0xFFFFFFFF
BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 under 1

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def uniform(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Makes numbers (R, V) float32 in the open interval (0, 1), from seeds (R,) and positions (R,), both int64.

    Number v of a row is word v % 4 of the block with counter (v // 4, position, 0, 0). The key is the low and the high
    half of the seed, whose int64 is read as uint64. All 32 bits are used: near 0 numbers are 2**-32 apart, and near 1
    as far apart as float32, so a caller who needs a long tail should take it from the side of 0.
    """
    num_blocks = (vocab_size + 3) // 4
    blocks = torch.arange(num_blocks, device=seeds.device)[None, :]  # (1, B)
    zero = torch.zeros((), dtype=torch.int64, device=seeds.device)
    counter = (blocks, positions[:, None] & WORD, zero, zero)
    key = (seeds[:, None] & WORD, seeds[:, None] >> 32 & WORD)  # (R, 1) each
    words = torch.stack(philox(counter, key), dim=-1).flatten(1)[:, :vocab_size]  # (R, V)
    return words.float().add_(0.5).mul_(2.0**-32).clamp_(max=BELOW_ONE)


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Computes the four output words of Philox4x32-10. All words are int64 in 0..2**32-1 and broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = _upper(product1) ^ c1 ^ k0, product1 & WORD
        c2, c3 = _upper(product0) ^ c3 ^ k1, product0 & WORD
        k0, k1 = k0 + WEYL[0] & WORD, k1 + WEYL[1] & WORD
    return c0, c1, c2, c3


def _upper(product: Tensor) -> Tensor:
    return product >> 32 & WORD
