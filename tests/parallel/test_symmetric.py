"""The way that a sum over GPUs takes, by its size, the communicator of NCCL's calls and its end, and the numbers of
meetings; no GPU is needed."""

import itertools
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from penstock.parallel import push_reduce, symmetric, two_step_reduce
from penstock.parallel.ledger import Site, Transfer, TransferLedger
from penstock.parallel.nccl import Nccl
from penstock.parallel.symmetric import Symmetric
from penstock.scheduler.units import MIB

GRAPHS = object()  # the communicator of graphs


class Device(Symmetric):
    """One of four ranks with the same parts. `took` says what each call did: its way, its bytes or communicator."""

    def __init__(self, monkeypatch):
        self.rank, self.size, self.took, self.capturing = 0, 4, [], False
        self.ledger, self.num_symmetric = TransferLedger(), 0
        self._graph_group, self._warms_up = GRAPHS, False
        self._peer_buffers = self._share_buffers = None
        self._broken = self._stopped = False
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: self.sum("nccl", tensor, group))
        monkeypatch.setattr(symmetric, "push_reduce", lambda _, tensor: self.sum("push", tensor))
        monkeypatch.setattr(symmetric, "two_step_reduce", lambda _, tensor: self.sum("shares", tensor))
        for module in (push_reduce, two_step_reduce):
            monkeypatch.setattr(module, "HAS_TRITON", True)

    def sum(self, way, tensor, *group):
        self.took.append((way, tensor.nbytes, *group))
        tensor.mul_(4)


@pytest.fixture
def device(monkeypatch) -> Device:
    return Device(monkeypatch)


def summed(device, num_rows: int, width: int = 4096, dtype=torch.bfloat16) -> list[tuple]:
    """Sums rows, asserts that the sum is right and counts once, and returns its ways."""
    part = (torch.arange(num_rows * width) % 251).to(dtype).view(num_rows, width)
    tensor, before = part.clone(), device.num_symmetric
    device.took = []
    device.all_reduce(tensor, "attn")
    assert tensor.equal(4 * part)
    assert device.num_symmetric - before == (device.took[0][0] != "nccl")
    assert device.ledger.sites == {Site("attn", -1): Transfer(1, part.nbytes)}
    device.ledger.clear()
    return device.took


def test_small_ones_are_pushed_larger_ones_shared_and_the_largest_are_nccl_s(device):
    assert summed(device, 128) == [("push", MIB)]
    assert summed(device, 129) == [("shares", 129 * 8192)]
    assert summed(device, 2048) == [("shares", 16 * MIB)]
    assert summed(device, 2049) == [("nccl", 2049 * 8192, None)]
    assert summed(device, 1024, width=5120, dtype=torch.float16) == [("shares", 10 * MIB)]
    assert summed(device, 1001, width=1001) == [("nccl", 1001 * 1001 * 2, None)]  # ends within a word


def test_captured_calls_and_their_warm_up_have_a_communicator_of_their_own(device):
    tensor = torch.zeros(3, 7)  # 84 bytes are ragged
    reduce = Nccl.all_reduce
    reduce(device, tensor)
    with device.for_graphs():
        reduce(device, tensor)
        device.capturing = True
        reduce(device, tensor)
    reduce(device, tensor)
    device.capturing = False
    reduce(device, tensor)
    assert [group for _, _, group in device.took] == [None, GRAPHS, GRAPHS, GRAPHS, None]
    with pytest.raises(RuntimeError), device.for_graphs():
        raise RuntimeError
    reduce(device, tensor)
    assert device.took[-1][-1] is None


@pytest.mark.parametrize(("own", "of_others", "alone"), [(0, 0, 0), (0, 4, 4), (4, 0, 0), (3, 5, 2)])
def test_all_meet_by_the_number_of_the_rank_that_has_met_most(device, monkeypatch, own, of_others, alone):
    """torch counts meetings in each process; a child of a later self-launch has had none."""
    met = []
    monkeypatch.setattr(symmetric, "_numbers", itertools.count(own))
    monkeypatch.setattr(device, "largest", lambda ints: [max(*ints, of_others)])
    monkeypatch.setattr(dist, "new_group", lambda ranks, **_: SimpleNamespace(group_name=f"only {ranks}"))
    monkeypatch.setattr(symmetric.symm_mem, "empty", lambda *shape, **_: torch.empty(shape))
    monkeypatch.setattr(symmetric.symm_mem, "rendezvous", lambda tensor, group: met.append(group))
    monkeypatch.setattr(device, "_device", torch.device("cpu"), raising=False)
    device._catch_up()
    assert met == ["only [0]"] * alone
    assert next(symmetric._numbers) == max(own, of_others) + 1


def test_a_communicator_that_graphs_hold_keeps_no_other_one_from_its_end(device, monkeypatch):
    """Graphs are dropped when eager calls have ended."""
    ended = threading.Event()
    of_graphs = SimpleNamespace(abort=lambda: device.took.append(("graphs", ended.wait(10))))
    of_calls = SimpleNamespace(abort=lambda: (device.took.append(("calls", True)), ended.set()))
    monkeypatch.setattr(device, "_groups", lambda: [of_graphs, of_calls])
    for thread in device._abort():
        thread.join()
    assert device.took == [("calls", True), ("graphs", True)]
