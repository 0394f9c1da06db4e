"""Says how far a start has come. The thread that starts writes it, any other may read it."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Progress:
    """The part of a start that is under way (planning, loading weights, building what computes with them, done), and
    of the bytes of this rank's weights those that are loaded."""

    part: str = "planning"
    loaded_bytes: int = 0
    total_bytes: int = 0

    def begin_loading(self, total_bytes: int) -> None:
        """Says that weights are loaded from here on; a second time from the beginning."""
        self.part, self.loaded_bytes, self.total_bytes = "loading", 0, total_bytes

    def add(self, nbytes: int) -> None:
        """Says that so many more bytes are loaded."""
        self.loaded_bytes += nbytes

    def to_dict(self) -> dict[str, Any]:
        """The numbers, as JSON takes them."""
        return asdict(self)
