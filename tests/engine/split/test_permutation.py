"""Permuted split executions: they have the tokens and transfers of unpermuted ones, and the device side sees another
order."""

import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import penstock.engine.split.permutation
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from penstock.engine.llm import LLM
from penstock.engine.split.channel import InProcess
from penstock.engine.split.llm import SplitLLM
from penstock.engine.split.permutation import NOTICE, permutation
from penstock.engine.split.transfers import ATTENTION_WAYS, FUSED, PERMUTED, REPEATED, SCORES, SplitConfig
from penstock.parallel.ledger import Site
from penstock.scheduler.batching.batch import Batch
from penstock.scheduler.batching.request import SamplingParams
from torch import Tensor

from tests.support.oracle.checkpoints import write_checkpoint
from tests.support.oracle.compare import relative_difference
from tests.support.rounding import LOUD, assert_apart
from tests.support.split_runs import OPTIONS, apart, generate, split
from tests.support.watches import BeginPass

ROOT = Path(__file__).parents[3]
KEY = bytes(range(100, 120))
ALL = "rows,head_dim"
VARIANTS = ("llama_biases", "mistral_window", "qwen3", "neox_parallel", "neox_serial")
PERMUTED_WAYS = [(variant, FUSED) for variant in VARIANTS] + [
    (variant, way) for variant in ("mistral_window", "neox_parallel") for way in (SCORES, REPEATED)
]
SIZE = 64  # so large that two permutations are never equal by chance

sites = st.builds(Site, st.sampled_from(["attn_qkv", "ffn_up", "attention_scores"]), st.integers(-1, 200))
inputs = st.tuples(st.binary(min_size=16, max_size=40), st.integers(0, 2**40), sites, st.integers(0, 2**20))


@given(inputs, st.integers(1, 300))
def test_a_permutation_is_one_and_is_the_same_again(given_inputs, size):
    order = permutation(*given_inputs, size)
    assert sorted(order.tolist()) == list(range(size))
    assert torch.equal(order, permutation(*given_inputs, size))


@given(inputs, inputs)
@settings(max_examples=50)
def test_other_inputs_give_other_permutations(one, other):
    assert (one == other) == torch.equal(permutation(*one, SIZE), permutation(*other, SIZE))


@given(inputs, st.integers(0, 3), st.data())
@settings(max_examples=50)
def test_each_input_counts(one, index, data):
    other = list(one)
    other[index] = data.draw(inputs.map(lambda drawn: drawn[index]).filter(lambda value: value != one[index]))
    assert not torch.equal(permutation(*one, SIZE), permutation(*other, SIZE))


def test_permutations_of_three_are_equally_frequent():
    orders = Counter(tuple(permutation(KEY, request, Site("ffn_up", 0), 0, 3).tolist()) for request in range(3000))
    assert len(orders) == 6 and all(400 < count < 600 for count in orders.values())  # 500 +- 20.4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The directory of a variant's checkpoint, written once."""
    folder, written = tmp_path_factory.mktemp("checkpoints"), set()

    def write(variant: str) -> str:
        if variant not in written:
            write_checkpoint(folder / variant, variant)
            written.add(variant)
        return str(folder / variant)

    return write


@pytest.fixture(scope="module")
def plain(checkpoint):
    """Tokens and logits of the plain engine, made once for each checkpoint."""
    found = {}

    def run(variant: str):
        if variant not in found:
            with LLM(checkpoint(variant), device="cpu", **OPTIONS) as llm:
                found[variant] = generate(llm)
        return found[variant]

    return run


@pytest.mark.tolerance
@pytest.mark.parametrize(("variant", "attention"), PERMUTED_WAYS)
def test_tokens_are_the_plain_engines(variant, attention, checkpoint, plain):
    with split(checkpoint(variant), attention=attention, permute=ALL) as llm:
        tokens, logits = generate(llm)
        assert_apart(relative_difference(logits, plain(variant)[1]), apart(llm))
    assert torch.equal(tokens, plain(variant)[0])


def test_sampled_sequences_of_a_prompt_are_the_plain_engines():
    params = SamplingParams(temperature=0.9, top_p=0.9, seed=5, repetition_penalty=1.2, max_tokens=12, n=3)
    asked = (["Return the", "Raise an error"], params)
    with LLM("demo", device="cpu", dtype="float32", max_num_seqs=4) as llm:
        expected = llm.generate(*asked)
    with SplitLLM("demo", SplitConfig(permute=ALL), dtype="float32", max_num_seqs=4) as llm:
        assert llm.generate(*asked) == expected


@pytest.mark.parametrize("attention", ATTENTION_WAYS)
def test_calls_and_bytes_are_those_of_an_unpermuted_run(attention, checkpoint):
    with split(checkpoint("llama_biases"), attention=attention) as llm:
        generate(llm)
        unpermuted = llm.counted
    with split(checkpoint("llama_biases"), attention=attention, permute=ALL) as llm:
        generate(llm)
        assert llm.counted == llm.predicted == unpermuted
        assert unpermuted.total.num_calls > 100


