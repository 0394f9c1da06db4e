"""Split executions give what the plain engine gives and move what was predicted, in all families, wires and
channels."""

import socket

import pytest
import torch
from penstock.engine.llm import LLM
from penstock.engine.split import frames
from penstock.engine.split.llm import SplitLLM
from penstock.engine.split.transfers import FUSED, REPEATED, SCORES, SplitConfig
from penstock.parallel.ledger import Site
from penstock.scheduler.batching.request import SamplingParams

from tests.support.gguf_models import write_model
from tests.support.oracle.checkpoints import write_checkpoint
from tests.support.oracle.compare import choices, relative_difference, shared_prefix
from tests.support.rounding import assert_apart
from tests.support.split_runs import OPTIONS, apart, generate, split

VARIANTS = ("llama_biases", "llama_mqa", "llama_odd_sizes", "mistral_window", "qwen2_tied", "qwen3", "neox_parallel")
SERIAL = "neox_serial"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The directory of a variant's checkpoint, written once."""
    folder, written = tmp_path_factory.mktemp("checkpoints"), set()

    def write(variant: str, dtype: str = "float32") -> str:
        path = folder / f"{variant}-{dtype}"
        if path not in written:
            write_checkpoint(path, variant, dtype)
            written.add(path)
        return str(path)

    return write


@pytest.fixture(scope="module")
def plain(checkpoint):
    """Tokens and logits of the plain engine, made once for each checkpoint."""
    found = {}

    def run(variant: str, dtype: str = "float32"):
        if (variant, dtype) not in found:
            with LLM(checkpoint(variant, dtype), device="cpu", **OPTIONS) as llm:
                found[variant, dtype] = generate(llm)
        return found[variant, dtype]

    return run


@pytest.mark.parametrize("variant", [*VARIANTS, SERIAL])
def test_fused_attention_gives_the_plain_engine_to_the_last_bit(variant, checkpoint, plain):
    with split(checkpoint(variant), attention=FUSED) as llm:
        tokens, logits = generate(llm)
        assert llm.predicted == llm.counted
        assert llm.counted.operation("head").num_calls > 8
    assert torch.equal(tokens, plain(variant)[0]) and torch.equal(logits, plain(variant)[1])


@pytest.mark.tolerance
@pytest.mark.parametrize("attention", [SCORES, REPEATED])
@pytest.mark.parametrize("variant", VARIANTS)
def test_softmax_on_the_host_side_gives_the_same_tokens(variant, attention, checkpoint, plain):
    with split(checkpoint(variant), attention=attention) as llm:
        tokens, logits = generate(llm)
        assert llm.predicted == llm.counted
        assert_apart(relative_difference(logits, plain(variant)[1]), apart(llm))
    assert torch.equal(tokens, plain(variant)[0])


@pytest.mark.tolerance
@pytest.mark.parametrize("attention", [SCORES, FUSED])
@pytest.mark.parametrize("variant", ["llama_biases", "neox_parallel"])
def test_a_bfloat16_wire_stays_within_its_rounding(variant, attention, checkpoint, plain):
    tokens, logits = plain(variant)
    with split(checkpoint(variant), attention=attention, wire_dtype="bfloat16") as llm:
        own_tokens, own_logits = generate(llm)
        assert llm.predicted == llm.counted
        exact, bound = apart(llm), apart(llm, torch.bfloat16)
    same = shared_prefix(own_tokens, tokens)
    difference = relative_difference(own_logits, logits)[same]
    assert_apart(difference, bound)
    assert difference.max() > 20 * exact, "nothing was rounded on the wire"
    chosen = choices(own_tokens, logits)
    assert not (chosen.differ & same & (chosen.gaps > 2 * bound)).any()


def test_a_bfloat16_wire_costs_a_bfloat16_model_nothing(checkpoint, plain):
    variant = "llama_biases"
    with split(checkpoint(variant, "bfloat16"), attention=FUSED, wire_dtype="bfloat16") as llm:
        tokens, logits = generate(llm)
    assert torch.equal(tokens, plain(variant, "bfloat16")[0]) and torch.equal(logits, plain(variant, "bfloat16")[1])


def test_sampling_penalties_and_stops_are_the_plain_engines():
    params = SamplingParams(temperature=0.9, top_p=0.9, seed=5, repetition_penalty=1.2, max_tokens=12, n=2, logprobs=1)
    asked = (["Return the", "Raise an error"], params)
    with LLM("demo", device="cpu", max_num_seqs=4) as llm, split("demo", attention=FUSED) as other:
        assert llm.generate(*asked) == other.generate(*asked)


