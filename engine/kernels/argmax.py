"""Finds the lowest id of a row's largest logit, for greedy sampling in a CUDA graph. A logit is read once, in its
dtype.

Shapes: R rows, V vocab, N segments a row.
If rows are few, each is cut into segments with a program each, and a second launch merges the segments. If they are
many, each has one program, in one launch. Nothing is added up, so the cut changes no token. -0.0 equals 0.0; a row of
-inf gives 0.
Tried, compiled for sm_90 only: 16-byte loads. Not tried: the last program of a row merging (a node less).
"""

from typing import NamedTuple

import torch
from penstock.engine.kernels.penalty import load_score
from penstock.parallel.triton_door import HAS_TRITON, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
MAX_SEGMENTS = 128


class Cut(NamedTuple):
    """The cut of rows for a kernel: the logits that a program reads at a time, its warps, and how many programs to have
    if rows allow it, so many on each SM of an H200."""

    block: int
    num_warps: int
    num_programs: int


CUT = Cut(1024, 4, 4 * 132)


class Owners(NamedTuple):
    """Says whose the logits are: rows equal to `nobody` are padding, are not read, and get token 0."""

    rows: Tensor  # (R,) int64
    nobody: int


def choose_segments(num_rows: int, vocab_size: int, cut: Cut) -> int:
    """The segments of a row: as many as the programs allow, of at least a block each."""
    return max(1, min(cut.num_programs // max(num_rows, 1), -(-vocab_size // cut.block), MAX_SEGMENTS))


def reads_in_place(logits: Tensor) -> bool:
    """Tells whether kernels take these logits. Kernels only read them; references make temporaries of their size."""
    return logits.is_cuda and HAS_TRITON and logits.dtype != torch.float64


def argmax_rows(logits: Tensor, vocab_size: int, owners: Owners | None = None) -> Tensor:
    """Returns tokens (R,) int64 from the first vocab_size columns of logits (R, V or more) of any float dtype; ties go
    to the lowest id. A row with a NaN gives -1, which is no token."""
    run = _argmax_rows_triton if reads_in_place(logits) else argmax_rows_reference
    return run(logits, vocab_size, owners)


def argmax_rows_reference(logits: Tensor, vocab_size: int, owners: Owners | None = None) -> Tensor:
    """Does the same in plain torch. torch.argmax does not promise which id of a tie it takes."""
    calls["reference"] += 1
    scores = logits[:, :vocab_size]
    ids = torch.arange(vocab_size, dtype=torch.int32, device=logits.device)
    tokens = torch.where(scores == scores.amax(-1, keepdim=True), ids, vocab_size).amin(-1).long()
    tokens.masked_fill_(tokens == vocab_size, -1)
    return tokens if owners is None else tokens.masked_fill_(owners.rows == owners.nobody, 0)


def _argmax_rows_triton(
    logits: Tensor, vocab_size: int, owners: Owners | None = None, num_segments: int | None = None
) -> Tensor:
    calls["triton"] += 1
    return over_segments(_argmax_segment, CUT, logits, vocab_size, owners, num_segments)


def over_segments(
    kernel: object,
    cut: Cut,
    logits: Tensor,
    vocab_size: int,
    owners: Owners | None,
    num_segments: int | None,
    **others: object,
) -> Tensor:
    """Runs a kernel that finds the best of each segment, with `others` as its own arguments, and merges the segments.
    Returns tokens (R,) int64."""
    num_rows = logits.shape[0]
    assert logits.stride(1) == 1, "the last dim of the logits must have stride 1"
    assert logits.dtype in (torch.bfloat16, torch.float16, torch.float32)
    assert 1 <= vocab_size <= logits.shape[1]
    assert owners is None or owners.rows.shape == (num_rows,) and owners.rows.is_contiguous()
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return tokens
    segments = num_segments or choose_segments(num_rows, vocab_size, cut)
    assert segments <= MAX_SEGMENTS
    split = segments > 1
    shape = (num_rows, segments) if split else (0,)
    values = torch.empty(shape, dtype=torch.float32, device=logits.device)
    ids = torch.empty(shape, dtype=torch.int32, device=logits.device)
    length = triton.cdiv(triton.cdiv(vocab_size, segments), cut.block) * cut.block
    kernel[(segments, num_rows)](
        *(logits, logits.stride(0), vocab_size, length, *(owners or (None, -1)), values, ids, tokens),
        **{"OWNED": owners is not None, "SPLIT": split, "BLOCK": cut.block, **others, "num_warps": cut.num_warps},
    )
    if split:
        _merge_segments[(num_rows,)](*(values, ids, tokens, segments, MAX_SEGMENTS), num_warps=1)
    return tokens


@triton.jit
def hand_in(segment, row, best, where, nan, values, ids, tokens, SPLIT: tl.constexpr):
    """Stores what the lanes of a segment found, for the merge or as the row's token; -1 if they found a NaN."""
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, where, 0x7FFFFFFF), 0)
    token = tl.where(tl.max(nan, 0) > 0, -1, token)
    if SPLIT:
        index = row * tl.num_programs(0) + segment
        tl.store(values + index, top)
        tl.store(ids + index, token)
    else:
        tl.store(tokens + row, token.to(tl.int64))


@triton.jit
def end_of_segment(row, begin, length, rows, nobody, OWNED: tl.constexpr):
    """Finds where the program of a segment stops reading: at once in a row that is padding, so that it finds id 0."""
    end = begin + length
    if OWNED:
        end = tl.where(tl.load(rows + row) == nobody, begin, end)
    return end


@triton.jit
def find_largest(
    logits, scores, is_penalised, begin, end, vocab_size, BESIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Finds the largest logit of each lane of a segment, where it is, and whether there is a NaN."""
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = begin + lane  # kept where nothing is above -inf; no id in an empty segment, which loses every tie
    nan = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(begin, end, BLOCK, loop_unroll_factor=4):
        column = first + lane
        logit = load_score(logits, scores, is_penalised, column, vocab_size, float("-inf"), BESIDE)
        higher = logit > best
        best, where = tl.where(higher, logit, best), tl.where(higher, column, where)
        nan |= (logit != logit).to(tl.int32)
    return best, where, nan


@triton.jit
def _argmax_segment(
    logits, logits_row, vocab_size, length, rows, nobody, values, ids, tokens, OWNED: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin = segment * length
    end = end_of_segment(row, begin, length, rows, nobody, OWNED)
    logits += row * logits_row
    best, where, nan = find_largest(logits, logits, 0, begin, end, vocab_size, False, BLOCK)
    hand_in(segment, row, best, where, nan, values, ids, tokens, SPLIT)


@triton.jit(do_not_specialize=["segments"])
def _merge_segments(values, ids, tokens, segments, PADDED: tl.constexpr):
    row, segment = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    inside = segment < segments
    best = tl.load(values + row * segments + segment, mask=inside, other=float("-inf"))
    where = tl.load(ids + row * segments + segment, mask=inside, other=0x7FFFFFFF)
    token = tl.min(tl.where(best == tl.max(best, 0), where, 0x7FFFFFFF), 0)
    tl.store(tokens + row, tl.where(tl.min(where, 0) < 0, -1, token).to(tl.int64))
