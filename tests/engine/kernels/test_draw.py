"""The kernel of the draw: it has Philox's integers, the noise made of them, and the reference's tokens, except near
ties."""

import math

import pytest
import torch
import triton
import triton.language as tl
from penstock.engine.kernels import draw
from penstock.engine.kernels.argmax import Owners, argmax_rows_reference
from penstock.engine.kernels.draw import CUT, Noise, draw_rows, draw_rows_reference
from penstock.engine.kernels.filter import Limits
from penstock.engine.kernels.penalty import Penalised
from penstock.engine.kernels.philox import BELOW_ONE, philox, uniform

from tests.support.kernel_proof import DEVICE, DTYPES, adversarial, counted, equal, prove, prove_faster, prove_refusal

SPLITS = (1, 2, 5)  # one launch; two; segments that are empty
NOISE_ERROR = 1e-5  # as draw.py states it: of a series, whatever the order of its sums
SEEDS = [0, 1, 2**31, 2**32 + 5, 2**63 - 1, -(2**63), -1]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(draw, "CUT", CUT._replace(block=64))


def noise_of(temperatures: list[float], seed: int = 0) -> Noise:
    count = len(temperatures)
    seeds = torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(count, device=DEVICE) * 1000003
    return Noise(torch.tensor(temperatures, device=DEVICE), seeds.to(DEVICE), positions)


def by_kernel(logits, vocab_size, noise, limits=None, num_segments=None):
    return draw._draw_rows_triton(logits, vocab_size, noise, limits, None, None, num_segments)


def assert_same_but_near_ties(tokens, logits, noise, limits=None):
    """Asserts that where a token is not the reference's, its exact score is the best one but for the errors of the
    noise."""
    expected = draw_rows_reference(logits, logits.shape[1], noise, limits)
    temperatures = noise.temperatures.double()[:, None]
    u = uniform(noise.seeds, noise.positions, logits.shape[1]).double()
    scores = logits.double() / torch.where(temperatures > 0, temperatures, 1.0)
    scores += torch.where(temperatures > 0, -torch.log(-torch.log1p(-u)), 0.0)
    if limits is not None:
        assert limits.keep(logits).gather(1, tokens[:, None]).all()
    gap = (scores.gather(1, expected[:, None]) - scores.gather(1, tokens[:, None])).abs()[:, 0]
    size = scores.gather(1, expected[:, None]).abs()[:, 0]
    differ = tokens != expected
    assert (gap <= 2 * NOISE_ERROR + size * 2**-22)[differ].all()
    assert differ.sum() <= 1 + len(tokens) // 100


@triton.jit
def _write_words(seed, position, first, words, gumbels, COUNT: tl.constexpr):
    found = draw.words_of(tl.load(seed), tl.load(position), first, COUNT)
    tl.store(words + tl.arange(0, COUNT), found.to(tl.int64))
    tl.store(gumbels + tl.arange(0, COUNT), draw._gumbel(found))


@triton.jit
def _write_gumbels(words, gumbels, bounds, COUNT: tl.constexpr):
    lane = tl.arange(0, COUNT)
    word = tl.load(words + lane).to(tl.uint32)
    tl.store(gumbels + lane, draw._gumbel(word))
    tl.store(bounds + lane, draw._most_noise(word))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("position", [0, 2**31 + 3])
def test_words_are_philoxs(seed, position):
    seeds, positions = (torch.tensor([value], device=DEVICE) for value in (seed, position))
    words, gumbels = torch.empty(64, dtype=torch.int64, device=DEVICE), torch.empty(64, device=DEVICE)
    _write_words[(1,)](seeds, positions, 128, words, gumbels, 64)
    zero = torch.zeros((), dtype=torch.int64, device=DEVICE)
    blocks = torch.arange(32, 48, device=DEVICE)
    expected = philox((blocks, positions, zero, zero), (seeds & 0xFFFFFFFF, seeds >> 32 & 0xFFFFFFFF))
    assert torch.equal(words, torch.stack(expected, -1).flatten())
    u = uniform(seeds, positions, 192)[0, 128:].double()
    torch.testing.assert_close(gumbels.double(), -torch.log(-torch.log1p(-u)), rtol=0, atol=NOISE_ERROR)


