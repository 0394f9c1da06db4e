"""Random jobs: their lengths by seed, mean and range, and the prefix that they share."""

import statistics

import pytest

from scripts.bench.workload import random_jobs, read_text, text_tokens


def lengths(**differ) -> list[tuple[int, int]]:
    return [(len(job.prompt), job.output_len) for job in random_jobs(2000, 200, 50, 90, seed=1, **differ)]


@pytest.mark.parametrize("differ", [{"range_ratio": 0.5}, {"sigma": 1.0}, {"prefix_len": 7}, {}])
def test_jobs_are_those_of_their_seed(differ):
    jobs = random_jobs(30, 20, 10, 50, seed=1, **differ)
    assert jobs == random_jobs(30, 20, 10, 50, seed=1, **differ) != random_jobs(30, 20, 10, 50, seed=2, **differ)
    assert {token for job in jobs for token in job.prompt} <= set(range(50))


def test_lengths_of_a_range_are_even_in_it():
    inputs, outputs = zip(*lengths(range_ratio=0.8))
    for values, mean in ((inputs, 200), (outputs, 50)):
        low, high = int(mean * (1 - 0.8)), int(mean * (1 + 0.8))
        assert low <= min(values) <= 0.21 * mean and 1.79 * mean <= max(values) <= high
        assert statistics.fmean(values) == pytest.approx(mean, rel=0.03)
        assert statistics.pstdev(values) == pytest.approx((high - low) / 12**0.5, rel=0.05)


def test_long_tailed_lengths_have_their_mean_and_a_tail():
    inputs, outputs = zip(*lengths(sigma=1.0))
    for values, mean in ((inputs, 200), (outputs, 50)):
        assert statistics.fmean(values) == pytest.approx(mean, rel=0.1)
        assert statistics.median(values) == pytest.approx(mean * 2.718 ** (-0.5), rel=0.1)
        assert min(values) >= 1 and max(values) > 8 * mean


def test_long_tailed_jobs_fit_in_a_sequence():
    drawn = lengths(sigma=1.0, prefix_len=40, max_len=400)
    assert max(map(sum, drawn)) <= 400 and max(prompt for prompt, _ in drawn) > 300


def test_prompts_share_a_prefix_and_nothing_else():
    jobs = random_jobs(20, 30, 5, 1000, seed=3, prefix_len=12)
    assert len({tuple(job.prompt[:12]) for job in jobs}) == 1 and {len(job.prompt) for job in jobs} == {42}
    assert len({job.prompt[12] for job in jobs}) > 15


def test_prompts_of_a_text_are_stretches_of_it():
    text = list(range(100, 130))
    jobs = random_jobs(40, 20, 5, 1000, seed=3, text=text, range_ratio=0.5, prefix_len=4)
    for job in jobs:
        own = job.prompt[4:]
        assert job.prompt[:4] == jobs[0].prompt[:4] and 10 <= len(own) <= 30
        assert own == [100 + (own[0] + index) % 30 for index in range(-100, len(own) - 100)]
    assert len({job.prompt[4] for job in jobs}) > 15
    (longer,) = random_jobs(1, 70, 5, 1000, seed=3, text=text)
    assert longer.prompt[:30] == longer.prompt[30:60] and set(longer.prompt) == set(text)


def test_a_text_without_words_or_tokenizer_is_refused(tmp_path):
    file = tmp_path / "text"
    for content, message in ((b" \n", "has no words"), (b"ab\xff", "is not UTF-8: byte 2")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"--text .*text: {message}"):
            read_text(file)
    with pytest.raises(ValueError, match="no tokenizer"):
        text_tokens(None, file)
    assert text_tokens(None, None) is None


def test_without_differences_all_are_alike():
    assert set(lengths()) == {(200, 50)}
