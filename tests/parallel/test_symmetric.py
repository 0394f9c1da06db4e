"""The way that a sum over GPUs takes, by its size, and the communicator of NCCL's calls; no GPU is needed."""

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
