"""Scores by chunks are those of generation and of the oracle, masses are those of transformers, and the record is
whole."""

import json
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from penstock.engine.planning.find_model import find_model
from penstock.engine.weights.read_model import read_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from penstock import LLM, SamplingParams
from scripts.bench.dummy_gguf import write_gguf
from scripts.report.page import Record, render
from scripts.research import sink_perplexity
from scripts.research.attention_mass import summarise, verdict, watched_masses
from scripts.research.sink_perplexity import PAGE_SIZE, Variant, engine_of, longer_model, read_text
from scripts.research.teacher_forcing import cached_row, logprobs_of, recomputed_row
from tests.support.commands import ROOT
from tests.support.oracle.compare import apart
from tests.support.oracle.sink_oracle import eviction_chunk, held_indices, sink_logits
from tests.support.rounding import LOUD, assert_apart, logprobs_apart

TRAINED = 512
TOKENS = [0, *random.Random(3).choices(range(5, 2048), k=299)]
SINKS, WINDOW, RECOMPUTED = Variant("s", 3, 21), Variant("w", 0, 24), Variant("r", 0, 24, recomputed_row)
FULL = Variant("full", 0, None)


def score(variant: Variant, tokens: list[int]) -> torch.Tensor:
    with engine_of(variant, "demo", TRAINED, len(tokens) - 1) as llm:
        return logprobs_of(llm, tokens, variant.row_of)


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    kwargs = {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(find_model("demo"), **kwargs).eval()


def held(variant: Variant) -> list[list[int]]:
    return held_indices(len(TOKENS) - 1, variant.sinks, variant.window, eviction_chunk(variant.window, PAGE_SIZE))


@pytest.fixture(scope="module")
@torch.no_grad()
def bound(reference) -> float:
    """Says how far log probabilities of these tokens may be from another run's, for the order of sums. Logits are as
    large whatever is held."""
    largest = float(reference(torch.tensor([TOKENS])).logits.abs().max())
    return logprobs_apart(largest, reference.config.vocab_size, apart(reference, len(TOKENS)))


def of_following(logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.tolerance
@pytest.mark.parametrize(
    ("variant", "prompt", "num_generated"),
    [(SINKS, TOKENS[:5], 120), (WINDOW, TOKENS[:90], 60), (FULL, TOKENS + TOKENS[:200], 40)],
    ids=["sinks", "window", "full, past the trained length"],
)
def test_scores_are_what_generation_reports(variant, prompt, num_generated, bound):
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=num_generated, ignore_eos=True, logprobs=0)
    options = {"attention_sinks": variant.sinks, "attention_window": variant.window, "page_size": PAGE_SIZE}
    options |= {"device": "cpu", "dtype": "float32", "max_num_seqs": 2, "debug": {"page_order_seed": 1}}
    with longer_model("demo", 600) as model, LLM(model, **options) as llm:
        (output,) = llm.generate([prompt], params)[0].outputs
    reported = [likeliest[token].logprob for likeliest, token in zip(output.logprobs, output.token_ids)]
    scored = score(variant, prompt + output.token_ids)
    assert len(prompt) + num_generated > (variant.most_cached or TRAINED)
    assert_apart((scored[-num_generated:] - torch.tensor(reported)).abs(), bound)


@pytest.mark.tolerance
@pytest.mark.parametrize("variant", [SINKS, WINDOW], ids=["sinks", "window"])
def test_scores_are_the_oracles(variant, reference, bound):
    expected = of_following(sink_logits(reference, TOKENS[:-1], held(variant)), TOKENS[1:])
    assert_apart((score(variant, TOKENS) - expected).abs(), bound)


@pytest.mark.tolerance
@torch.no_grad()
def test_recomputed_is_a_model_that_saw_only_what_is_held(reference, bound):
    scored = score(RECOMPUTED, TOKENS)
    assert len(scored) == len(TOKENS) - 1
    for token in (0, 23, 24, 100, 250, len(TOKENS) - 2):
        seen = torch.tensor([[TOKENS[index] for index in held(RECOMPUTED)[token]]])
        expected = of_following(reference(seen).logits[0, -1:], [TOKENS[token + 1]])
        assert_apart((scored[token] - expected).abs(), bound)


@pytest.mark.tolerance
def test_a_window_that_holds_everything_is_full_attention(bound):
    full = score(FULL, TOKENS)
    assert_apart((score(Variant("s", 4, 300), TOKENS) - full).abs(), bound)
    for variant in (SINKS, WINDOW, RECOMPUTED):
        scored = score(variant, TOKENS)
        assert_apart((scored[:24] - full[:24]).abs(), bound)
        assert (scored[24:] - full[24:]).abs().max() > LOUD * bound


@pytest.mark.tolerance
@torch.no_grad()
def test_masses_are_those_of_transformers(reference):
    """The engine runs two passes, of which the second reads keys that the first has cached.

    A share w errs by w times what its score errs by, which is `apart` of a size of |log w|; so does the sum that it is
    a share of, and w |log w| is under a half.
    """
    with engine_of(FULL, "demo", TRAINED, len(TOKENS)) as llm:
        with watched_masses(llm, 4) as passes:
            logprobs_of(llm, [*TOKENS, 5], cached_row)
        assert len(llm.engine.watches) == 0
    attentions = reference(torch.tensor([TOKENS]), output_attentions=True).attentions
    assert len(passes) == len(attentions) == 4
    for parts, attention in zip(passes, attentions):
        assert [len(part) for part in parts] == [256, 44]
        difference = (torch.cat(parts) - attention[0, :, :, :4].transpose(0, 1)).abs()
        assert_apart(difference, apart(reference, len(TOKENS)))


def masses(share_of: list[float]) -> torch.Tensor:
    """Makes masses of 100 queries of so many heads, of which each gives a share to the first of 2 tokens."""
    return torch.stack([torch.tensor(share_of), torch.zeros(len(share_of))], -1).expand(100, -1, 2)


def test_masses_in_figures():
    equal = (1 / torch.arange(1, 101))[:, None, None].expand(100, 3, 2)
    first, second = summarise([masses([0.2, 0.6]), equal], 50)
    assert (first["layer"], second["layer"]) == (0, 1)
    assert first["mass"] == pytest.approx(0.4) and first["of_the_first"] == pytest.approx(0.4)
    assert first["largest_head"] == pytest.approx(0.6)
    assert first["uniform"] == pytest.approx(sum(2 / n for n in range(51, 101)) / 50)
    assert second["mass"] == pytest.approx(second["uniform"]) == pytest.approx(2 * second["of_the_first"])


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ([0.9, 0.3], "60.0% of .*: a model with sinks$"),
        ([0.5, *[0.0] * 9], "50.0% in the head .*: a model with sinks in single heads only$"),
        ([0.1, 0.1], "10.0% of .*: a trace of sinks, "),
        ([0.02, 0.01], "1.5% of .*: a model without sinks$"),
    ],
)
def test_the_verdict_is_of_the_figures(shares, said):
    assert re.search(said, verdict(summarise([masses(shares)], 50)))