@pytest.mark.parametrize(("arch", "process"), [("llama", False), ("qwen2", False), ("qwen3", True)])
def test_a_gguf_model_is_split_into_the_plain_engines_floats(tmp_path, arch, process):
    """Of embeddings that are quantised too, tied and not, with biases and norms of heads."""
    file = tmp_path / "m.gguf"
    write_model(file, arch)
    options = OPTIONS | {"dtype": "float32"}
    with LLM(str(file), device="cpu", **options) as llm:
        expected = generate(llm)
    with SplitLLM(str(file), SplitConfig(attention=FUSED, process=process), **options) as llm:
        found = generate(llm)
        assert llm.predicted == llm.counted
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_the_host_side_holds_norms_and_the_device_side_all_else(checkpoint):
    with split(checkpoint("qwen3")) as llm:
        views = llm.engine.worker.executor.views.values()
        assert {name for group in views for name in group} == {
            "attn_norm",
            "ffn_norm",
            "final_norm",
            "q_norm",
            "k_norm",
        }
        device_side = llm.engine.worker.channel.device_side
        assert {name for _, group in device_side._linear.values() for name in group} == {
            *("qkv", "o", "gate_up", "down", "head")
        }


class CountingSocket:
    """Stands between a channel and its socket."""

    def __init__(self, connection):
        self.connection, self.sent_bytes, self.received_bytes = connection, 0, 0
        self.close, self.settimeout = connection.close, connection.settimeout

    def sendall(self, data) -> None:
        self.connection.sendall(data)
        self.sent_bytes += len(data)

    def recv_into(self, buffer) -> int:
        received = self.connection.recv_into(buffer)
        self.received_bytes += received
        return received


def test_a_process_of_its_own_gives_the_same_bits_and_the_same_ledger(checkpoint, plain, monkeypatch):
    headers = {"sent": 0, "received": 0}
    pack, receive_header = frames.Header.pack, frames.receive_header

    def counted_pack(header):
        packed = pack(header)
        headers["sent"] += len(packed)
        return packed

    def counted_receive(connection):
        counting = channel._connection
        before = counting.received_bytes
        header = receive_header(connection)
        headers["received"] += counting.received_bytes - before
        return header

    with split(checkpoint("neox_parallel"), attention=FUSED, process=True) as llm:
        channel = llm.engine.worker.channel
        process, channel._connection = channel._process.process, CountingSocket(channel._connection)
        monkeypatch.setattr(frames.Header, "pack", counted_pack)
        monkeypatch.setattr("penstock.engine.split.channel.receive_header", counted_receive)
        tokens, logits = generate(llm)
        crossed, counted = channel._connection, llm.counted.total
        assert llm.predicted == llm.counted
        assert crossed.sent_bytes - headers["sent"] == counted.sent_bytes
        assert crossed.received_bytes - headers["received"] == counted.received_bytes
        assert headers["sent"] < 74 * counted.num_calls
    assert process.returncode == 0
    assert torch.equal(tokens, plain("neox_parallel")[0]) and torch.equal(logits, plain("neox_parallel")[1])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
def test_a_frame_comes_out_as_it_went_in(dtype):
    one, other = socket.socketpair()
    tensors = [torch.arange(12).view(3, 4).to(dtype).t(), torch.ones(1, dtype=dtype)]
    with one, other:
        frames.send(one, Site("attn_qkv", -1), tensors)
        header = frames.receive_header(other)
        assert header == frames.Header.of(Site("attn_qkv", -1), tensors)
        received = frames.receive_tensors(other, header)
        one.close()
        with pytest.raises(EOFError):
            frames.receive_header(other)
    assert all(torch.equal(a, b) for a, b in zip(tensors, received, strict=True))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SplitLLM("demo", tensor_parallel_size=2), "tensor_parallel_size=2: a split execution always has 1"),
        (lambda: SplitLLM("demo", device="cuda"), "device='cuda': a split execution always has 'cpu'"),
        (lambda: SplitLLM("demo", "fused"), "split='fused': expected a SplitConfig"),
        (lambda: SplitConfig(process="yes"), "process='yes': expected True or False"),
        (lambda: SplitConfig(timeout_s=0), "timeout_s=0: expected seconds, above 0"),
        (lambda: SplitConfig(timeout_s=True), "timeout_s=True: expected seconds"),
        (lambda: SplitConfig(timeout_s=float("nan")), "timeout_s=nan: expected seconds"),
        (lambda: SplitConfig(timeout_s="60"), "timeout_s='60': expected seconds"),
    ],
)
def test_what_a_split_execution_does_not_take_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
