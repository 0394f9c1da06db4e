"""The weights of a GGUF model, read as they are stored: a Checkpoint whose quantised pieces are bytes."""

from collections.abc import Mapping
from pathlib import Path

import torch
from penstock.engine.model.spec import ModelSpec
from penstock.engine.model.weight_formats import FORMATS, QUANTISED
from penstock.engine.weights.checkpoint import FILE_DTYPES, Checkpoint
from penstock.engine.weights.gguf_file import read_gguf
from penstock.engine.weights.headers import TensorEntry
from penstock.scheduler.units import MIB
from torch import Tensor

PERMUTED = ("llama",)  # families whose q and k the converter permutes
HEADS_BYTES = MIB // 2  # of whole heads that are put in order at a time


class GGUFCheckpoint(Checkpoint):
    """A GGUF file, or its shards. The converter of llama permutes the rows of q and k in each head, so that neighbours
    rotate together (dims 2i and 2i + 1, where transformers rotates i and i + E / 2). They are read in transformers'
    order again; `head_dims` has E for each tensor that is permuted."""

    dtypes = {**FILE_DTYPES, **dict.fromkeys(QUANTISED, torch.uint8)}

    def __init__(self, file: Path, entries: Mapping[str, TensorEntry], spec: ModelSpec):
        super().__init__(file, dict(entries))
        layers = [spec.names.layer(index) for index in range(spec.num_layers)] if spec.family in PERMUTED else []
        stems = [layer[name] for layer in layers for name in ("q", "k")]
        self.head_dims = {f"{stem}.{suffix}": spec.head_dim for stem in stems for suffix in ("weight", "bias")}

    @classmethod
    def open_model(cls, path: str | Path, spec: ModelSpec) -> "GGUFCheckpoint":
        """Reads the headers. Raises ValueError as read_gguf does."""
        header = read_gguf(path)
        return cls(header.file, header.tensors, spec)

    def _row_bytes(self, entry: TensorEntry) -> int:
        if entry.dtype in FORMATS:
            return FORMATS[entry.dtype].row_bytes(entry.num_cols)
        return super()._row_bytes(entry)

    def _read_rows(self, name: str, row: int, col: int, out: Tensor) -> int:
        """Reads as Checkpoint does; of permuted tensors whole heads, some at a time."""
        head_dim, num_read, last = self.head_dims.get(name), 0, row + len(out)
        if head_dim is None:
            return super()._read_rows(name, row, col, out)
        row_bytes = out.shape[1] * out.element_size()
        step = max(1, HEADS_BYTES // (head_dim * row_bytes)) * head_dim
        for first in range(row - row % head_dim, last, step):
            stop = min(first + step, -(-last // head_dim) * head_dim)
            heads = out.new_empty(stop - first, out.shape[1])
            num_read += super()._read_rows(name, first, col, heads)
            ordered = heads.view(-1, head_dim // 2, 2, out.shape[1]).transpose(1, 2).reshape(heads.shape)
            start, stop = max(row, first), min(last, stop)
            out[start - row : stop - row] = ordered[start - first : stop - first]
        return num_read
