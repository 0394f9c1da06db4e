"""The tile of the lossless codec of weights (decompress_weights.py) in numbers. Torch-free: bytes are planned without
torch."""

LANES, LANE_WEIGHTS = 128, 16
TILE = LANES * LANE_WEIGHTS  # weights
ESCAPE_ROW = 32  # escapes of 3 bits in three words


def num_escape_rows(num_escapes: int) -> int:
    """A lane reads three words from its first escape on, which may be the end."""
    return num_escapes // ESCAPE_ROW + 2
