"""What crossed between the two sides of a split execution: calls and bytes by site. PURE.

Bytes are those of tensors in the dtype in which they cross; the headers of a socket's frames are not among them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Site(NamedTuple):
    """Where in the model a call is made. The embedding has layer_idx -1, the head num_layers."""

    operation: str
    layer_idx: int


@dataclass(frozen=True)
class Transfer:
    """Calls, and what they moved: `sent_bytes` from the host side to the device side, `received_bytes` back."""

    num_calls: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.sent_bytes + self.received_bytes

    def __add__(self, other: "Transfer") -> "Transfer":
        sent, received = self.sent_bytes + other.sent_bytes, self.received_bytes + other.received_bytes
        return Transfer(self.num_calls + other.num_calls, sent, received)


class TransferLedger:
    """`sites` in the order of their first calls. Predicted and counted ledgers are equal where their sites are."""

    def __init__(self):
        self.sites: dict[Site, Transfer] = {}

    def add(self, site: Site, sent_bytes: int, received_bytes: int) -> None:
        """Counts one call."""
        self.sites[site] = self.at(site) + Transfer(1, sent_bytes, received_bytes)

    def at(self, site: Site) -> Transfer:
        return self.sites.get(site, Transfer())

    def operation(self, *names: str) -> Transfer:
        """All calls of these operations together."""
        return total(transfer for site, transfer in self.sites.items() if site.operation in names)

    @property
    def total(self) -> Transfer:
        return total(self.sites.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TransferLedger) and self.sites == other.sites


def total(transfers: Iterable[Transfer]) -> Transfer:
    return sum(transfers, Transfer())