DOCS = {
    "trained": [("one", "first trained on. " * 40)],
    "queue": [("Queue", "held out text. " * 30), ("get", "more of it.")],
    "xmlrpc.server": [("Server", "held out as well; " * 30)],
}


def test_text_that_is_held_out_comes_first(monkeypatch):
    monkeypatch.setattr(sink_perplexity, "collect_docs", lambda: DOCS)

    def encode(text: str) -> list[int]:
        return [0, *text.encode()]

    tokens, said, trained_on = read_text(encode, 700)
    held_out = "held out text. " * 30 + "\n\nmore of it.\n\n" + "held out as well; " * 30 + "\n\n"
    assert bytes(tokens[1:]).decode() == held_out[:700]
    assert "of 2 modules" in said and trained_on == 0
    tokens, said, trained_on = read_text(encode, 1100)
    assert bytes(tokens[1:]).decode() == (held_out + "first trained on. " * 40)[:1100]
    assert "of 3 modules" in said and trained_on == 1100 - len(held_out)
    with pytest.raises(ValueError, match="--num-tokens 5000: this Python's documentation has "):
        read_text(encode, 5000)


def test_a_gguf_file_may_be_longer_and_nothing_else_changes(tmp_path):
    file, spec = tmp_path / "m.gguf", read_model(find_model("demo")).spec
    write_gguf(spec, file, "Q4_1", "Q8_0", sparse=False)
    with longer_model(str(file), 600) as longer:
        before, after = read_model(file).spec, read_model(longer).spec
        assert len(Path(longer).read_bytes()) == file.stat().st_size
    assert (before.max_position, after.max_position) == (TRAINED, 600)
    assert replace(after, max_position=TRAINED) == before


def test_the_command(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sink_perplexity, "collect_docs", lambda: {"queue": [("Queue", "Return the number. " * 300)]})
    files = ("--output-json", str(tmp_path / "record.json"), "--plot", str(tmp_path / "plot.png"))
    monkeypatch.setattr(sys, "argv", ["sink_perplexity.py", "--num-tokens", "700", "--window", "60", *files])
    sink_perplexity.main()
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert record == json.loads((tmp_path / "record.json").read_text())
    assert lines[-2] == record["attention"] == verdict(record["attention_mass"])
    assert [line.split()[0] for line in lines if line.split()[0] in record["running"]] == [*record["running"]]
    check_record(record)
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    page = render([Record("record.json", record)]).split("## Attention sinks\n")[1].split("\n## ")[0]
    assert "| recomputed | 0 | 64 | 16 |" in page and record["attention"] in page


def check_record(record: dict) -> None:
    """Asserts that blocks of the text make up the whole."""
    total, trained, size = record["num_tokens"], record["trained_length"], record["block_tokens"]
    sizes = [min(size, total - start) for start in range(0, total, size)]
    assert [row["variant"] for row in record["rows"]] == ["sinks", "window", "recomputed", "full"]
    for row in record["rows"]:
        running = record["running"][row["variant"]]
        by_block = sum(math.log(block) * n for block, n in zip(running, sizes, strict=True))
        parts = math.log(row["perplexity_within"]) * trained + math.log(row["perplexity_past"]) * (total - trained)
        assert by_block == pytest.approx(parts, rel=1e-3)
        cached = row["sinks"] + (row["window"] or 0)
        assert cached == (0 if row["variant"] == "full" else record["rows"][0]["sinks"] + record["rows"][0]["window"])


@pytest.mark.parametrize("name, num_tokens", [("sink_perplexity", 20_000), ("sink_perplexity_smollm2_135m", 10_000)])
def test_records_are_of_long_texts_and_say_what_their_figures_say(name, num_tokens):
    record = json.loads((ROOT / f"benchmarks/{name}.json").read_text())
    check_record(record)
    assert record["num_tokens"] >= num_tokens and ("none of" in record["text"]) == (record["model"] == "demo")
    assert record["attention"] == verdict(record["attention_mass"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-tokens", "0"), "--num-tokens 0: expected a positive number"),
        (("--num-tokens", "40", "--window", "600"), "attention_window=600 are 604 tokens"),
    ],
)
def test_mistakes_are_named(options, message, monkeypatch):
    monkeypatch.setattr(sink_perplexity, "collect_docs", lambda: DOCS)
    monkeypatch.setattr(sys, "argv", ["sink_perplexity.py", *options])
    with pytest.raises(ValueError, match=message):
        sink_perplexity.main()
