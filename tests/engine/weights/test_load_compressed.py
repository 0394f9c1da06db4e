"""Loading with compressed groups: they decompress to what a plain load holds, and memory holds their blobs and no
more."""

import contextlib
import threading
from mmap import PAGESIZE

import pytest
import torch
from penstock.engine.model.compressed_size import planned_bytes
from penstock.engine.model.families import read_spec, tensor_names
from penstock.engine.model.layout import ModelLayout, expected_tensors, model_layout
from penstock.engine.model.shard import pad_to
from penstock.engine.weights import host_store
from penstock.engine.weights.dummy import DummyWeights
from penstock.engine.weights.host_arena import HostArena
from penstock.engine.weights.host_store import LoadedWeights, load_weights
from penstock.engine.weights.span_memory import HostSpans
from penstock.scheduler.passes.pass_plan import GroupId

from tests.support.kernel_proof import DEVICE
from tests.support.layouts import by_group

CPU = torch.device("cpu")
CONFIG = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
    "attention_bias": True,
}


class RandomBits(DummyWeights):
    """Weights that never shrink."""

    def read_piece(self, piece, out):
        generator = torch.Generator().manual_seed(piece.row)
        out.view(torch.int16).random_(-0x8000, 0x8000, generator=generator)
        return 0


def model(tp_size: int = 1, rank: int = 0, source=DummyWeights, **changes) -> tuple[DummyWeights, ModelLayout]:
    spec = read_spec({**CONFIG, **changes, "dtype": "bfloat16"}, "test")
    names = tensor_names(spec)
    return source(expected_tensors(spec, names)), model_layout(spec, names, "bfloat16", tp_size, rank)


def groups_of(layout: ModelLayout):
    return (*layout.groups, layout.embed)


def spans_of(loaded: LoadedWeights) -> dict[GroupId, torch.Tensor]:
    return loaded.host_spans | loaded.resident


def assert_decompresses_to(loaded: LoadedWeights, plain: LoadedWeights, layout: ModelLayout) -> None:
    """Asserts that groups decompress to the plain ones, bit for bit; the gaps are zero."""
    found, expected = spans_of(loaded), spans_of(plain)
    for group in groups_of(layout):
        span = found[group.id]
        if group.id in loaded.compressed:
            compressed = loaded.compressed[group.id]
            assert len(span) == compressed.nbytes and span.dtype == torch.uint8
            decompressed = torch.zeros_like(expected[group.id], device=span.device)
            compressed.restore(span, decompressed, num_tokens=1)
            span = decompressed
        assert torch.equal(span.cpu(), expected[group.id].cpu()), group.id


