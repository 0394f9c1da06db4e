"""The tiles of stored_matmul as data: how its programs share a weight, by format, shape and tokens. Torch-free, for
whoever plans bytes.

Each was the fastest of eleven shapes, or within 2 % of it, over the linears of an 8B's layer together on an H200
(benchmarks/stored_matmul.json). Where x is loaded in stages, the compiler takes bits that codes of Q6_K, Q5_0, Q5_1 and
Q3_K have beyond their words through shared memory too: Q6_K took 1.1 to 1.5 times as long.
"""

import functools
from typing import NamedTuple

from penstock.engine.kernels.ggml_types import BY_NAME, PARTS

TOKENS = (8, 32, 64)  # of a tile: a linear has the least that holds its own


class Shape(NamedTuple):
    """The shape of a program: its rows, the words of each that it walks a turn, its warps, the stages of the loads of
    x; and the programs for which D is split over several, if there are fewer otherwise."""

    rows: int
    words: int
    num_warps: int
    num_stages: int
    programs: int


STAGED, LONG = Shape(64, 16, 4, 3, 528), Shape(64, 32, 4, 3, 528)
TALL, UNSTAGED = Shape(128, 16, 8, 3, 264), Shape(64, 16, 4, 1, 528)
SHAPES = {  # for each of TOKENS
    "Q4_0": (STAGED, TALL, TALL),
    "Q8_0": (LONG, UNSTAGED, STAGED),
    "Q4_K": (LONG, TALL, STAGED),
    "Q6_K": (UNSTAGED, UNSTAGED, UNSTAGED),
}
NEAREST = {  # of those that were measured, by layout: scales of 16 weights, bits that are staged
    **{kind: kind for kind in SHAPES},
    **{"Q4_1": "Q4_0", "Q5_K": "Q4_K"},
    **dict.fromkeys(("Q5_0", "Q5_1", "Q2_K", "Q3_K"), "Q6_K"),
}


class Tiles(NamedTuple):
    """A linear's programs: the tokens of a tile, the shape, the tiles of rows, and over how many programs D is split,
    each of which walks `pairs` pairs of words."""

    tokens: int
    shape: Shape
    num_tiles: int
    splits: int
    pairs: int


def tile_index(num_tokens: int) -> int:
    """The place in TOKENS of the tile for so many."""
    return next(index for index, most in enumerate(TOKENS) if num_tokens <= most)


def row_pairs(kind: str, width: int) -> int:
    """Pairs of words, 8 bytes, of a row's codes."""
    (_, code_bytes), *_ = PARTS[kind]
    return width // BY_NAME[kind].block * code_bytes // 8


@functools.cache  # a pass has hundreds of linears
def tiles_of(kind: str, num_rows: int, width: int, num_tokens: int, shape: Shape | None = None) -> Tiles:
    """The tiles of a weight (num_rows, width) and of so many tokens: of the shape for them, if none is given."""
    index = tile_index(num_tokens)
    shape = shape or SHAPES[NEAREST[kind]][index]
    turn, num_tiles = shape.words // 2, -(-num_rows // shape.rows)
    turns = -(-row_pairs(kind, width) // turn)
    own_turns = -(-turns // min(turns, max(1, shape.programs // num_tiles)))
    return Tiles(TOKENS[index], shape, num_tiles, -(-turns // own_turns), own_turns * turn)


def partial_bytes(kind: str, num_rows: int, width: int, most_tokens: int) -> int:
    """Bytes of the sums that are added up behind the programs, at most, for up to so many tokens."""
    splits = {n: tiles_of(kind, num_rows, width, n).splits for n in {*TOKENS, most_tokens} if n <= most_tokens}
    return max((4 * num_splits * n * num_rows for n, num_splits in splits.items() if num_splits > 1), default=0)
