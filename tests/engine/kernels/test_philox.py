"""Philox against the known answers of Random123 (kat_vectors: "philox4x32 10")."""

import pytest
import torch
from penstock.engine.kernels.philox import philox, uniform

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str, device: str) -> tuple[torch.Tensor, ...]:
    # 64 copies, so that vectorised loops run as well as their scalar tails
    return tuple(torch.full((67,), int(word, 16), device=device) for word in text.split())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer, device):
    output = philox(words(counter, device), words(key, device))
    for word, expected in zip(output, words(answer, device), strict=True):
        assert torch.equal(word, expected)


def reference(seed: int, position: int, token_id: int) -> float:
    """Computes one number in Python's own integers."""
    counter, key = [token_id // 4, position, 0, 0], [seed % 2**32, seed >> 32]
    for _ in range(10):
        product0, product1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        upper0, upper1 = product0 >> 32, product1 >> 32
        counter = [
            upper1 ^ counter[1] ^ key[0],
            product1 % 2**32,
            upper0 ^ counter[3] ^ key[1],
            product0 % 2**32,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return (counter[token_id % 4] + 0.5) * 2.0**-32


@pytest.mark.parametrize("device", DEVICES)
def test_uniform_is_the_stated_function(device):
    seeds = [0, 1, 2**31, 2**32 + 5, 2**63 - 1, 2**63, 2**64 - 1]
    as_int64 = torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds], device=device)
    positions = torch.arange(len(seeds), device=device) * 1000003
    numbers = uniform(as_int64, positions, 23)
    assert numbers.dtype == torch.float32
    expected = torch.tensor([[reference(seed, row * 1000003, v) for v in range(23)] for row, seed in enumerate(seeds)])
    torch.testing.assert_close(numbers.cpu(), expected, rtol=2**-23, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_depend_on_neither_row_nor_vocab(device):
    seeds = torch.arange(9, device=device) * 77777777777
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 500], device=device)
    all_rows = uniform(seeds, positions, 1000)
    assert torch.equal(uniform(seeds, positions, 1003)[:, :1000], all_rows)
    order = torch.tensor([5, 0, 8, 2], device=device)
    assert torch.equal(uniform(seeds[order], positions[order], 1000), all_rows[order])
    for row in range(9):
        assert torch.equal(uniform(seeds[row : row + 1], positions[row : row + 1], 1000)[0], all_rows[row])
    assert torch.equal(all_rows.cpu(), uniform(seeds.cpu(), positions.cpu(), 1000)), "as on the CPU"


def test_numbers_are_uniform_and_inside_the_open_interval():
    numbers = uniform(torch.arange(50), torch.zeros(50, dtype=torch.int64), 20001)
    assert 0 < numbers.min() < 1e-5 and 1 - 1e-5 < numbers.max() < 1
    counts = torch.histc(numbers, bins=100, min=0, max=1)
    expected = numbers.numel() / 100
    assert ((counts - expected) ** 2 / expected).sum() < 160  # chi-square, 99 degrees: p about 1e-4
    assert len(numbers.unique()) > 0.9 * numbers.numel()
    correlations = torch.corrcoef(numbers)
    assert (correlations - torch.eye(50)).abs().max() < 0.04  # 5 sigma at 20001 numbers


def test_extreme_words_stay_inside_the_open_interval(monkeypatch):
    extremes = torch.tensor([[0, 2**32 - 1]])
    monkeypatch.setattr("penstock.engine.kernels.philox.philox", lambda counter, key: (extremes,) * 4)
    numbers = uniform(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 8)
    assert numbers.min() == 2.0**-33 and numbers.max() == 1 - 2.0**-24