class Call(NamedTuple):
    """A call as the device side saw it, and the batch whose pass it belongs to."""

    batch: Batch
    site: Site
    tensors: list[Tensor]


def watch(llm: SplitLLM) -> list[Call]:
    """The device side's calls from now on."""
    calls, batches = [], []
    channel = llm.engine.worker.channel
    device_side = (channel if isinstance(channel, InProcess) else channel.channel).device_side
    run = device_side.run

    def watched_run(site: Site, tensors: list[Tensor]) -> Tensor:
        calls.append(Call(batches[-1], site, [tensor.clone() for tensor in tensors]))
        return run(site, tensors)

    device_side.run = watched_run
    llm.engine.watches.add(BeginPass(batches.append))
    return calls


# Which permutation of head_dim each tensor of an attention call is put in.
OF_HEAD_DIM = {
    "attention": ("attention_scores", "attention_scores", "attention_values"),
    "attention_scores": ("attention_scores", "attention_scores"),
    "attention_values": (None, "attention_values"),
}


def put_in_order(call: Call, permute: str, index: int, numbers: dict[int, int]) -> list[Tensor]:
    """The tensors that the device side has to see of an unpermuted call; `index` is that of the row that attends.
    `numbers` are those of the requests, by row."""
    operation, layer_idx = call.site
    if operation in OF_HEAD_DIM and "head_dim" in permute:
        row = call.batch.rows[index]
        orders = [
            name and permutation(KEY, numbers[row.index], Site(name, layer_idx), row.start, call.tensors[1].shape[-1])
            for name in OF_HEAD_DIM[operation]
        ]
        return [t if order is None else t[..., order] for t, order in zip(call.tensors, orders, strict=True)]
    if operation in (*OF_HEAD_DIM, "head") or "rows" not in permute:
        return call.tensors
    (tensor,) = call.tensors
    parts = tensor.split([len(row.tokens) for row in call.batch.rows])
    orders = [permutation(KEY, numbers[row.index], call.site, row.start, len(row.tokens)) for row in call.batch.rows]
    return [torch.cat([part[order] for part, order in zip(parts, orders, strict=True)])]


@pytest.mark.parametrize("attention", [SCORES, FUSED])
@pytest.mark.parametrize("permute", ["rows", "head_dim", pytest.param(ALL, marks=pytest.mark.tolerance)])
def test_the_device_side_sees_each_requests_rows_and_dims_permuted(permute, attention, checkpoint):
    """Compares each call with the unpermuted one, put in order. Requests have numbers as they come in the first pass,
    and keep their rows."""
    with split(checkpoint("qwen3"), attention=attention) as llm:
        clear = watch(llm)
        generate(llm)
    with split(checkpoint("qwen3"), attention=attention, permute=permute, permute_key=KEY.hex()) as llm:
        seen, bound = watch(llm), apart(llm)
        generate(llm)
    num_attended, changed = Counter(), Counter()
    numbers = {row: number for number, row in enumerate(dict.fromkeys(r.index for c in clear for r in c.batch.rows))}
    for call, other in zip(clear, seen, strict=True):
        assert (call.batch, call.site) == (other.batch, other.site)
        attends = (id(call.batch), call.site)
        for tensor, expected, found in zip(
            call.tensors, put_in_order(call, permute, num_attended[attends], numbers), other.tensors, strict=True
        ):
            largest = float(expected.abs().max())
            assert_apart((found - expected).abs().max(), bound * largest)
            changed[call.site.operation] += bool((found - tensor).abs().max() > LOUD * bound * largest)
        num_attended[attends] += 1
    row_wise = {"embedding", "attn_qkv", "attn_output", "ffn_up", "ffn_down"} if "rows" in permute else set()
    attention_calls = {"attention"} if attention == FUSED else {"attention_scores", "attention_values"}
    assert {name for name, count in changed.items() if count} == row_wise | (
        attention_calls if "head_dim" in permute else set()
    )


