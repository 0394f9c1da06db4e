"""The sizes of a tile of the lossless codec of weights (decompress_weights.py). Torch-free, for whoever plans bytes."""

LANES, LANE_WEIGHTS = 128, 16
TILE = LANES * LANE_WEIGHTS  # weights
ESCAPE_ROW = 32  # escapes of 3 bits in three words


def num_escape_rows(num_escapes: int) -> int:
    """The rows for so many escapes, padded: a lane reads three words from its first escape on, even at the end."""
    return num_escapes // ESCAPE_ROW + 2
