"""Puts rows into the order of the input: a line number and an offset for each are sorted, then lines are copied.

Memory is 16 bytes a row, and a new file is written beside the old one, whatever the rows hold.
"""

from array import array
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from penstock.engine.batch.output_log import OutputLog
from penstock.engine.batch.row_form import number_of


def in_order(log: OutputLog, say: Callable[[str], None]) -> None:
    """Sorts the rows of a file, unless they are sorted."""
    numbers, offsets = array("I"), array("Q")
    for offset, line in log.rows():
        numbers.append(number_of(line))
        offsets.append(offset)
    if not len(numbers) or is_sorted(numbers):
        return
    say(f"putting {len(numbers)} rows of {log.path} into the order of the input")
    with open(log.path, "rb") as stream:
        log.rewrite(copied([stream], numbers, array("H", bytes(2 * len(numbers))), offsets))


def is_sorted(numbers: array) -> bool:
    """Tells whether each number is larger than the one before."""
    values = np.frombuffer(numbers, dtype=np.uint32)
    return bool((values[1:] > values[:-1]).all())


def copied(streams: list[BinaryIO], numbers: array, files: array, offsets: array) -> Iterator[bytes]:
    """Lines of several files by ascending number: row i is in stream files[i], from byte offsets[i] on."""
    for index in map(int, np.argsort(np.frombuffer(numbers, dtype=np.uint32), kind="stable")):
        stream = streams[files[index]]
        stream.seek(offsets[index])
        yield stream.readline()
