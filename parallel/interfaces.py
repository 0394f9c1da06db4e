"""Checks the network interface over which ranks are told to meet. For a useless one gloo would show a traceback of
every rank."""

import fcntl
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


def has_address(name: str) -> bool:
    """Tells whether an interface has an IPv4 or IPv6 address; where the system is not Linux, true."""
    if sys.platform != "linux":
        return True
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            return True
        except OSError:
            return _IPV6.exists() and any(line.split()[-1:] == [name] for line in _IPV6.read_text().splitlines())