@pytest.mark.parametrize("tp_size, rank", [(1, 0), (2, 1), (4, 3)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_mixed_loads_equal_plain_ones(tp_size, rank, tied, every):
    source, layout = model(tp_size, rank, tie_word_embeddings=tied)
    groups = groups_of(layout)
    streamed = {group.id for group in layout.groups[1:4]}
    compressed = {group.id for group in layout.groups[::every]}
    progress = []
    plain = load_weights(source, layout, streamed, True, CPU, 2)
    loaded = load_weights(source, layout, streamed, True, CPU, 2, progress.append, compressed=compressed)
    assert plain.compressed == {} and plain.compressed_from_bytes == plain.compress_s == 0
    assert set(loaded.compressed) == compressed and sum(progress) == layout.nbytes and min(progress) >= 0
    assert loaded.compressed_from_bytes == sum(group.nbytes for group in groups if group.id in compressed)
    assert 0 < loaded.compress_s < loaded.ended_at_s - loaded.began_at_s
    assert set(loaded.host_spans) == set(plain.host_spans) and set(loaded.resident) == set(plain.resident)
    assert_decompresses_to(loaded, plain, layout)
    assert loaded.host_bytes == sum(len(span) for span in loaded.host_spans.values())
    assert loaded.resident_bytes == sum(len(span) for span in loaded.resident.values())
    assert all(span.data_ptr() % 256 == 0 for span in spans_of(loaded).values() if len(span))
    if every == 1:
        assert loaded.host_bytes - layout.embed.nbytes < 0.8 * (plain.host_bytes - layout.embed.nbytes)
        full = [group for group in layout.groups if group.id.name != "ffn"]  # the others have zeros among weights
        assert all(loaded.compressed[group.id].nbytes <= planned_bytes(group) for group in full)
    loaded.close()
    assert loaded.host_spans == {} and loaded.resident == {}


def test_host_memory_is_asked_for_as_planned(monkeypatch):
    source, layout = model()
    asked = []
    monkeypatch.setattr(host_store, "check_host_memory", lambda *sizes: asked.append(sizes))
    compressed = {group.id for group in layout.groups[:2]}
    load_weights(source, layout, set(by_group(layout)), True, CPU, 2, ranks_on_host=3, compressed=compressed)
    plain = sum(group.nbytes for group in groups_of(layout) if group.id not in compressed)
    assert asked == [(plain + sum(planned_bytes(group) for group in layout.groups[:2]), 3)]


def test_blobs_larger_than_planned_are_kept():
    source, layout = model(source=RandomBits)
    compressed = set(by_group(layout))
    plain = load_weights(source, layout, compressed, True, CPU, 2)
    loaded = load_weights(source, layout, compressed, True, CPU, 2, compressed=compressed)
    assert_decompresses_to(loaded, plain, layout)
    largest = layout.groups[1]
    assert planned_bytes(largest) < loaded.compressed[largest.id].nbytes <= largest.nbytes


@pytest.mark.parametrize("fails", ["reading", "compressing"])
def test_an_error_frees_the_arenas(monkeypatch, fails):
    opened, closed = [], []
    whole_init, whole_close = HostArena.__init__, HostArena.close
    monkeypatch.setattr(
        HostArena, "__init__", lambda arena, *a, **k: (opened.append(arena), whole_init(arena, *a, **k))[1]
    )
    monkeypatch.setattr(HostArena, "close", lambda arena: (closed.append(arena), whole_close(arena)))

    class Broken(DummyWeights):
        def read_piece(self, piece, out):
            if "layers.1.mlp.up" in piece.tensor:
                raise ValueError("no such luck")
            return super().read_piece(piece, out)

    def broken(*_):
        raise ValueError("no such luck")

    source, layout = model(source=Broken if fails == "reading" else DummyWeights)
    if fails == "compressing":
        monkeypatch.setattr(host_store, "compress_group", broken)
    num_threads = torch.get_num_threads()
    with pytest.raises(ValueError, match="no such luck"):
        load_weights(source, layout, {layout.groups[0].id}, True, CPU, 2, compressed=set(by_group(layout)))
    assert len(opened) == 2 and set(map(id, opened)) == set(map(id, closed))
    assert all(arena.tensor.numel() == 0 for arena in opened) and torch.get_num_threads() == num_threads


def test_only_what_is_filled_is_registered_and_each_from_a_page_on(monkeypatch):
    registered, unregistered = [], []

    class Cudart:
        def cudaHostRegister(self, pointer, nbytes, flags):
            registered.append((pointer, nbytes))
            return 0

        def cudaHostUnregister(self, pointer):
            unregistered.append(pointer)
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    _, layout = model()
    first, second = (group.id for group in layout.groups[:2])
    spans = HostSpans(layout.groups[:3], compressed={first, second}, register=True)
    assert set(spans.spans) == {layout.groups[2].id} and spans.nbytes == layout.groups[2].nbytes
    plain, pointer = layout.groups[2], spans.spans[layout.groups[2].id].data_ptr()
    assert not registered
    spans.filled(plain.id)
    for group, nbytes in ((second, PAGESIZE + 512), (first, 256)):
        spans.keep(group, torch.full((nbytes,), 7, dtype=torch.uint8))
    spans.finish()
    assert spans.nbytes == plain.nbytes + PAGESIZE + 768
    pages = pad_to(plain.nbytes, PAGESIZE) // PAGESIZE
    firsts = [pointer, pointer + pages * PAGESIZE, pointer + (pages + 2) * PAGESIZE]
    assert registered == list(zip(firsts, (plain.nbytes, PAGESIZE + 512, 256)))
    assert pointer % PAGESIZE == 0 and spans.spans[first].data_ptr() == firsts[-1]
    assert (spans.spans[first] == 7).all() and not spans.spans[plain.id].any()
    spans.close()
    assert unregistered == firsts


def as_on_cuda(monkeypatch):
    """Lets a compressor that is given a stream run on a CPU."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


@pytest.mark.parametrize("overlaps", [False, True])
def test_two_scratch_spans_at_most(monkeypatch, overlaps):
    """Loads as on CUDA, where the next group is read while one is compressed, and as on a CPU, one after the other; the
    bits are the same."""
    source, layout = model()
    plain = load_weights(source, layout, set(by_group(layout)), True, CPU, 2)
    events = []
    whole_compress, whole_begin = host_store.compress_group, host_store._Reader.begin

    def compress(group, span, *rest):
        events.append(f"compress {layout.groups.index(group)}")
        return whole_compress(group, span, *rest)

    def begin(reader, group, span):
        events.append(f"read {layout.groups.index(group)}")
        return whole_begin(reader, group, span)

    monkeypatch.setattr(host_store, "compress_group", compress)
    monkeypatch.setattr(host_store._Reader, "begin", begin)
    as_on_cuda(monkeypatch)
    spans = HostSpans(layout.groups, compressed=set(by_group(layout)))
    compressor = host_store._Compressor(CPU, 1)
    compressor._stream = "a stream" if overlaps else None
    with host_store._Reader(source, None, 2, None) as reader:
        compressor.load(layout.groups, reader, dict.fromkeys(by_group(layout), spans))
    a, b, c, d, e = sorted(range(5), key=lambda index: -layout.groups[index].nbytes)
    if overlaps:
        assert events[:2] == [f"read {a}", f"read {b}"] and events[-2:] == [f"compress {d}", f"compress {e}"]
        assert events[2:-2] == [
            f"compress {a}",
            f"read {c}",
            f"compress {b}",
            f"read {d}",
            f"compress {c}",
            f"read {e}",
        ]
    else:
        assert events == [f"{what} {index}" for index in (a, b, c, d, e) for what in ("read", "compress")]
    for group in layout.groups:
        decompressed = torch.zeros(group.nbytes, dtype=torch.uint8)
        compressor.compressed[group.id].restore(spans.spans[group.id], decompressed, num_tokens=1)
        assert torch.equal(decompressed, plain.host_spans[group.id])


@pytest.mark.parametrize("fails", [False, True])
def test_a_blob_is_kept_while_the_next_group_is_compressed(monkeypatch, fails):
    """Keeps no blob before the next group is being compressed; one that cannot be kept ends the loading."""
    source, layout = model()
    order = sorted(layout.groups, key=lambda group: -group.nbytes)
    begun = {group.id: threading.Event() for group in order}
    following = dict(zip(begun, list(begun.values())[1:]))
    whole_compress = host_store.compress_group

    class LateSpans(HostSpans):
        def keep(self, group, blob):
            if group in following:
                assert following[group].wait(60), "nothing is compressed meanwhile"
            elif fails:
                raise ValueError("no such luck")
            super().keep(group, blob)

    def compress(group, *rest):
        begun[group.id].set()
        return whole_compress(group, *rest)

    monkeypatch.setattr(host_store, "compress_group", compress)
    as_on_cuda(monkeypatch)
    spans = LateSpans(layout.groups, compressed=set(begun))
    compressor = host_store._Compressor(CPU, 1)
    compressor._stream = "a stream"
    with host_store._Reader(source, None, 2, None) as reader:
        with pytest.raises(ValueError, match="no such luck") if fails else contextlib.nullcontext():
            compressor.load(layout.groups, reader, dict.fromkeys(begun, spans))
    assert list(spans.spans) == list(begun)[: len(begun) - fails]


@pytest.mark.gpu
@pytest.mark.parametrize("streams", ["none", "half", "all"])
def test_compressed_on_the_gpu_equals_plain_on_the_cpu(streams):
    source, layout = model(hidden_size=1024, intermediate_size=3072, vocab_size=8000)
    num_streamed = {"none": 0, "half": 2, "all": 5}[streams]
    streamed = {group.id for group in layout.groups[:num_streamed]}
    compressed = {group.id for group in layout.groups if group.id.name != "attn"}
    plain = load_weights(source, layout, streamed, streams != "none", CPU)
    torch.cuda.empty_cache()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    loaded = load_weights(source, layout, streamed, streams != "none", torch.device(DEVICE), compressed=compressed)
    assert 0 <= torch.cuda.memory_allocated() - before - loaded.resident_bytes <= 2**20
    assert torch.cuda.memory_reserved() - reserved <= loaded.resident_bytes + 2**21 * (len(loaded.resident) + 10)
    assert all(span.is_cuda for span in loaded.resident.values()) and set(loaded.compressed) == compressed
    assert all(not span.is_cuda for span in loaded.host_spans.values())
    for group in loaded.host_spans:  # registered memory: the device reads what was kept
        loaded.host_spans[group] = loaded.host_spans[group].to(DEVICE, non_blocking=True)
    assert_decompresses_to(loaded, plain, layout)
    print(f"{streams}: {loaded.compressed_from_bytes / loaded.compress_s * 1e-9:.2f} GB/s compressed")
    loaded.close()
    plain.close()
