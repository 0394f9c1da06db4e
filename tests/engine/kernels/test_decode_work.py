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
LAYOUTS, LISTS = (CONTIGUOUS, Layout("misaligned", before=1)), ("items", "starts", "counts", "num_items")
NOTHING = torch.empty(0, device=DEVICE)
REACHES = kernels.reaches_of(WINDOWS, NOTHING.device)


def empty(lengths: list[int], segment: int, windows: tuple = WINDOWS) -> kernels.DecodeWork:
    """A list with room for these lengths alone."""
    capacity = segments.count_items(lengths, segment)
    reaches = kernels.reaches_of(windows, NOTHING.device)
    return kernels.make_work(len(lengths), segment, capacity, windows, reaches, NOTHING)


def listed(lengths: list[int], segment: int, num_queries: int = 1, run=KERNEL) -> list[list[tuple]]:
    """The items of each window, in order, of which each row has those that the list says."""
    work = empty(lengths, segment)
    work.items.fill_(-1)
    run(torch.tensor(lengths, dtype=torch.int32, device=DEVICE), work, num_queries)
    lists = []
    for which, window in enumerate(WINDOWS):
        items, num_items = work.items[which].tolist(), int(work.num_items[which])
        there = [tuple(item) for item in items[:num_items]]
        assert all(item == [-1] * kernels.FIELDS for item in items[num_items:])
        for row, (start, count) in enumerate(zip(work.starts[which].tolist(), work.counts[which].tolist())):
            assert there[start : start + count] == [item for item in there if item[0] == row]
        assert len(there) <= work.room(window, num_queries)
        lists.append(there)
    return lists


def test_the_longest_row_comes_first_and_windows_skip_what_lies_before():
    """Rows that are as long as each other keep their order, and the last segment has a remainder of up to a half."""
    everything, last, near = listed([384, 0, 256, 1000, 385, 256], 256)
    assert everything == [
        *((3, 0, 1000, 4), (3, 1, 1000, 4), (3, 2, 1000, 4), (3, 3, 1000, 4), (4, 0, 385, 2), (4, 1, 385, 2)),
        *((0, 0, 384, 1), (2, 0, 256, 1), (5, 0, 256, 1)),
    ]
    assert last == [(3, 3, 1000, 1), (4, 1, 385, 1), *everything[6:]]
    assert near == [(3, i, 1000, 3) for i in (1, 2, 3)] + everything[4:]


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("num_rows", [1, 2, 17])
def test_kernel_is_the_reference(num_rows, num_queries, monkeypatch):
    """Tries lengths that leave a block of rows, or of a row's items, full or just not."""
    monkeypatch.setattr(kernels, "BLOCK", 16)
    rng = random.Random(num_rows)
    lengths = [rng.choice([0, 1, 192, 193, 320, 321, 5000]) for _ in range(num_rows - 1)]
    lengths += [128 * (kernels.BLOCK + 1)]
    expected = listed(lengths, 128, num_queries, kernels.list_work_reference)
    assert listed(lengths, 128, num_queries) == expected


def test_nothing_is_written_behind_the_room():
    """A list with too little room says so by its number of items, and leaves its neighbour as it is."""
    work = empty([100, 980], 128)
    short = work._replace(items=work.items.new_full((len(WINDOWS) + 1, 4, kernels.FIELDS), -1)[:-1])
    KERNEL(torch.tensor([100, 980], dtype=torch.int32, device=DEVICE), short)
    assert short.num_items[0] == 9 and short.items[0, :, 1].tolist() == [0, 1, 2, 3]
    assert short.items[1, :3].tolist() == [[1, 7, 980, 1], [0, 0, 100, 1], [-1] * 4]


def test_segments_cover_a_row_and_a_window_reaches_no_more_than_it_may():
    """The last segment ends with the row, whatever the others do, and has more than half of a segment, if it is not the
    only one, and no more than one and a half."""
    segment, most = 16, dict.fromkeys(range(1, 60), 0)
    for length in range(1, 200):
        count = segments.count_segments(length, segment)
        begins = torch.arange(count) * segment
        ends = [*begins.tolist()[1:], length]
        assert 8 * (count > 1) < length - int(begins[-1]) <= 24
        for reach in most:
            most[reach] = max(most[reach], sum(end > length - reach for end in ends))
    assert most == {reach: segments.count_seen(reach, segment) for reach in most}


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
    assert [cut.capacity([length] * 3, 64) for length in (1, 3072, 3073, 8192)] == [64, 64, 256, 256]


def test_a_row_that_is_cut_always_has_more_room_than_rows():
    """Room for one item a row means that no row is cut, however much of the bucket is padding."""
    cut = segments.Segments(8, 8192, 800_000)
    assert cut.count([3073], 64) == 65 and cut.count([3072] * 64, 64) == 64


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
    """The lengths, and the lists that they fill, by name."""
    work = empty(lengths, 128)
    work.items.fill_(-1)
    return {
        "lengths": torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        **{name: getattr(work, name) for name in LISTS},
    }


def writing(run):
    def fill(lengths, items, **lists):
        run(lengths, kernels.DecodeWork(128, items.shape[1], WINDOWS, REACHES, items, partials=NOTHING, **lists))

    return fill


def test_in_every_layout_of_lengths():
    kernel, reference = (writing(run) for run in (KERNEL, kernels.list_work_reference))
    prove(kernel, reference, tensors_of([300, 0, 5, 128]), LISTS, equal, LAYOUTS, ["lengths"])


def test_strides_that_are_not_rows_are_refused():
    prove_refusal(writing(KERNEL), tensors_of([300, 0, 5]), "lengths", *LISTS[1:3])


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 256])
def test_kernel_is_faster(num_rows):
    """It is compared with the repetition of sorted rows by the number of their items, in torch, for one window."""
    count, work = num_rows * 5, empty([600] * num_rows, 128, (None,))
    lengths = torch.full((num_rows,), 600, dtype=torch.int32, device=DEVICE)

    def repeated():
        work.counts[0] = siblings = (lengths + 63) // 128
        order = lengths.argsort(descending=True, stable=True)
        starts = work.starts[0]
        starts[order] = (siblings[order].cumsum(0) - siblings[order]).int()
        rows = order.repeat_interleave(siblings[order], output_size=count)
        fields = (rows, torch.arange(count, device=DEVICE) - starts[rows], lengths[rows], siblings[rows])
        work.items[0] = torch.stack(fields, 1)

    prove_faster(functools.partial(KERNEL, lengths, work), repeated, work.items.nbytes, f"decode_work {num_rows}")


def test_calls_are_counted_by_kind():
    with counted(kernels.calls, triton=1):
        listed([3], 128)
    kind = "triton" if DEVICE == "cuda" else "reference"
    with counted(kernels.calls, **{kind: 1}):
        listed([3], 128, run=kernels.list_work)
