"""Host memory that loading adds to a rank, measured in a process of its own on a checkpoint of 300 MB."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from penstock.engine.model.families import read_config, read_spec, tensor_names
from penstock.engine.model.layout import expected_tensors
from penstock.engine.model.shard import Piece
from penstock.engine.weights.blocks import BLOCK_BYTES
from penstock.engine.weights.dummy import DummyWeights
from penstock.engine.weights.host_store import MOST_READERS
from safetensors.torch import save_file

from scripts.bench.dummy_gguf import write_gguf

ROOT = Path(__file__).parents[3]

LOAD_AND_MEASURE = """
    import sys, torch
    from penstock.engine.model.families import tensor_names
    from penstock.engine.model.layout import expected_tensors, model_layout
    from penstock.engine.weights.checkpoint import Checkpoint
    from penstock.engine.weights.gguf_checkpoint import GGUFCheckpoint
    from penstock.engine.weights.host_store import load_weights
    from penstock.engine.weights.read_model import read_model
    from scripts.bench.peak_memory import reset_peak, resident_bytes

    directory, dtype, tp_size, rank, compressed = *sys.argv[1:3], *map(int, sys.argv[3:])
    spec = read_model(directory).spec
    names = spec.names if directory.endswith(".gguf") else tensor_names(spec)
    layout = model_layout(spec, names, dtype, tp_size, rank)
    reset_peak()
    before = resident_bytes()
    with GGUFCheckpoint.open_model(directory, spec) if spec.formats else Checkpoint.open(directory) as source:
        source.check(expected_tensors(spec, names), names.ignorable)
        groups = {group.id for group in layout.groups}
        compressed = groups if compressed else set()
        loaded = load_weights(source, layout, groups, True, torch.device("cpu"), num_threads=8, compressed=compressed)
    largest = max(group.nbytes for group in layout.groups)
    print(resident_bytes() - before, layout.nbytes, loaded.bytes_read, loaded.host_bytes, largest)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 300 MB of bf16 in five files."""
    directory = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 1024, "intermediate_size": 12288, "num_hidden_layers": 3, "vocab_size": 12288}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", **sizes}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    spec = read_spec(read_config(directory), str(directory))
    shapes = expected_tensors(spec, tensor_names(spec))
    names, weight_map = list(shapes), {}
    source = DummyWeights(shapes)
    for i in range(5):
        shard = {name: torch.empty(shapes[name], dtype=torch.bfloat16) for name in names[i::5]}
        for name, tensor in shard.items():
            rows = tensor.view(tensor.shape[0], -1)
            source.read_piece(Piece(name, 0, *rows.shape[:1], 0, rows.shape[1], 0), rows)
        save_file(shard, directory / f"{i}.safetensors")
        weight_map |= dict.fromkeys(shard, f"{i}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def measured(large, dtype: str, tp_size: int, rank: int, compressed: bool = False) -> list[int]:
    """The numbers of the line that the process prints."""
    arguments = [sys.executable, "-c", textwrap.dedent(LOAD_AND_MEASURE), large, dtype, tp_size, rank, int(compressed)]
    result = subprocess.run(list(map(str, arguments)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return list(map(int, result.stdout.split()))


@pytest.mark.parametrize("dtype, tp_size, rank", [("bfloat16", 1, 0), ("bfloat16", 2, 1), ("float16", 2, 1)])
def test_peak_memory_of_loading(large, dtype, tp_size, rank):
    added, shard, num_read, held, _ = measured(large, dtype, tp_size, rank)
    assert shard * tp_size > 295e6 and num_read <= shard == held
    print(f"{dtype} tp {tp_size}: shard {shard / 1e6:.0f} MB, added {added / 1e6:.0f} MB")
    assert 0.95 * shard < added < 1.05 * shard + 200e6
    assert added < 1.05 * shard + (16e6 if dtype == "bfloat16" else 100e6), "more than loading should need"


def test_peak_memory_of_compressed_loading(large):
    """Expects what is held, and two groups: the one that is compressed, and what it becomes."""
    added, shard, _, held, largest = measured(large, "bfloat16", 1, 0, compressed=True)
    print(f"compressed: shard {shard / 1e6:.0f} MB, held {held / 1e6:.0f} MB, added {added / 1e6:.0f} MB")
    embed = 12288 * 1024 * 2
    assert held - embed < 0.7 * (shard - embed)
    assert 0.95 * held < added < held + 2 * largest + 128e6, (
        "more than those, torch's own code and a block for each thread"
    )


def test_peak_memory_of_loading_blocks(large, tmp_path):
    """Expects what is held, two blocks of the file for each thread that takes blocks apart, if all do at once, and what
    torch takes: of an 8B in Q4_K 1.03 times its bytes. Norms are read in fp32."""
    spec, file = read_spec(read_config(large), str(large)), tmp_path / "m.gguf"
    write_gguf(spec, file, "Q8_0", "Q8_0", sparse=False)
    added, _, num_read, held, _ = measured(file, "bfloat16", 1, 0)
    print(f"blocks: held {held / 1e6:.0f} MB, added {added / 1e6:.0f} MB")
    assert held > 150e6 and num_read == pytest.approx(held, rel=1e-3)
    assert 0.95 * held < added < held + 2 * MOST_READERS * BLOCK_BYTES + 16e6
