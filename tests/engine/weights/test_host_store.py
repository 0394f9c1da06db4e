"""Loading against an independent oracle: the safetensors library and slices, for every rank."""

import json
import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from penstock.engine.model.families import read_config, read_spec, tensor_names
from penstock.engine.model.layout import expected_tensors, model_layout
from penstock.engine.model.shard import Piece
from penstock.engine.weights import blocks as blocks_module
from penstock.engine.weights import span_memory
from penstock.engine.weights.checkpoint import Checkpoint
from penstock.engine.weights.dummy import DummyWeights
from penstock.engine.weights.host_arena import HostArena
from penstock.engine.weights.host_store import load_weights
from penstock.engine.weights.views import views
from safetensors.torch import load_file, save_file

from tests.support.layouts import by_group

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 131,
}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 2, "mlp_bias": True, "attention_bias": True}),
    "qwen2-tied": ("Qwen2ForCausalLM", "Qwen2Config", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
}


def shuffle_files(directory):
    """Renames the shards, so that neither their names nor the index tell the tensors' order."""
    index_file = directory / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    names = sorted(set(index["weight_map"].values()))
    new_names = dict(
        zip(names, random.Random(0).sample([f"part-{i}.safetensors" for i in range(len(names))], len(names)))
    )
    for name, new_name in new_names.items():
        (directory / name).rename(directory / new_name)
    items = [(tensor, new_names[name]) for tensor, name in index["weight_map"].items()]
    random.Random(1).shuffle(items)
    index_file.write_text(json.dumps({"weight_map": dict(items)}))
    return len(names)


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """A tiny checkpoint in shuffled shards, as (directory, ModelSpec, TensorNames, tensors as the library reads
    them)."""
    directory = tmp_path_factory.mktemp(request.param)
    model_class, config_class, extra = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**SIZES, **extra)
    model = getattr(transformers, model_class)(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # biases and norms too, else a lost one would not show
    model.save_pretrained(directory, max_shard_size="20KB")
    assert shuffle_files(directory) > 3
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    spec = read_spec(read_config(directory), str(directory))
    return directory, spec, tensor_names(spec), tensors


def oracle(weight, tensors, dtype):
    expected = torch.zeros(weight.shape, dtype=dtype)
    flat = expected.view(expected.shape[0], -1)
    for p in weight.pieces:
        source = tensors[p.tensor].view(tensors[p.tensor].shape[0], -1)
        part = source[p.row : p.row + p.num_rows, p.col : p.col + p.num_cols]
        flat[p.to_row : p.to_row + p.num_rows, p.to_col : p.to_col + p.num_cols] = part.to(dtype)
    return expected


def piece_bytes(layout, itemsize):
    pieces = [piece for group in (*layout.groups, layout.embed) for weight in group.weights for piece in weight.pieces]
    return sum(piece.num_rows * piece.num_cols for piece in pieces) * itemsize


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_bytes", [1, 1000, 2**23])
def test_spans_equal_the_library_for_every_rank(saved, monkeypatch, dtype, block_bytes):
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", block_bytes)
    directory, spec, names, tensors = saved
    for tp_size in (1, 2, 4):
        for rank in range(tp_size):
            layout = model_layout(spec, names, dtype, tp_size, rank)
            streamed = {group.id for group in layout.groups[rank % 2 :: 2]}
            progress = []
            with Checkpoint.open(directory) as source:
                source.check(expected_tensors(spec, names), names.ignorable)
                embed_on_host = rank % 2 == 0
                loaded = load_weights(source, layout, streamed, embed_on_host, CPU, 2, progress.append)
            on_host = streamed | ({layout.embed.id} if embed_on_host else set())
            assert set(loaded.host_spans) == on_host
            assert loaded.bytes_read == piece_bytes(layout, itemsize=4)
            assert sum(progress) == layout.nbytes
            assert loaded.host_bytes == sum(g.nbytes for g in (*layout.groups, layout.embed) if g.id in on_host)
            assert loaded.host_bytes + loaded.resident_bytes == layout.nbytes
            for group in (*layout.groups, layout.embed):
                span = (loaded.host_spans if group.id in on_host else loaded.resident)[group.id]
                assert span.dtype == torch.uint8 and span.shape == (group.nbytes,)
                assert span.data_ptr() % 256 == 0 or group.nbytes == 0
                found = views(group, span)
                assert list(found) == [weight.name for weight in group.weights]
                for weight in group.weights:
                    expected = oracle(weight, tensors, getattr(torch, dtype))
                    assert torch.equal(found[weight.name], expected), (group.id, weight.name)
            loaded.close()
            assert loaded.host_spans == {} and loaded.resident == {}


def test_nothing_streams_or_everything_does(saved):
    directory, spec, names, _ = saved
    layout = model_layout(spec, names, "float32", 1, 0)
    for streamed, on_host in ((set(), False), (set(by_group(layout)), True)):
        with Checkpoint.open(directory) as source:
            loaded = load_weights(source, layout, streamed, on_host, CPU)
        assert loaded.host_bytes == (layout.nbytes if on_host else 0)
        assert loaded.resident_bytes == (0 if on_host else layout.nbytes)
        loaded.close()


def test_views_share_the_memory_of_the_span(saved):
    _, spec, names, _ = saved
    group = model_layout(spec, names, "bfloat16", 2, 1).groups[1]
    span = torch.zeros(group.nbytes, dtype=torch.uint8)
    views(group, span)["down"].fill_(1.0)
    part = next(weight for weight in group.weights if weight.name == "down").parts[0]
    assert span.nonzero().min() >= part.offset and span[part.offset : part.offset + part.nbytes].any()


def test_an_error_in_a_thread_is_raised_and_frees_the_arenas(saved, monkeypatch):
    directory, spec, names, _ = saved
    closed = []
    whole_close = HostArena.close
    monkeypatch.setattr(HostArena, "close", lambda arena: (closed.append(arena), whole_close(arena)))

    class Broken(DummyWeights):
        def read_piece(self, piece, out):
            if piece.tensor == names.final_norm + ".weight":
                raise ValueError("no such luck")
            return super().read_piece(piece, out)

    layout = model_layout(spec, names, "float32", 1, 0)
    source = Broken(expected_tensors(spec, names))
    with pytest.raises(ValueError, match="no such luck"):
        load_weights(source, layout, {layout.groups[0].id}, True, CPU)
    assert len(closed) == 2


def test_nothing_is_allocated_before_the_checkpoint_is_checked(saved, monkeypatch):
    """Opens a checkpoint with a missing tensor: it is refused before there is a source that load_weights could take."""
    directory, spec, names, _ = saved
    monkeypatch.setattr(span_memory, "HostArena", lambda *_: pytest.fail("allocated"))
    expected = expected_tensors(spec, names) | {"one.more": (3,)}
    with Checkpoint.open(directory) as source, pytest.raises(ValueError, match=r"missing .*: one\.more$"):
        source.check(expected, names.ignorable)
        load_weights(source, model_layout(spec, names, "float32", 1, 0), set(), True, CPU)


def test_nan_in_a_weight_is_warned_of(saved, tmp_path):
    _, spec, names, tensors = saved
    bad = {name: tensor.clone() for name, tensor in tensors.items()}
    down = names.layer(1)["down"] + ".weight"
    bad[down][3, 7] = math.nan
    save_file(bad, tmp_path / "model.safetensors")
    layout = model_layout(spec, names, "bfloat16", 2, 0)
    with (
        Checkpoint.open(tmp_path) as source,
        pytest.warns(UserWarning, match=f"{down} has NaN"),
    ):
        load_weights(source, layout, set(by_group(layout)), True, CPU).close()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_staging_buffers_are_zeroed_and_never_reused_in_flight(saved, monkeypatch, num_threads):
    """Takes the way of CUDA with a late link: a copy is done when its event is waited for, not before."""
    directory, spec, names, tensors = saved
    layout = model_layout(spec, names, "float32", 2, 1)
    pending = threading.local()

    class LateEvent:
        copies = ()

        def record(self, stream):
            self.copies, pending.copies = pending.copies, []

        def synchronize(self):
            for destination, staged in self.copies:
                destination.copy_(staged)
            self.copies = ()
            pending.copies = []

    whole_copy, events = torch.Tensor.copy_, []

    def late_copy(destination, source, non_blocking=False):
        if non_blocking:
            pending.copies.append((destination, source))
            return destination
        return whole_copy(destination, source)

    def make_event():
        events.append(LateEvent())
        return events[-1]

    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(span_memory, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(torch.Tensor, "copy_", late_copy)
    monkeypatch.setattr(torch.cuda, "Event", make_event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: [event.synchronize() for event in events])
    monkeypatch.setattr(HostArena, "register", lambda arena: arena.tensor.fill_(255))
    groups = (*layout.groups, layout.embed)
    memory, staging = span_memory.CudaSpans(groups, frozenset(), CPU), span_memory.Staging(CPU, num_threads)
    with Checkpoint.open(directory) as source, ThreadPoolExecutor(num_threads) as threads:
        for group in groups:
            for block in blocks_module.cut_blocks(group):
                threads.submit(staging.load, block, source, memory.spans[group.id])
    staging.close()
    memory.finish()
    for group in groups:
        for weight in group.weights:
            expected = oracle(weight, tensors, torch.float32)
            assert torch.equal(views(group, memory.spans[group.id])[weight.name], expected), weight.name


def test_dummy_weights_do_not_depend_on_ranks_or_threads(saved):
    _, spec, names, _ = saved
    shapes = expected_tensors(spec, names)
    whole = {}
    for name, shape in shapes.items():
        num_cols = math.prod(shape[1:])
        whole[name] = torch.empty(shape, dtype=torch.bfloat16)
        piece = Piece(name, 0, shape[0], 0, num_cols, 0)
        DummyWeights(shapes).read_piece(piece, whole[name].view(shape[0], num_cols))
    for tp_size, rank, num_threads in ((1, 0, 1), (2, 1, 3), (4, 0, 2), (4, 3, 2)):
        layout = model_layout(spec, names, "bfloat16", tp_size, rank)
        loaded = load_weights(DummyWeights(shapes), layout, set(by_group(layout)), True, CPU, num_threads)
        assert loaded.bytes_read == 0
        for group in (*layout.groups, layout.embed):
            for weight in group.weights:
                found = views(group, loaded.host_spans[group.id])[weight.name]
                assert torch.equal(found, oracle(weight, whole, torch.bfloat16)), (tp_size, rank, weight.name)
