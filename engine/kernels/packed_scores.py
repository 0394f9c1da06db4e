"""Log probabilities of a prompt's tokens, as passes pack them: few bytes, and nothing that Python makes one by one,
until somebody reads them.

A position has 32-bit values, in the machine's order of bytes: the logprob of its token, its rank, the logprobs of the
`num_top` most likely tokens, and their ids; NO_ID where a vocabulary has fewer.
"""

from collections.abc import Iterator

Scored = tuple[float, int, list[tuple[int, float]]]  # a token's logprob and rank, and the most likely (id, logprob)
NO_ID = -1


def unpack(packed: bytes, num_top: int) -> Iterator[Scored]:
    """Each position, with the same bits."""
    values, floats = (memoryview(packed).cast("B").cast(kind) for kind in "if")
    for start in range(0, len(values), 2 + 2 * num_top):
        tops, ids = start + 2, start + 2 + num_top
        found = [token for token in values[ids : ids + num_top].tolist() if token != NO_ID]
        yield floats[start], values[start + 1], list(zip(found, floats[tops:ids].tolist()))
