"""Ledgers of transfers: calls and bytes by site. Torch-free.

One ledger counts what a rank of the engine moves: weights to its device, and sums over ranks. Another counts what
crosses between the two sides of a split execution. Bytes are those of tensors, in the dtype in which they cross; the
headers of a socket's frames and the ranks' host messages are not counted.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Site(NamedTuple):
    """The operation and layer of the model that make a call. layer_idx is num_layers for the head, and -1 for the
    embedding and whatever belongs to no layer."""

    operation: str
    layer_idx: int


@dataclass(frozen=True)
class Transfer:
    """Calls, and the bytes that they moved: `sent_bytes` from the host (side) to the device (side), `received_bytes`
    back. A sum over ranks counts as sending the bytes of its tensor, whichever way it takes."""

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
    """Transfers by site. Two ledgers, such as a predicted and a counted one, are equal if all their sites are.

    `copy`, `-`, `update` and `clear` do what a Counter's do: a CUDA graph's replay adds what its capture counted.
    """

    def __init__(self):
        self._moved: dict[Site, list[int]] = {}  # a Transfer's fields; a list, since a pass adds to hundreds of sites

    def add(self, site: Site, sent_bytes: int, received_bytes: int = 0) -> None:
        """Counts one call."""
        moved = self._moved.setdefault(site, [0, 0, 0])
        moved[0] += 1
        moved[1] += sent_bytes
        moved[2] += received_bytes

    @property
    def sites(self) -> dict[Site, Transfer]:
        """The transfers by site, in the order of the sites' first calls."""
        return {site: Transfer(*moved) for site, moved in self._moved.items()}

    def at(self, site: Site) -> Transfer:
        return Transfer(*self._moved.get(site, ()))

    def only(self, is_wanted: Callable[[Site], bool]) -> "TransferLedger":
        """A ledger of the wanted sites alone, as they are now."""
        part = TransferLedger()
        part._moved = {site: list(moved) for site, moved in self._moved.items() if is_wanted(site)}
        return part

    def operation(self, *names: str) -> Transfer:
        """The sum of all calls of these operations."""
        return self.only(lambda site: site.operation in names).total

    @property
    def total(self) -> Transfer:
        return total(self.sites.values())

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON: `total`, `operations` by name, and a row for each of the `sites`."""
        names = dict.fromkeys(site.operation for site in self._moved)
        return {
            "total": vars(self.total),
            "operations": {name: vars(self.operation(name)) for name in names},
            "sites": [site._asdict() | vars(moved) for site, moved in self.sites.items()],
        }

    def copy(self) -> "TransferLedger":
        return self.only(lambda site: True)

    def clear(self) -> None:
        self._moved.clear()

    def update(self, gain: "TransferLedger") -> None:
        moved = self._moved
        for site, (num_calls, sent_bytes, received_bytes) in gain._moved.items():
            own = moved.get(site)
            if own is None:
                moved[site] = [num_calls, sent_bytes, received_bytes]
            else:
                own[0] += num_calls
                own[1] += sent_bytes
                own[2] += received_bytes

    def __sub__(self, before: "TransferLedger") -> "TransferLedger":
        """The transfers since `before`, without the sites that had none."""
        gain = TransferLedger()
        for site, moved in self._moved.items():
            gained = [now - then for now, then in zip(moved, before._moved.get(site, (0, 0, 0)))]
            if any(gained):
                gain._moved[site] = gained
        return gain

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TransferLedger) and self._moved == other._moved

    def __repr__(self) -> str:
        return f"TransferLedger({self.sites})"


def total(transfers: Iterable[Transfer]) -> Transfer:
    return sum(transfers, Transfer())