def ids_seen(llm: SplitLLM, *prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """Tokens that each pass of more than one token sent to the embedding, in runs one after the other."""
    calls = watch(llm)
    for several in prompts:
        llm.generate(several, SamplingParams(temperature=0, max_tokens=1, n=2))
    return [tuple(call.tensors[0].tolist()) for call in calls if call.site.operation == "embedding"]


def test_no_two_requests_chunks_or_runs_share_a_permutation():
    """Generates for a prompt of 120 tokens as 3 requests of 2 sequences each, in chunks of 60, and once more; then with
    another key."""
    options = {"max_num_batched_tokens": 60, "max_num_seqs": 8, "max_model_len": 200, "enable_prefix_caching": False}
    prompt = [*range(100, 160)] * 2  # chunks are alike, and no token is there twice in one
    seen = []
    for _ in range(2):
        with SplitLLM("demo", SplitConfig(permute="rows"), **options) as llm:
            seen += ids_seen(llm, [prompt] * 3, [prompt])
    assert len(seen) == 2 * (3 + 1) * 2 * 2
    assert all(sorted(ids) == prompt[:60] for ids in seen)
    assert len(set(seen)) == len(seen)


def test_a_given_key_gives_the_same_permutations_again():
    seen = []
    for key in (KEY.hex(), KEY.hex(), bytes(16).hex()):
        with SplitLLM("demo", SplitConfig(permute="rows", permute_key=key), max_model_len=100) as llm:
            seen.append(ids_seen(llm, [[*range(100, 160)]]))
    assert seen[0] == seen[1] != seen[2]


def test_every_site_has_a_permutation_of_its_own(monkeypatch):
    drawn = {}

    def recorded(key, request, site, start, size):
        order = permutation(key, request, site, start, size)
        drawn.setdefault((request, site, start), order)
        return order

    monkeypatch.setattr(penstock.engine.split.permutation, "permutation", recorded)
    with SplitLLM("demo", SplitConfig(permute=ALL), max_model_len=100) as llm:
        llm.generate([[*range(100, 132)]], SamplingParams(temperature=0, max_tokens=1))  # as many as there are dims
    assert {len(order) for order in drawn.values()} == {32}
    assert len({tuple(order.tolist()) for order in drawn.values()}) == len(drawn) == 1 + 4 * 6


class Kept:
    """A stand-in for a pipe or a socket that keeps what is sent."""

    def __init__(self, inner, told: list[bytes]):
        self._inner, self._told = inner, told

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def write(self, data: bytes) -> None:
        self._told.append(bytes(data))
        self._inner.write(data)

    def sendall(self, data: bytes) -> None:
        self._told.append(bytes(data))
        self._inner.sendall(data)


def test_the_key_does_not_reach_the_device_process(monkeypatch):
    """Keeps all that the device side is told: its command, environment and input, and all frames."""
    told = []

    class Popen(subprocess.Popen):
        def __init__(self, command, **options):
            super().__init__(command, **options)
            told.append(repr((command, options)).encode())
            self.stdin = Kept(self.stdin, told)

    monkeypatch.setattr("penstock.engine.split.device_process.subprocess.Popen", Popen)
    asked = [[*range(100, 140)]], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    options = {"dtype": "float32", "max_model_len": 100}
    with SplitLLM("demo", SplitConfig(permute=ALL, permute_key=KEY.hex(), process=True), **options) as llm:
        channel = llm.engine.worker.channel.channel
        channel._connection = Kept(channel._connection, told)
        output = llm.generate(*asked)
        assert llm.predicted == llm.counted
        sent_bytes = llm.counted.total.sent_bytes
    everything = b"".join(told)
    assert b'"wire_dtype"' in everything and len(everything) > sent_bytes
    assert KEY not in everything and KEY.hex().encode() not in everything
    with SplitLLM("demo", SplitConfig(permute=ALL, permute_key=KEY.hex()), **options) as llm:
        assert llm.generate(*asked) == output


def test_a_key_is_drawn_for_each_engine(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "penstock.engine.split.host_side.secrets.token_bytes", lambda size: asked.append(size) or bytes(size)
    )
    for _ in range(2):
        SplitLLM("demo", SplitConfig(permute="rows")).close()
    SplitLLM("demo", SplitConfig(permute="rows", permute_key=KEY.hex())).close()
    assert asked == [32, 32]


def test_who_does_not_permute_has_no_such_channel():
    with SplitLLM("demo") as llm:
        assert isinstance(llm.engine.worker.channel, InProcess)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"permute": "dims"}, "permute='dims'"),
        ({"permute": ""}, "permute=''"),
        ({"permute": "rows,"}, "permute='rows,'"),
        ({"permute": 3}, "permute=3"),
        ({"permute": ["rows", ["head_dim"]]}, "permute="),
        ({"permute_key": KEY.hex()}, "permute_key: nothing is permuted"),
        ({"permute": "rows", "permute_key": KEY[:15].hex()}, "permute_key: 15 bytes, expected at least 16"),
        ({"permute": "rows", "permute_key": "5ec4e7" * 6 + "0"}, "permute_key: expected hex digits, an even number"),
        ({"permute": "rows", "permute_key": 12}, "permute_key: expected"),
    ],
)
def test_what_cannot_be_meant_is_refused_without_showing_the_key(wrong, message):
    with pytest.raises(ValueError) as refused:
        SplitConfig(**wrong)
    assert str(refused.value).startswith(message)
    assert "5ec4e7" not in str(refused.value) and KEY[:15].hex() not in str(refused.value)


def test_names_are_kept_in_one_order_and_the_key_is_not_shown():
    assert SplitConfig(permute="head_dim,rows").permute == SplitConfig(permute=["rows", "head_dim"]).permute
    assert SplitConfig(permute="head_dim,rows").permute == tuple(PERMUTED) == ("rows", "head_dim")
    assert KEY.hex() not in repr(SplitConfig(permute="rows", permute_key=KEY.hex()))


def test_it_is_said_plainly_what_this_is():
    docs = (ROOT / "docs" / "systems.md").read_text().split("## Permuted split execution")[1]
    for text in (penstock.engine.split.permutation.__doc__, NOTICE, docs):
        words = " ".join(text.lower().split())
        assert "obfuscation" in words and "not confidentiality" in words and "97 to 100 %" in words
