"""Dummy weights: their statistics, and that rectangles agree with the whole. test_host_store.py compares ranks."""

import torch
from penstock.engine.model.shard import Piece
from penstock.engine.weights.dummy import PERIOD, DummyWeights


def test_dummy_weights_have_the_right_scale_and_differ_by_seed_and_name():
    shapes = {"a.weight": (3000, 1024), "b.weight": (3000, 1024), "n.weight": (9,), "n.bias": (9,)}

    def read(name, seed, row=0, num_rows=3000, col=0, num_cols=1024):
        out = torch.empty(num_rows, num_cols)
        DummyWeights(shapes, seed).read_piece(Piece(name, row, num_rows, col, num_cols, 0), out)
        return out

    a = read("a.weight", 0)
    assert a.numel() > 2 * PERIOD and abs(a.std().item() * 32 - 1) < 0.01 and abs(a.mean().item()) < 1e-3
    assert torch.equal(a[1500:1510, 700:710], read("a.weight", 0, 1500, 10, 700, 10))
    assert not torch.equal(a, read("a.weight", 1)) and not torch.equal(a, read("b.weight", 0))
    assert len(a.unique(dim=0)) == 3000
    assert read("n.weight", 0, 0, 9, 0, 1).eq(1).all() and read("n.bias", 0, 0, 9, 0, 1).eq(0).all()
