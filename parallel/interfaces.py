"""The network interface over which ranks talk: the one that they are told to take, checked, since for a useless one
gloo would show a traceback of every rank; and where ranks are on several hosts, the one between these."""

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
import sys
from pathlib import Path

VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915
_IPV6 = Path("/proc/net/if_inet6")


def check_interfaces() -> None:
    """Raises ValueError, naming the variable, for an interface that is not on this host or has no address. The variable
    may name several interfaces, which gloo takes in turn."""
    asked = os.environ.get(VARIABLE, "")
    there = [name for _, name in socket.if_nameindex()]
    for name in asked.split(",") if asked else ():
        if name not in there:
            raise ValueError(f"{VARIABLE}={asked}: this host has no network interface {name!r}, but {', '.join(there)}")
        if not has_address(name):
            raise ValueError(f"{VARIABLE}={asked}: the network interface {name!r} has no address")


def own_address(there: str, port: int) -> str:
    """The address of this host from which what it sends to another address or name leaves. Nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(there, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as connection:
        connection.connect(address)
        return connection.getsockname()[0]


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def prefer_interface_of(address: str) -> None:
    """Lets gloo take the interface that has this address, unless the user names one. By itself it takes the address
    that the host's own name stands for: a loopback on many systems, where no other host reaches it."""
    for _, name in socket.if_nameindex():
        if ipaddress.ip_address(address) in addresses_of(name):
            os.environ.setdefault(VARIABLE, name)


def has_address(name: str) -> bool:
    """Tells whether an interface has an IPv4 or IPv6 address; where the system is not Linux, true."""
    return sys.platform != "linux" or bool(addresses_of(name))


def addresses_of(name: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """The addresses of an interface, of IPv4 the first; none where the system is not Linux."""
    lines = [line.split() for line in _IPV6.read_text().splitlines()] if _IPV6.exists() else []
    found = [ipaddress.ip_address(bytes.fromhex(line[0])) for line in lines if line[-1] == name]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        found.append(ipaddress.ip_address(answer[20:24]))
    return found