def test_noise_is_within_its_error_for_every_size_of_word():
    """Words lie at both ends, and on both sides of the one where the series begins."""
    words = [word + offset for word in (0, 2**28, 2**31, 2**32) for offset in range(-64, 64)]
    words += [(1 << power) + 3 for power in range(2, 32)]
    words += torch.randint(2**32, (4096,), generator=torch.Generator().manual_seed(0)).tolist()
    words = torch.tensor([word for word in words if 0 <= word < 2**32][:4096], device=DEVICE)
    gumbels, bounds = torch.empty(2, 4096, device=DEVICE)
    _write_gumbels[(1,)](words, gumbels, bounds, 4096)
    u = words.float().add(0.5).mul(2.0**-32).clamp(max=BELOW_ONE).double()
    torch.testing.assert_close(gumbels.double(), -torch.log(-torch.log1p(-u)), rtol=0, atol=NOISE_ERROR)
    slack = bounds.double() - gumbels.double() / math.log(2)
    assert slack.min() > -64 * draw.BOUND_ERROR.value and slack[u < 0.01].max() < 0.1


def test_blocks_that_are_left_out_change_no_token():
    """Rows of three scales have 17 blocks; in most no token can win."""
    scales = torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0, 1.0])
    logits = (scales[:, None] * torch.randn(6, 1031, generator=torch.Generator().manual_seed(8))).to(DEVICE)
    noise = noise_of([1.0, 0.7, 1e-5, 1e4, 1e-2, 100.0], seed=9)
    assert_same_but_near_ties(by_kernel(logits, 1031, noise, num_segments=1), logits, noise)


@pytest.mark.parametrize(("dtype", "num_segments"), list(zip(DTYPES, SPLITS, strict=True)), ids=str)
def test_tokens_are_the_references(dtype, num_segments):
    generator = torch.Generator().manual_seed(num_segments)
    logits = (3 * torch.randn(12, 197, generator=generator)).to(dtype=dtype, device=DEVICE)
    noise = noise_of([1.0, 0.7, 0.0, 1e-5, 1e4, 1.3] * 2, seed=num_segments)
    tokens = by_kernel(logits, 197, noise, num_segments=num_segments)
    assert_same_but_near_ties(tokens, logits, noise)
    assert len(set(tokens.tolist())) > 6 and tokens.min() >= 0


def test_only_limits_are_drawn_from():
    logits = torch.randint(-2, 3, (8, 90), generator=torch.Generator().manual_seed(1)).float().to(DEVICE)
    least = torch.tensor([2.0, 1.0, 2.0, -torch.inf] * 2, device=DEVICE)
    last = torch.tensor([40, 60, 90, 90] * 2, dtype=torch.int32, device=DEVICE)
    noise = noise_of([5.0] * 7 + [0.0])
    tokens = by_kernel(logits, 90, noise, Limits(least, last), 2)
    assert_same_but_near_ties(tokens, logits, noise, Limits(least, last))
    logits[:, 3] = torch.nan
    assert by_kernel(logits, 90, noise, Limits(least, last), 2).tolist() == [-1] * 8


