"""The sampler against transformers' processors, its own distribution, and itself in other batches."""

import contextlib
import functools
from dataclasses import replace

import pytest
import torch
from penstock.engine.compute import sampler as sampler_module
from penstock.engine.compute.sampler import EVERYTHING, GREEDY, STAGES, Asked, Sampler
from penstock.engine.kernels import argmax, draw, logprobs, occurrences, penalty
from penstock.engine.kernels import filter as filters
from penstock.engine.kernels.logprobs import Logprobs
from penstock.scheduler.batching.request import RowSampling

from tests.support.kernel_proof import counted
from tests.support.rounding import assert_apart, logprobs_apart

V = 101
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PLAIN = replace(GREEDY, temperature=1.0)


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def run(sampler: Sampler, logits: torch.Tensor, rows: list[int], positions: list[int] | int = 0):
    positions = [positions] * len(rows) if isinstance(positions, int) else positions
    on_device = (torch.tensor(ints, dtype=torch.int64, device=sampler.device) for ints in (rows, positions))
    return sampler(logits, next(on_device), next(on_device), sampler.asked(rows))


def process(sampler: Sampler, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """The distribution that the sampler draws from: logits after penalties, filters and temperature; dropped ones are
    -inf."""
    stages, rows = sampler.asked(rows).stages, torch.tensor(rows, device=sampler.device)
    if "penalty" in stages:
        logits = sampler.penalise(logits, rows).over(logits)
    if "filter" in stages:
        logits = logits.masked_fill(~sampler.limits(logits, rows).keep(logits), -torch.inf)
    temperature = sampler.params["temperature"][rows][:, None]
    return logits / torch.where(temperature > 0, temperature, 1.0)


def observe(sampler: Sampler, row: int, token_ids: torch.Tensor) -> None:
    if "penalty" in sampler.asked([row]).stages:
        sampler.observe(torch.full_like(token_ids, row), token_ids)


def with_rows(samplings: list[RowSampling], device: str = "cpu", vocab_size: int = V) -> Sampler:
    sampler = Sampler(len(samplings), vocab_size, device)
    sampler.set_rows(dict(enumerate(samplings)))
    return sampler


def random_logits(num_rows: int, vocab_size: int = V, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def tied_logits(num_rows: int) -> torch.Tensor:
    return (random_logits(num_rows) / 2).round() * 2  # a handful of different values


def equal_logits(num_rows: int) -> torch.Tensor:
    return torch.zeros(num_rows, V)


def masked_logits(num_rows: int) -> torch.Tensor:
    return random_logits(num_rows).masked_fill(torch.arange(V) % 3 > 0, -torch.inf)


def warpers(sampling: RowSampling) -> list:
    """Processors of transformers, in the order of its generate()."""
    library = pytest.importorskip("transformers.generation.logits_process")
    chosen = [library.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        chosen.append(library.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chosen.append(library.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chosen.append(library.MinPLogitsWarper(sampling.min_p))
    return chosen


FILTERS = [
    *({"temperature": value} for value in (0.1, 0.7, 1.0, 1.3, 50.0)),
    *({"top_k": value} for value in (1, 2, 40, V - 1, V, V + 7)),
    *({"top_p": value} for value in (1e-9, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999999)),
    *({"min_p": value} for value in (1e-6, 0.05, 0.5, 1.0)),
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 2.0, "top_k": 3, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.5, "top_p": 0.6, "min_p": 0.4},
]


@pytest.mark.parametrize("make", [random_logits, tied_logits, equal_logits, masked_logits])
@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_filters_equal_transformers(fields, make):
    sampling = replace(PLAIN, **fields)
    expected = logits = make(40)
    for warper in warpers(sampling):
        expected = warper(None, expected)
    processed = process(with_rows([sampling] * 40), logits, list(range(40)))
    # of tied scores transformers' top_p keeps any (its sort is not stable), ours those of the lowest ids
    assert torch.equal(processed.sort(-1).values, expected.sort(-1).values)
    if make in (random_logits, masked_logits):
        assert torch.equal(processed, expected)
    dropped_before = torch.zeros_like(logits, dtype=torch.bool)
    for token_id in range(1, V):
        same = logits[:, :token_id] == logits[:, token_id, None]
        dropped_before[:, token_id] = (same & processed[:, :token_id].isneginf()).any(-1)
    assert not (dropped_before & processed.isfinite()).any()


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.95])
def test_top_p_equals_transformers_on_a_large_vocab(top_p):
    logits = random_logits(8, vocab_size=50257, scale=2.0)
    sampling = replace(PLAIN, top_p=top_p)
    processed = process(with_rows([sampling] * 8, vocab_size=50257), logits, list(range(8)))
    assert torch.equal(processed, warpers(sampling)[1](None, logits))


PENALTIES = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 0.9},
    {"frequency_penalty": 0.4},
    {"frequency_penalty": -0.4, "presence_penalty": -1.0},
    {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.25},
]


