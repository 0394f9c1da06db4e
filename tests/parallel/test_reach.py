"""The choice of the way that sums take: all ranks choose alike, from what all of them say."""

import warnings

import pytest
import torch
from penstock.parallel import rendezvous
from penstock.parallel.gloo import Gloo
from penstock.parallel.nccl import Nccl
from penstock.parallel.reach import Reach, reach_of
from penstock.parallel.symmetric import Symmetric
from penstock.parallel.topology import Topology


def group(size: int, hosts: int = 1, blind: tuple[tuple[int, int], ...] = ()) -> list[Reach]:
    """`size` ranks on so many hosts, which all see the GPUs of their host, except for the pairs (who, whom) in
    `blind`."""
    of_host = lambda rank: rank * hosts // size  # noqa: E731
    peers = {
        rank: [f"gpu{other}" for other in range(size) if other != rank and of_host(other) == of_host(rank)]
        for rank in range(size)
    }
    for who, whom in blind:
        peers[who].remove(f"gpu{whom}")
    return [Reach(f"host{of_host(rank)}", f"gpu{rank}", peers[rank]) for rank in range(size)]


@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        (group(2), Symmetric),
        (group(8), Symmetric),
        (group(4, hosts=2), Nccl),
        (group(2, hosts=2), Nccl),
        (group(4, blind=((0, 3), (3, 0))), Nccl),  # although ranks 1 and 2 see all
        (group(4, blind=((3, 1),)), Nccl),
        ([Reach("host0", "gpu0", ["gpu1"]), Reach("host0", "gpu0", ["gpu1"])], Nccl),  # nobody sees itself
    ],
    ids=["two", "eight", "two hosts", "one each on two hosts", "one pair", "one way", "one GPU"],
)
def test_all_ranks_choose_alike(facts, kind):
    for rank in range(len(facts)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            topology = Topology(rank, len(facts), 0, torch.device("cuda", 0))
            assert rendezvous._kind(facts, topology) is kind
        assert len(said) == (rank == 0 and kind is Nccl)


def test_a_cpu_has_gloo_on_any_number_of_hosts():
    here = reach_of(torch.device("cpu"))
    assert here == Reach(**here.to_dict()) and here.gpu == ""
    for facts in ([here, here], [here, Reach("elsewhere", "")]):
        assert rendezvous._kind(facts, Topology(0, 2, 0, torch.device("cpu"))) is Gloo


def test_a_gpu_beside_a_cpu_is_refused_by_rank():
    here, gpu = Reach("here", ""), Reach("here", "GPU-0")
    for facts, message in (([here, gpu], "cpu on rank 0, but cuda on rank 1"), ([gpu, gpu, here], "cpu on rank 2")):
        with pytest.raises(ValueError, match=message):
            rendezvous._check_alike(facts)
    rendezvous._check_alike([here, here])


def test_two_ranks_on_one_gpu_are_refused_by_rank():
    """Also where two containers, which are two hosts to us, have the same one."""
    rendezvous._check_alike(group(4))
    for host in ("host0", "host1"):
        with pytest.raises(ValueError, match="ranks 1 and 3 are both on GPU gpu1: CUDA_VISIBLE_DEVICES"):
            rendezvous._check_alike([*group(3), Reach(host, "gpu1")])


def test_a_gpu_names_those_that_it_reaches(monkeypatch):
    class Properties:
        def __init__(self, index):
            self.uuid = f"GPU-{index}"

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, gpu: gpu != 3)
    assert reach_of(torch.device("cuda", 1)).peers == ["GPU-0", "GPU-2"]
