"""Copies in pieces: they cover the buffer, and an endless series of them ends when asked."""

import itertools
import threading

import torch

from scripts.bench.copies import copy_pieces, cut

CPU = torch.device("cpu")


def test_pieces_cover_the_buffer_round_and_round():
    source, target = torch.arange(10, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)
    pieces = cut(source, target, 4, 15)
    assert [len(piece) for piece, _ in pieces] == [4, 4, 2, 4, 4, 2]
    nbytes, elapsed_s = copy_pieces(pieces, CPU)
    assert nbytes == 20 and elapsed_s > 0 and target.equal(source)


def test_endless_copies_end_when_asked():
    stop = threading.Event()
    pair = torch.ones(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)

    def endless():
        for number in itertools.count():
            if number == 3:
                stop.set()
            yield pair

    assert copy_pieces(endless(), CPU, in_flight=2, stop=stop)[0] == 3 * 8