@pytest.mark.parametrize("fields", PENALTIES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_penalties_over_passes_equal_transformers(fields, temperature, device):
    """Runs ten passes of two requests, with prompts in two chunks, against processors on the growing ids."""
    library = pytest.importorskip("transformers.generation.logits_process")
    sampling = replace(GREEDY, temperature=temperature, **fields)
    sampler = with_rows([GREEDY, sampling, GREEDY, sampling], device)
    prompts = {3: [5, 9, 5, 70], 1: [0, 100, 44]}
    for row, prompt in prompts.items():
        for chunk in (prompt[:2], prompt[2:]):
            observe(sampler, row, torch.tensor(chunk, device=device))
    outputs = {row: [] for row in prompts}
    repetition = library.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))
    for pass_idx in range(10):
        logits = random_logits(2, seed=pass_idx % 2, scale=6.0)  # few and peaked, so that tokens come back
        for index, row in enumerate(prompts):
            expected = repetition(torch.tensor([prompts[row] + outputs[row]]), logits[index : index + 1])
            counts = torch.bincount(torch.tensor(outputs[row], dtype=torch.int64), minlength=V)
            expected = expected - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
            expected = expected / (temperature or 1.0)
            processed = process(sampler, logits.to(device), list(prompts))[index].cpu()
            assert torch.equal(processed, expected[0])
        tokens = run(sampler, logits.to(device), list(prompts), pass_idx).tokens.tolist()
        for row, token in zip(prompts, tokens, strict=True):
            outputs[row].append(token)
        assert sampler.last_tokens[list(prompts)].tolist() == tokens
    assert any(len(set(tokens)) < 10 for tokens in outputs.values()), "no token came twice: nothing was tested"


def test_presence_and_frequency_look_at_output_only():
    sampler = with_rows([replace(GREEDY, presence_penalty=1.0, frequency_penalty=1.0)])
    observe(sampler, 0, torch.arange(V))
    logits = random_logits(1)
    assert torch.equal(process(sampler, logits, [0]), logits)


