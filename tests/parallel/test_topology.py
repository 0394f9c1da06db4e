"""Devices by rank and flag, and NUMA nodes from a copy of /sys. No GPU is needed: CUDA's answers are faked."""

import os
from types import SimpleNamespace

import pytest
import torch
from penstock.parallel import topology
from penstock.parallel.topology import Topology, bind_to_numa, parse_cpu_list, read_numa_node, resolve_topology


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that `count` GPUs are visible, at PCI addresses 0001:0a:00.0, 0001:0b:00.0, ..."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
        address = lambda gpu: SimpleNamespace(pci_domain_id=1, pci_bus_id=10 + gpu, pci_device_id=0)  # noqa: E731
        monkeypatch.setattr(torch.cuda, "get_device_properties", address)

    return pretend


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_cpu_without_gpus(gpus, device):
    gpus(0)
    found = resolve_topology(1, 2, 1, device)
    assert found == Topology(1, 2, 1, torch.device("cpu"))
    assert found.describe().startswith("rank 1 of 2: cpu, ")


def test_cpu_wins_over_gpus_when_asked(gpus):
    gpus(2)
    assert resolve_topology(3, 4, 3, "cpu").device == torch.device("cpu")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_gpu_of_the_local_rank(gpus, device):
    gpus(2)
    found = resolve_topology(5, 8, 1, device)
    assert found.device == torch.device("cuda", 1)
    assert "rank 5 of 8: cuda:1 (NVIDIA H200), NUMA node " in found.describe()


@pytest.mark.parametrize(
    ("count", "arguments", "message"),
    [
        (0, (0, 1, 0, "cuda"), "device=cuda: no CUDA device"),
        (2, (2, 3, 2, "auto"), "3 ranks on this host need 3 GPUs, 2 visible"),
        (2, (0, 4, 0, "cuda", 4), "4 ranks on this host need 4 GPUs, 2 visible"),
        (0, (0, 1, 0, "tpu"), "device='tpu'"),
    ],
)
def test_refusals(gpus, count, arguments, message):
    gpus(count)
    with pytest.raises(ValueError, match=message):
        resolve_topology(*arguments)


@pytest.mark.parametrize(("written", "node"), [("1\n", 1), ("-1\n", None), ("", None), (None, None)])
def test_numa_node_of_a_gpu(gpus, tmp_path, written, node):
    gpus(1)
    if written is not None:
        file = tmp_path / "bus/pci/devices/0001:0a:00.0/numa_node"
        file.parent.mkdir(parents=True)
        file.write_text(written)
    assert read_numa_node(0, sys=tmp_path) == node


def test_cpu_lists():
    assert parse_cpu_list("0-2,8,10-11\n") == {0, 1, 2, 8, 10, 11}
    assert parse_cpu_list("\n") == set()


def test_bind_to_numa(tmp_path, monkeypatch):
    bound = []
    monkeypatch.setattr(topology, "_affinity", lambda: {0, 1, 2})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: bound.append((pid, cpus)))
    for node, cpus in (("0", "0-1\n"), ("1", "8-15\n")):
        (tmp_path / f"devices/system/node/node{node}").mkdir(parents=True)
        (tmp_path / f"devices/system/node/node{node}/cpulist").write_text(cpus)
    on = lambda node: Topology(0, 1, 0, torch.device("cuda", 0), node)  # noqa: E731
    assert bind_to_numa(on(None), sys=tmp_path) is None
    assert bind_to_numa(on(7), sys=tmp_path) is None  # no such node
    assert bind_to_numa(on(1), sys=tmp_path) is None  # none of its CPUs is ours
    assert bind_to_numa(on(0), sys=tmp_path) == {0, 1}
    assert bound == [(0, {0, 1})]
