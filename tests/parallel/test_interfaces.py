"""The interface and the address by which ranks on other hosts reach this one."""

import os
import socket
from dataclasses import dataclass

import pytest
from penstock.parallel import rendezvous
from penstock.parallel.interfaces import VARIABLE, addresses_of, is_loopback, own_address, prefer_interface_of
from penstock.parallel.launch import Launch
from penstock.parallel.processes import Process

ROADS = {"127.0.1.1": "127.0.1.1", "10.0.0.2": "10.0.0.1", "10.0.0.3": "10.0.0.1"}  # from host a


@dataclass
class Meeting:
    """One in which the ranks have told these addresses, by rank; this one's own is noted."""

    told: list[str]
    own: str = ""

    def tell(self, what: str, own: str) -> list[str]:
        assert what == "address"
        self.own = own
        return self.told


@pytest.mark.parametrize(
    ("hosts", "told", "expected"),
    [
        ("ab", ["127.0.1.1", "10.0.0.2"], "10.0.0.1"),
        ("aabb", ["127.0.1.1", "127.0.1.1", "10.0.0.3", "10.0.0.3"], "10.0.0.1"),
        ("ab", ["127.0.1.1", "127.0.1.1"], "127.0.1.1"),  # hosts that share a network
    ],
)
def test_the_stores_own_host_is_found_by_its_way_to_another(monkeypatch, hosts, told, expected):
    monkeypatch.setattr(rendezvous, "own_address", lambda there, port: ROADS[there])
    preferred = []
    monkeypatch.setattr(rendezvous, "prefer_interface_of", preferred.append)
    people = [Process(host, pid) for pid, host in enumerate(hosts)]
    meeting = Meeting(told)
    launch = Launch("torchrun", 0, len(hosts), master_addr="127.0.1.1")
    assert rendezvous._addresses(launch, meeting, people) == [expected, socket.gethostname()]
    assert meeting.own == "127.0.1.1" and preferred == [expected]


def test_addresses_of_this_host(monkeypatch):
    assert own_address("localhost", 9) in map(str, addresses_of("lo")) and addresses_of("nope0") == []
    assert is_loopback("127.0.1.1") and is_loopback("::1") and not is_loopback("10.0.0.1")
    monkeypatch.setenv(VARIABLE, "eth7")
    prefer_interface_of("127.0.0.1")
    assert os.environ[VARIABLE] == "eth7"
    monkeypatch.delenv(VARIABLE)
    prefer_interface_of("192.0.2.77")  # of no host
    assert VARIABLE not in os.environ
    prefer_interface_of("127.0.0.1")
    assert os.environ[VARIABLE] == "lo"