def test_a_reset_row_forgets(device):
    sampling = replace(PLAIN, repetition_penalty=1.5, presence_penalty=1.0, seed=3)
    used, fresh = with_rows([GREEDY, sampling], device), with_rows([GREEDY, sampling], device)
    logits = random_logits(1).to(device)
    observe(used, 1, torch.arange(V // 2, device=device))
    first = [run(used, logits, [1], pass_idx).tokens.item() for pass_idx in range(5)]
    used.set_rows({1: replace(sampling, presence_penalty=0.0)})
    used.set_rows({1: GREEDY})
    assert torch.equal(process(used, logits, [1]), logits)
    run(used, logits, [1])
    used.set_rows({1: sampling})
    assert torch.equal(process(used, logits, [1]), process(fresh, logits, [1]))
    observe(fresh, 1, torch.arange(V // 2, device=device))
    assert [run(fresh, logits, [1], pass_idx).tokens.item() for pass_idx in range(5)] == first


def test_only_rows_that_ask_for_penalties_are_counted():
    sampler = with_rows([GREEDY, PLAIN])
    run(sampler, random_logits(2), [0, 1])
    sampler.set_rows({0: replace(GREEDY, frequency_penalty=0.1)})
    run(sampler, random_logits(2), [1, 0])
    assert sampler.occurrences.sum(-1).tolist() == [1, 0, 0]  # the last is the pad row's


def test_draws_follow_softmax():
    """Compares 20000 seeds by chi-square, with a temperature and one filtered token."""
    num_rows = 20000
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -9.0, 0.5])
    sampling = [replace(PLAIN, temperature=1.5, min_p=0.01, seed=seed * 2**40 + 17) for seed in range(num_rows)]
    sampler = with_rows(sampling, vocab_size=6)
    tokens = run(sampler, logits.expand(num_rows, -1), list(range(num_rows)), 7).tokens
    counts = torch.bincount(tokens, minlength=6)
    assert counts[4] == 0
    kept = torch.tensor([0, 1, 2, 3, 5])
    expected = (logits[kept] / 1.5).softmax(-1) * num_rows
    assert ((counts[kept] - expected) ** 2 / expected).sum() < 23.5  # 4 degrees: p = 1e-4


def test_rare_tokens_are_drawn_as_often_as_they_should():
    """Tests the noise's tail: 2**18 draws (64 positions of 4096 seeds) of a token of probability 2**-12."""
    num_rows = 4096
    logits = torch.tensor([0.0, -torch.log(torch.tensor(4095.0))]).expand(num_rows, -1)
    sampler = with_rows([replace(PLAIN, seed=seed) for seed in range(num_rows)], vocab_size=2)
    rows = list(range(num_rows))
    drawn = sum(run(sampler, logits, rows, position).tokens.sum().item() for position in range(64))
    assert abs(drawn - 64) < 5 * 8


def test_positions_and_seeds_change_the_draw():
    sampler = with_rows([replace(PLAIN, seed=seed) for seed in (0, 1, 2**32, 2**63, 2**64 - 1)])
    logits = torch.zeros(5, V)
    draws = torch.stack([run(sampler, logits, list(range(5)), position).tokens for position in range(20)])
    again = torch.stack([run(sampler, logits, list(range(5)), position).tokens for position in range(20)])
    assert torch.equal(draws, again)
    assert len({tuple(column) for column in draws.T.tolist()}) == 5
    assert all(len(set(column)) > 10 for column in draws.T.tolist())


MIXED = [
    GREEDY,
    replace(PLAIN, seed=11, num_logprobs=4),
    replace(PLAIN, temperature=0.7, top_k=10, seed=12),
    replace(GREEDY, repetition_penalty=1.4, num_logprobs=4),
    replace(PLAIN, top_p=0.8, min_p=0.05, frequency_penalty=0.5, seed=2**64 - 5),
    replace(PLAIN, temperature=3.0, presence_penalty=0.7, seed=14, num_logprobs=4),
    replace(PLAIN, min_p=0.2, seed=15),
]


def decode(
    order: list[int], rows: dict[int, int], vocab_size: int, device: str, num_passes: int = 4
) -> dict[int, list]:
    """Results, bit for bit, of the requests MIXED[order] in one batch; request i is on row rows[i]."""
    sampler = Sampler(32, vocab_size, device)
    for request in order:
        sampler.set_rows({rows[request]: MIXED[request]})
        observe(sampler, rows[request], torch.arange(request, 50, 3, device=device))
    logits = random_logits(len(MIXED) * num_passes, vocab_size).view(num_passes, len(MIXED), vocab_size)
    results: dict[int, list] = {request: [] for request in order}
    for pass_idx in range(num_passes):
        positions = [100 * request + pass_idx for request in order]
        output = run(sampler, logits[pass_idx, order].to(device), [rows[request] for request in order], positions)
        for index, request in enumerate(order):
            results[request].append(output.tokens[index].item())
            if MIXED[request].num_logprobs >= 0:
                scores = Logprobs.of(output.scores.cpu())
                results[request].append(scores.at(index, MIXED[request].num_logprobs))
    return results


@pytest.mark.parametrize("vocab_size", [V, 1000, 5003])
def test_a_row_does_not_see_its_batch(vocab_size, device, monkeypatch):
    everyone = list(range(len(MIXED)))
    expected = decode(everyone, {request: request for request in everyone}, vocab_size, device)
    scattered = {request: 31 - 3 * request for request in everyone}
    orders = [everyone, everyone[::-1], [2, 4], [6, 5, 1], *([request] for request in everyone)]
    for chunk_elements in (sampler_module.CHUNK_ELEMENTS, 2 * vocab_size):
        monkeypatch.setattr(sampler_module, "CHUNK_ELEMENTS", chunk_elements)
        for order in orders:
            found = decode(order, scattered, vocab_size, device)
            assert found == {request: expected[request] for request in order}


KERNELS = (  # what a GPU runs, by the sampler's name for it
    *(("argmax_rows", argmax, argmax._argmax_rows_triton), ("draw_rows", draw, draw._draw_rows_triton)),
    *(
        ("find_limits", filters, filters._find_limits_triton),
        ("note_tokens", occurrences, occurrences._note_tokens_triton),
    ),
    *(("penalise_rows", penalty, penalty._penalise_rows_triton), ("score_rows", logprobs, logprobs._score_rows_triton)),
)


@pytest.fixture
def by_kernels(monkeypatch):
    """Lets a sampler run kernels, by Triton, as on a GPU."""
    monkeypatch.setattr(sampler_module, "reads_in_place", lambda logits: True)
    for name, _, kernel in KERNELS:
        monkeypatch.setattr(sampler_module, name, kernel)
    for module in (argmax, draw):
        monkeypatch.setattr(module, "CUT", module.CUT._replace(block=32))
    for module, sizes in ((filters, {"BLOCK": 32, "SEGMENTS": 4, "TILES": 4}), (logprobs, {"BLOCK": 32})):
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)


def outputs_of(stages: frozenset[str] | None, device: str) -> list[list]:
    """Three passes of MIXED in bfloat16, each with the rows' own stages or these."""
    sampler, rows = with_rows(MIXED, device), torch.arange(len(MIXED), device=device)
    results = []
    for pass_idx in range(3):
        if pass_idx == 0:
            sampler.observe(rows, rows + 5)
        asked = sampler.asked(rows.tolist()) if stages is None else Asked(stages)
        logits = random_logits(len(MIXED), seed=pass_idx % 2).to(torch.bfloat16).to(device)
        output = sampler(logits, rows, rows + pass_idx, asked)
        scores = None if output.scores is None else Logprobs.of(output.scores.cpu())
        results.append([output.tokens.tolist(), sampler.last_tokens[rows].tolist()])
        for index, sampling in enumerate(MIXED):
            if scores is not None and sampling.num_logprobs >= 0:
                results[-1].append(scores.at(index, sampling.num_logprobs))
    return results


@functools.cache
def outputs_once() -> list[list]:
    """Those of the rows' own stages; whoever asks has the kernels put in."""
    return outputs_of(None, "cpu")


def test_kernels_read_a_batch_whole_and_give_what_the_references_give(by_kernels, monkeypatch):
    """Runs all stages by Triton: each kernel once a pass, whatever CHUNK_ELEMENTS is."""
    monkeypatch.setattr(sampler_module, "CHUNK_ELEMENTS", 2 * V)
    with contextlib.ExitStack() as stack:
        for name, module, _ in KERNELS:
            num_calls = {"argmax_rows": 0, "note_tokens": 4}.get(name, 3)
            stack.enter_context(counted(module.calls, **({"triton": num_calls} if num_calls else {})))
        found = outputs_of(None, "cpu")
    monkeypatch.undo()
    for one, other in zip(found, outputs_of(None, "cpu"), strict=True):
        assert one[:2] == other[:2]
        for (logprob, rank, top), (expected, own_rank, own_top) in zip(one[2:], other[2:], strict=True):
            assert (rank, [token for token, _ in top]) == (own_rank, [token for token, _ in own_top])
            values = torch.tensor([logprob, *(value for _, value in top)])
            others = torch.tensor([expected, *(value for _, value in own_top)])
            assert_apart((values - others).abs(), logprobs_apart(20.0, V))  # mass is made by another exponential


def test_logits_are_copied_for_some_rows_at_a_time(by_kernels, monkeypatch):
    """Those that penalties and filters copy; the bits are those of all rows at once."""
    found = outputs_once()
    monkeypatch.setattr(sampler_module, "COPIED_ROWS", 3)
    num_calls = 3 * -(-len(MIXED) // 3)
    with counted(penalty.calls, triton=num_calls), counted(filters.calls, triton=num_calls):
        assert outputs_of(None, "cpu") == found


def test_stages_that_nobody_asks_for_change_nothing(by_kernels):
    """A captured pass runs all of them: greedy rows stay greedy, and a row asks for none of another's."""
    assert outputs_of(frozenset(STAGES), "cpu") == outputs_once()
    samplings = [GREEDY, replace(PLAIN, seed=4)]
    logits, rows = random_logits(2), torch.tensor([0, 1])
    for sampling in samplings:
        sampler = with_rows([sampling] * 2)
        assert (
            sampler(logits, rows, rows, EVERYTHING).tokens.tolist()
            == run(sampler, logits, [0, 1], [0, 1]).tokens.tolist()
        )
        assert not sampler.occurrences.any()


def test_greedy_ties_go_to_the_lowest_id(device):
    sampler = with_rows([GREEDY] * 3, device)
    logits = torch.full((3, V), -1.0, device=device)
    logits[0, [90, 17, 50]] = 2.0
    logits[1, 100] = 0.0
    logits[1, 99] = -0.0
    assert run(sampler, logits, [0, 1, 2]).tokens.tolist() == [17, 99, 0]
    assert run(sampler, logits.bfloat16(), [2, 1, 0]).tokens.tolist() == [17, 99, 0]
    assert sampler.last_tokens[:3].tolist() == [0, 99, 17]


def test_greedy_neither_sorts_nor_draws(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("not on this path")

    monkeypatch.setattr(sampler_module, "find_limits", forbidden)
    plain = with_rows([PLAIN, GREEDY])
    run(plain, random_logits(2), [0, 1])  # plain sampling never sorts
    monkeypatch.setattr(sampler_module, "draw_rows", forbidden)
    sampler = with_rows([replace(GREEDY, top_k=5, top_p=0.5)] * 2)
    assert run(sampler, random_logits(2), [0, 1]).tokens.tolist() == random_logits(2).argmax(-1).tolist()
    with pytest.raises(AssertionError):
        run(plain, random_logits(2), [0, 1])


@pytest.mark.tolerance
def test_logprobs_are_of_the_raw_logits(device):
    sampling = replace(PLAIN, temperature=0.3, repetition_penalty=2.0, seed=5)
    samplings = [replace(sampling, num_logprobs=count) for count in (3, 0, -1)]
    sampler = with_rows(samplings, device)
    observe(sampler, 0, torch.arange(V, device=device))
    logits = random_logits(3)
    output = run(sampler, logits.to(device), [0, 1, 2])
    reference, tokens = logits.double().log_softmax(-1), output.tokens.cpu()
    sampled = reference.gather(-1, tokens[:, None])
    top = reference.topk(3)
    found = [field.cpu() for field in output.logprobs]
    bound = logprobs_apart(float(logits.abs().max()), V)
    assert_apart((found[0] - sampled[:, 0]).abs()[:2], bound)
    assert found[1][:2].tolist() == (reference >= sampled).sum(-1).tolist()[:2]
    assert_apart((found[2][0, :3] - top.values[0]).abs(), bound)
    assert found[3][0, :3].tolist() == top.indices[0].tolist()
    alone = run(with_rows(samplings, device), logits[1:2].to(device), [1]).logprobs
    assert Logprobs(*(field.cpu() for field in alone)).at(0, 0) == (found[0][1].item(), int(found[1][1]), [])
    assert run(sampler, logits[2:].to(device), [2]).logprobs is None


def test_logprobs_of_ties_and_of_a_tiny_vocab():
    sampler = with_rows([replace(GREEDY, num_logprobs=20)], vocab_size=5)
    logprobs = run(sampler, torch.tensor([[-0.0, 1.0, 0.0, 1.0, -torch.inf]]), [0]).logprobs
    assert logprobs.top_ids.tolist() == [[1, 3, 0, 2, 4]]
    assert logprobs.sampled_rank.tolist() == [2]
    assert logprobs.top_logprobs[0, -1] == -torch.inf


@pytest.mark.parametrize("sampling", MIXED, ids=lambda sampling: str(MIXED.index(sampling)))
def test_rows_with_nan_logits_give_no_token(sampling, device):
    sampler = with_rows([sampling] * 6, device)
    logits = random_logits(6)
    logits[1] = torch.nan
    logits[2, 50] = torch.nan
    logits[3, [5, 60]] = torch.tensor([torch.nan, torch.inf])
    logits[4] = -torch.inf
    logits[5, 7] = torch.inf
    tokens = run(sampler, logits.to(device), list(range(6))).tokens
    assert tokens[1:4].tolist() == [-1, -1, -1] and tokens[5] == 7
    assert tokens[[0, 4]].min() >= 0 and tokens.max() < V
    assert sampler.last_tokens[:6].tolist() == tokens.clamp(min=0).tolist()  # a pass ahead computes some token
    if "penalty" in sampler.asked([0]).stages:  # those of the rows beside it have their own token alone
        assert sampler.occurrences[[0, 4, 5]].sum(-1).tolist() == [1, 1, 1]
        assert (sampler.occurrences[[0, 4, 5], tokens[[0, 4, 5]]] == 1).all()
    healthy = with_rows([sampling], device)
    assert run(healthy, logits[:1].to(device), [0]).tokens == tokens[0]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8])
def test_parameters_begin_where_kernels_are_not_compiled_anew(num_rows):
    """Triton compiles a kernel for addresses that are multiples of 16 bytes, and anew for others."""
    sampler, rows = Sampler(8, 10, "cpu"), torch.arange(num_rows)
    sampler.set_rows({row: replace(GREEDY, temperature=1.0 + row) for row in range(num_rows)})
    own = sampler._params_of(rows)
    assert own["temperature"].tolist() == [1.0 + row for row in range(num_rows)]
    for values in own.values():
        assert values.shape == (num_rows,) and values.is_contiguous() and values.data_ptr() % 16 == 0


def test_no_rows():
    output = run(with_rows([GREEDY]), torch.empty(0, V), [])
    assert output.tokens.shape == (0,) and output.logprobs is None


def test_the_pad_row_may_stand_beside_rows_that_ask_for_anything(device):
    """Sends rows of a bucket that belong to no request through every stage: they disturb no row and are not read."""
    samplings = [replace(PLAIN, top_k=3, seed=4, repetition_penalty=1.5, frequency_penalty=0.5), GREEDY]
    sampler, alone = (with_rows(samplings, device) for _ in range(2))
    for pass_idx in range(4):
        logits = random_logits(5, seed=pass_idx).to(device)
        logits[2:] = torch.nan
        padded = sampler(
            logits,
            torch.tensor([0, 1, 2, 2, 2], device=device),
            torch.full((5,), pass_idx, device=device),
            sampler.asked([0, 1]),
        )
        expected = run(alone, logits[:2], [0, 1], pass_idx).tokens.tolist()
        assert padded.tokens.tolist() == expected + [0, 0, 0]
    assert torch.equal(sampler.occurrences, alone.occurrences)
