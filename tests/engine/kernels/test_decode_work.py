"""The work of decode attention: the kernel (interpreted where there is no GPU) lists what the reference lists."""

import functools
import random

import pytest
import torch
from penstock.engine.kernels import decode_work as kernels
from penstock.engine.kernels import segments

from tests.support.kernel_proof import CONTIGUOUS, DEVICE, Layout, counted, equal, prove, prove_faster, prove_refusal

KERNEL = kernels._list_work_triton
WINDOWS = (None, 1, 700)
LAYOUTS = (CONTIGUOUS, Layout("misaligned", before=1))
NOTHING = torch.empty(0, device=DEVICE)
REACHES = kernels.reaches_of(WINDOWS, NOTHING.device)


def empty(lengths: list[int], segment: int, windows: tuple = WINDOWS) -> kernels.DecodeWork:
    """A list with room for these lengths alone."""
    capacity = segments.count_items(lengths, segment)
    reaches = kernels.reaches_of(windows, NOTHING.device)
    return kernels.make_work(len(lengths), segment, capacity, windows, reaches, NOTHING)


def listed(lengths: list[int], segment: int, num_queries: int = 1, run=KERNEL) -> list[list[tuple]]:
    """The items of each window, in order, whose rows begin where the list says."""
    work = empty(lengths, segment)
    work.items.fill_(-1)
    run(torch.tensor(lengths, dtype=torch.int32, device=DEVICE), work, num_queries)
    lists = []
    for items, starts, window in zip(work.items.tolist(), work.starts.tolist(), WINDOWS):
        there = [tuple(item) for item in items[: starts[-1]]]
        assert all(item == [-1] * kernels.FIELDS for item in items[starts[-1] :])
        assert starts == [sum(item[0] < row for item in there) for row in range(len(lengths) + 1)]
        assert len(there) <= work.room(window, num_queries)
        lists.append(there)
    return lists


def test_rows_follow_each_other_and_windows_skip_what_lies_before():
    everything, last, near = listed([1000, 0, 256, 257], 256)
    assert everything == [
        *((0, 0, 1000, 4), (0, 1, 1000, 4), (0, 2, 1000, 4), (0, 3, 1000, 4)),
        *((2, 0, 256, 1), (3, 0, 257, 2), (3, 1, 257, 2)),
    ]
    assert last == [(0, 3, 1000, 1), (2, 0, 256, 1), (3, 1, 257, 1)]
    assert near == [(0, i, 1000, 3) for i in (1, 2, 3)] + everything[4:]


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("num_rows", [1, 2, 17])
def test_kernel_is_the_reference(num_rows, num_queries, monkeypatch):
    """Tries lengths that leave a block of rows, or of a row's items, full or just not."""
    monkeypatch.setattr(kernels, "BLOCK", 16)
    rng = random.Random(num_rows)
    lengths = [rng.choice([0, 1, 127, 128, 129, 5000]) for _ in range(num_rows - 1)] + [128 * (kernels.BLOCK + 1)]
    expected = listed(lengths, 128, num_queries, kernels.list_work_reference)
    assert listed(lengths, 128, num_queries) == expected


def test_nothing_is_written_behind_the_room():
    """A list with too little room says so by its number of items, and leaves its neighbour as it is."""
    work = empty([100, 900], 128)
    short = work._replace(items=work.items.new_full((len(WINDOWS) + 1, 4, kernels.FIELDS), -1)[:-1])
    KERNEL(torch.tensor([100, 900], dtype=torch.int32, device=DEVICE), short)
    assert short.starts[0, -1] == 9 and short.items[0, :, 1].tolist() == [0, 0, 1, 2]
    assert short.items[1, :3].tolist() == [[0, 0, 100, 1], [1, 7, 900, 1], [-1] * 4]


def test_the_most_items_are_bounded_by_the_cache_and_by_the_rows():
    large = segments.Segments(8, 131072, 800_000)
    assert large.tokens(256) == 2048 and large.most(256) == 800_000 // 2048 + 256  # one is begun for each row
    assert large.most(1) == 131072 // 128
    rng = random.Random(0)
    for _ in range(100):
        lengths = [rng.randint(1, 3000) for _ in range(rng.randint(1, 20))]
        cut = segments.Segments(8, max(lengths), sum(lengths))
        assert cut.count(lengths, len(lengths)) <= cut.most(len(lengths)) == cut.capacities(len(lengths))[-1]


def test_room_grows_in_few_steps_from_one_item_a_row():
    cut = segments.Segments(8, 8192, 800_000)
    assert cut.capacities(64) == [64, 256] and cut.capacities(1) == [1, 16, 64]
    assert [cut.capacity([length] * 3, 64) for length in (1, 2048, 2049, 8192)] == [64, 64, 256, 256]


def test_a_row_that_is_cut_always_has_more_room_than_rows():
    """Room for one item a row means that no row is cut, however much of the bucket is padding."""
    cut = segments.Segments(8, 8192, 800_000)
    assert cut.count([2049], 64) == 65 and cut.count([2048] * 64, 64) == 64


def test_segments_are_longer_where_rows_and_heads_are_many():
    assert [segments.Segments(8, 1, 1).tokens(rows) for rows in (1, 4, 8, 16, 64, 256)] == [
        128,
        128,
        256,
        512,
        2048,
        2048,
    ]
    assert [segments.Segments(heads, 1, 1).tokens(256) for heads in (1, 3)] == [1024, 2048]


def tensors_of(lengths: list[int]) -> dict[str, torch.Tensor]:
    """The lengths, and the list that they fill, by name."""
    work = empty(lengths, 128)
    lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return {"lengths": lengths, "items": work.items.fill_(-1), "starts": work.starts}


def writing(run):
    def fill(lengths, items, starts):
        run(lengths, kernels.DecodeWork(128, items.shape[1], WINDOWS, REACHES, items, starts, NOTHING))

    return fill


def test_in_every_layout_of_lengths():
    kernel, reference = (writing(run) for run in (KERNEL, kernels.list_work_reference))
    prove(kernel, reference, tensors_of([300, 0, 5, 128]), ("items", "starts"), equal, LAYOUTS, ["lengths"])


def test_strides_that_are_not_rows_are_refused():
    prove_refusal(writing(KERNEL), tensors_of([300, 0, 5]), "lengths", "starts")


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 256])
def test_kernel_is_faster(num_rows):
    """It is compared with the repetition of rows by the number of their items, in torch, for one window."""
    count, work = num_rows * 5, empty([600] * num_rows, 128, (None,))
    lengths = torch.full((num_rows,), 600, dtype=torch.int32, device=DEVICE)

    def repeated():
        siblings = (lengths + 127) // 128
        ends = siblings.cumsum(0)
        rows = torch.repeat_interleave(siblings, output_size=count)
        work.starts[0, 1:] = ends
        fields = (rows, torch.arange(count, device=DEVICE) - (ends - siblings)[rows], lengths[rows], siblings[rows])
        work.items[0] = torch.stack(fields, 1)

    prove_faster(functools.partial(KERNEL, lengths, work), repeated, work.items.nbytes, f"decode_work {num_rows}")


def test_calls_are_counted_by_kind():
    with counted(kernels.calls, triton=1):
        listed([3], 128)
    kind = "triton" if DEVICE == "cuda" else "reference"
    with counted(kernels.calls, **{kind: 1}):
        listed([3], 128, run=kernels.list_work)
