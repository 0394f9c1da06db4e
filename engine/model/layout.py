"""Describes which weights a group has, and how they are cut for a rank.

Torch-free. One description serves the planner (sizes before a byte is loaded), the checkpoint reader (what to read to
where), the host arena, the ring (what is stored is copied whole) and the views that operations get. At which bytes the
weights of a group lie, group_layout.py says.
"""

import functools
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from penstock.engine.model.families import TensorNames
from penstock.engine.model.group_layout import GroupLayout, Weight, always_floats, as_floats, pack_group
from penstock.engine.model.shard import (
    Piece,
    ShardKind,
    check_tp_size,
    local_ffn_size,
    local_range,
    local_vocab_size,
    shard_heads,
    tp_sizes,
)
from penstock.engine.model.spec import ModelSpec
from penstock.engine.model.weight_formats import FORMATS
from penstock.scheduler.passes.pass_plan import GroupId


@dataclass(frozen=True)
class ModelLayout:
    """All groups of one rank, in the order of a pass; `embed` is apart because it never streams.

    With a tied head `embed` has no weights of its own: the head group's "head" holds the bytes of both.
    """

    groups: tuple[GroupLayout, ...]
    embed: GroupLayout
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored of it."""
        return sum(layout.stored_bytes for layout in self.groups) + self.embed.stored_bytes


@functools.lru_cache(maxsize=8)  # planner, engine and worker ask for the same one
def model_layout(spec: ModelSpec, names: TensorNames, dtype: str, tp_size: int, rank: int) -> ModelLayout:
    """The layout of `rank`. Every rank's groups have the same offsets and sizes; only the pieces differ.

    Raises ValueError if tp_size does not divide the query heads, or would cut a row inside of a block.
    """
    check_tp_size(tp_size, spec.num_heads)
    formats = dict(spec.formats)
    _check_blocks(spec, names, formats, tp_size)
    cut = _Cutter(spec, names, tp_size, rank)
    groups = []
    for layer_idx in range(spec.num_layers):
        groups.append(pack_group(GroupId(layer_idx, "attn"), cut.attn(layer_idx), dtype, formats))
        groups.append(pack_group(GroupId(layer_idx, "ffn"), cut.ffn(layer_idx), dtype, formats))
    groups.append(pack_group(GroupId(spec.num_layers, "head"), cut.head(), dtype, formats))
    embed = [] if spec.tied else [cut.vocab("embed", names.embed)]
    return ModelLayout(tuple(groups), pack_group(GroupId(-1, "embed"), embed, dtype, formats), dtype)


def _check_blocks(spec: ModelSpec, names: TensorNames, formats: Mapping[str, str], tp_size: int) -> None:
    """Raises ValueError, with the sizes that are possible, if a rank's columns of the attention's output are no whole
    blocks. (Those of the FFN are padded to whole blocks.)"""
    outputs = [names.layer(layer_idx)["o"] + ".weight" for layer_idx in range(spec.num_layers)]
    blocks = {name: FORMATS[formats[name]].block for name in outputs if name in formats}
    for name, block in blocks.items():
        if spec.num_heads // tp_size * spec.head_dim % block:
            largest, width = max(blocks.values()), spec.num_heads * spec.head_dim
            possible = [size for size in tp_sizes(spec.num_heads) if not width // size % largest]
            raise ValueError(
                f"tensor_parallel_size={tp_size} cuts rows of {name} inside of a block of {block} weights"
                f" ({formats[name]}); possible: {', '.join(map(str, possible)) or 'none'}"
            )


def without_kernels(layout: ModelLayout, floats: AbstractSet[GroupId]) -> ModelLayout:
    """The same groups where no kernel reads quantised weights, as on a CPU: those in `floats` become floats once, as
    they are loaded, and all others before their steps in each pass."""
    groups = tuple(as_floats(group) if group.id in floats else always_floats(group) for group in layout.groups)
    return replace(layout, groups=groups)


def select_weights(layout: ModelLayout, spec: ModelSpec, wanted: Callable[[Weight], bool]) -> ModelLayout:
    """The same groups with only those of their weights that are wanted; quantised ones become floats as they are
    read."""
    formats = dict(spec.formats)

    def selected(group: GroupLayout) -> GroupLayout:
        weights = [weight for weight in group.weights if wanted(weight)]
        return as_floats(pack_group(group.id, weights, layout.dtype, formats))

    return ModelLayout(tuple(map(selected, layout.groups)), selected(layout.embed), layout.dtype)


def expected_tensors(spec: ModelSpec, names: TensorNames) -> dict[str, tuple[int, ...]]:
    """Every tensor that the checkpoint must have, with its global shape, from the pieces of an unsharded layout."""
    layout = model_layout(spec, names, "float32", tp_size=1, rank=0)
    shapes: dict[str, tuple[int, ...]] = {}
    for group in (*layout.groups, layout.embed):
        for weight in group.weights:
            for piece in weight.pieces:
                rows = max(piece.row + piece.num_rows, shapes.get(piece.tensor, (0,))[0])
                shapes[piece.tensor] = (rows,) if len(weight.shape) == 1 else (rows, piece.num_cols)
    return shapes


class _Cutter:
    """Builds the weights of one rank, with a method for each group, in the order in which a pass reads them."""

    def __init__(self, spec: ModelSpec, names: TensorNames, tp_size: int, rank: int):
        self.spec, self.names, self.tp_size, self.rank = spec, names, tp_size, rank
        self.heads = shard_heads(spec.num_heads, spec.num_kv_heads, tp_size, rank)

    def attn(self, layer_idx: int) -> list[Weight]:
        spec, names = self.spec, self.names.layer(layer_idx)
        weights = [
            *self._norm("attn_norm", names["attn_norm"]),
            self._qkv("qkv", names, "weight", spec.hidden_size),
        ]
        if spec.qkv_bias:
            weights.append(self._qkv("qkv_bias", names, "bias", 1))
        if spec.qk_norm:
            weights += [self._whole("q_norm", names["q_norm"] + ".weight", spec.head_dim)]
            weights += [self._whole("k_norm", names["k_norm"] + ".weight", spec.head_dim)]
        first, num = self.heads.first_head * spec.head_dim, self.heads.num_heads * spec.head_dim
        piece = Piece(names["o"] + ".weight", 0, spec.hidden_size, first, num, 0)
        weights.append(Weight("o", ShardKind.ROW, (spec.hidden_size, num), (piece,), _source(piece.tensor)))
        if spec.o_bias:
            weights.append(self._row_bias("o_bias", names["o"] + ".bias"))
        return weights

    def ffn(self, layer_idx: int) -> list[Weight]:
        spec, names = self.spec, self.names.layer(layer_idx)
        local = local_ffn_size(spec.ffn_size, self.tp_size, spec.ffn_multiple)
        start, stop = local_range(spec.ffn_size, local, self.rank)
        sources = [names["gate"], names["up"]] if spec.gated else [names["up"]]
        up_name = "gate_up" if spec.gated else "up"

        def up(name: str, suffix: str, num_cols: int) -> Weight:
            pieces = [Piece(s + suffix, start, stop - start, 0, num_cols, i * local) for i, s in enumerate(sources)]
            rows = len(sources) * local
            if suffix == ".bias":
                return Weight(name, ShardKind.COLUMN, (rows,), _nonempty(pieces))
            joined = tuple((piece.tensor, piece.to_row) for piece in pieces)
            return Weight(name, ShardKind.COLUMN, (rows, num_cols), _nonempty(pieces), joined)

        weights = [*self._norm("ffn_norm", names["ffn_norm"]), up(up_name, ".weight", spec.hidden_size)]
        if spec.ffn_up_bias:
            weights.append(up(up_name + "_bias", ".bias", 1))
        piece = Piece(names["down"] + ".weight", 0, spec.hidden_size, start, stop - start, 0)
        down = Weight("down", ShardKind.ROW, (spec.hidden_size, local), _nonempty([piece]), _source(piece.tensor))
        weights.append(down)
        if spec.ffn_down_bias:
            weights.append(self._row_bias("down_bias", names["down"] + ".bias"))
        return weights

    def head(self) -> list[Weight]:
        source = self.names.embed if self.spec.tied else self.names.head
        return [*self._norm("final_norm", self.names.final_norm), self.vocab("head", source)]

    def vocab(self, name: str, source: str) -> Weight:
        spec = self.spec
        local = local_vocab_size(spec.vocab_size, self.tp_size)
        start, stop = local_range(spec.vocab_size, local, self.rank)
        piece = Piece(source, start, stop - start, 0, spec.hidden_size, 0)
        return Weight(name, ShardKind.VOCAB, (local, spec.hidden_size), _nonempty([piece]), _source(source))

    def _qkv(self, name: str, names: dict[str, str], suffix: str, num_cols: int) -> Weight:
        """Rows of q, k and v joined: the rank's query heads, then its K heads, then its V heads."""
        spec, shard = self.spec, self.heads
        query_heads = range(shard.first_head, shard.first_head + shard.num_heads)
        wanted = [("q", head) for head in query_heads]
        wanted += [("k", head) for head in shard.kv_heads] + [("v", head) for head in shard.kv_heads]
        pieces: list[Piece] = []
        for index, (which, head) in enumerate(wanted):
            if "qkv" in names:  # GPT-NeoX: one tensor, laid out [head][q, k, v][dim]
                source, row = names["qkv"], (head * 3 + "qkv".index(which)) * spec.head_dim
            else:
                source, row = names[which], head * spec.head_dim
            piece = Piece(f"{source}.{suffix}", row, spec.head_dim, 0, num_cols, index * spec.head_dim)
            _append_joined(pieces, piece)
        rows = len(wanted) * spec.head_dim
        if suffix == "bias":
            return Weight(name, ShardKind.COLUMN, (rows,), tuple(pieces))
        first = {piece.tensor: piece.to_row for piece in reversed(pieces)}
        joined = () if "qkv" in names else tuple(sorted(first.items(), key=lambda item: item[1]))
        return Weight(name, ShardKind.COLUMN, (rows, num_cols), tuple(pieces), joined)

    def _norm(self, name: str, source: str) -> list[Weight]:
        weights = [self._whole(name, source + ".weight", self.spec.hidden_size)]
        if self.spec.norm == "layer":
            weights.append(self._whole(name + "_bias", source + ".bias", self.spec.hidden_size))
        return weights

    def _whole(self, name: str, source: str, size: int) -> Weight:
        return Weight(name, ShardKind.REPLICATED, (size,), (Piece(source, 0, size, 0, 1, 0),))

    def _row_bias(self, name: str, source: str) -> Weight:
        """The bias of a row-parallel projection: rank 0 has it, the others zeros, so that the reduce counts it once."""
        size = self.spec.hidden_size
        pieces = (Piece(source, 0, size, 0, 1, 0),) if self.rank == 0 else ()
        return Weight(name, ShardKind.ROW, (size,), pieces)


def _source(tensor: str) -> tuple[tuple[str, int], ...]:
    """The sources of a weight that is a part of one matrix."""
    return ((tensor, 0),)


def _nonempty(pieces: list[Piece]) -> tuple[Piece, ...]:
    return tuple(piece for piece in pieces if piece.num_rows and piece.num_cols)


def _append_joined(pieces: list[Piece], piece: Piece) -> None:
    """Appends a piece, or extends the last one where `piece` continues it, so that neighbouring heads are one read."""
    last = pieces[-1] if pieces else None
    if last and last.tensor == piece.tensor and last.row + last.num_rows == piece.row:
        joined = Piece(last.tensor, last.row, last.num_rows + piece.num_rows, 0, last.num_cols, last.to_row)
        pieces[-1] = joined
    else:
        pieces.append(piece)