@pytest.mark.parametrize("num_segments", (1, 2))
def test_penalised_rows_are_read_beside_the_others(num_segments):
    """Each row is read from one place; the other holds NaN."""
    logits, scores = torch.randn(2, 6, 90, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    logits, asks, noise = logits.bfloat16(), torch.arange(6, device=DEVICE) % 2, noise_of([1.0, 0.0] * 3)
    whole = Penalised(asks, scores).over(logits)
    scores[asks == 0], logits[asks == 1] = torch.nan, torch.nan
    limits = Limits(torch.zeros(6, device=DEVICE), torch.full((6,), 90, device=DEVICE).int())
    found = draw._draw_rows_triton(logits, 90, noise, limits, Penalised(asks, scores), None, num_segments)
    assert torch.equal(found, by_kernel(whole, 90, noise, limits, num_segments))
    assert_same_but_near_ties(found, whole, noise, limits)


def test_segments_and_the_batch_change_no_token():
    logits = torch.randn(6, 180, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    noise = noise_of([0.9, 1.0, 0.0, 2.0, 30.0, 0.5])
    first = by_kernel(logits, 180, noise, num_segments=1)
    for num_segments in (2, 8):
        assert torch.equal(by_kernel(logits, 180, noise, num_segments=num_segments), first)
    for row in range(6):
        alone = Noise(*(column[row : row + 1] for column in noise))
        assert by_kernel(logits[row : row + 1], 180, alone) == first[row]
    everything = Limits(torch.full((6,), -torch.inf, device=DEVICE), torch.full((6,), 180, device=DEVICE).int())
    assert torch.equal(by_kernel(logits, 180, noise, everything), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_do_not_draw_are_argmaxs(dtype):
    """Rows have ties, zeros of both signs, NaN at the end, or -inf; beside them rows draw from a single token or from
    NaN."""
    logits = adversarial(9, 50, dtype)
    logits[6], logits[7, 46] = -torch.inf, torch.nan
    for temperatures in ([0.0] * 9, [1.0, 0.0, 0.0] * 3):
        noise = noise_of(temperatures)
        expected, found = argmax_rows_reference(logits, 47), by_kernel(logits, 47, noise, num_segments=2)
        still = noise.temperatures == 0
        assert torch.equal(found[still], expected[still])
        drawn = draw_rows_reference(logits, 47, noise)
        assert torch.equal(found < 0, drawn < 0) and (drawn < 0).any()


@pytest.mark.parametrize("num_segments", SPLITS)
def test_infinities_and_nan(num_segments):
    logits = torch.randn(5, 70, device=DEVICE)
    logits[0] = -torch.inf
    logits[1, 60] = torch.inf
    logits[2, 69] = torch.nan
    logits[3] = torch.where(torch.arange(70, device=DEVICE) == 33, 1.0, -torch.inf)
    tokens = by_kernel(logits, 70, noise_of([1.0] * 5), num_segments=num_segments)
    assert tokens[:4].tolist() == [0, 60, -1, 33] and tokens[4] >= 0


def test_draws_follow_softmax():
    """A chi-square test takes 8192 draws from a vocabulary of 4, with the kernel's noise."""
    logits, seed, position = (torch.tensor(value, device=DEVICE) for value in ([0.0, 1.0, 2.0, -1.0], [5], [9]))
    words, gumbels = torch.empty(32768, dtype=torch.int64, device=DEVICE), torch.empty(32768, device=DEVICE)
    _write_words[(1,)](seed, position, 0, words, gumbels, 32768)
    tokens = (logits / 1.5 + gumbels.view(-1, 4)).argmax(-1)
    expected = (logits / 1.5).softmax(-1) * 8192
    assert ((torch.bincount(tokens, minlength=4) - expected) ** 2 / expected).sum() < 21.1  # 3 degrees: p = 1e-4


def test_memory_around_the_logits_is_not_read_as_logits():
    """Tokens are the same in any layout; all memory around is NaN."""
    logits = 3 * torch.randn(7, 61, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    noise = noise_of([1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 0.8])
    first = by_kernel(logits, 61, noise)

    def kernel(logits, tokens):
        tokens.copy_(by_kernel(logits, 61, noise, num_segments=2))

    def reference(logits, tokens):
        tokens.copy_(first)

    inputs = {"logits": logits, "tokens": first.clone()}
    prove(kernel, reference, inputs, ("tokens",), equal)
    prove_refusal(lambda logits: by_kernel(logits, 61, noise), {"logits": logits})


@pytest.mark.parametrize("num_segments", SPLITS)
def test_padded_rows_are_not_read(num_segments):
    """They hold NaN, which would give -1; some draw, which padding does not."""
    rows = torch.tensor([3, 7, 0, 7], device=DEVICE)
    logits = torch.randn(4, 90, device=DEVICE).masked_fill(rows[:, None] == 7, torch.nan)
    noise, owners = noise_of([1.0, 1.0, 0.0, 0.0]), Owners(rows, 7)
    tokens = draw._draw_rows_triton(logits, 90, noise, None, None, owners, num_segments)
    assert torch.equal(tokens, draw_rows_reference(logits, 90, noise, owners=owners))
    assert tokens[[1, 3]].tolist() == [0, 0] and tokens[2] == logits[2].argmax()


def test_no_rows_give_no_tokens():
    tokens = by_kernel(torch.empty(0, 40, device=DEVICE), 40, noise_of([]))
    assert tokens.shape == (0,) and tokens.dtype == torch.int64


def test_calls_are_counted_by_kind():
    logits, noise = torch.randn(2, 40, device=DEVICE), noise_of([1.0, 0.0])
    with counted(draw.calls, triton=1):
        by_kernel(logits, 40, noise)
    with counted(draw.calls, **{"triton" if DEVICE == "cuda" else "reference": 1}):
        draw_rows(logits, 40, noise)
    with counted(draw.calls, reference=1):
        draw_rows(logits.double(), 40, noise)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 32])
def test_kernel_is_faster(monkeypatch, num_rows):
    monkeypatch.setattr(draw, "CUT", CUT)
    logits = torch.randn(num_rows, 128256, dtype=torch.bfloat16, device="cuda")
    noise = noise_of([0.8] * num_rows)
    runs = [lambda run=run: run(logits, 128256, noise) for run in (draw_rows, draw_rows_reference)]
    prove_faster(*runs, logits.nbytes, f"draw {num_rows}")
