"""Random weights without a file (load_format="dummy"), for benchmarks and tests of speed.

A matrix is one random sequence repeated: element i (counted over the whole tensor, before sharding) is
sequence[(offset(name) + i) mod PERIOD]. So every tp_size sees the same model, and filling costs a copy.
"""

import hashlib
import threading
from collections.abc import Mapping

import torch
from penstock.engine.model.shard import Piece
from torch import Tensor

PERIOD = 2**20 + 7  # prime: rows of a matrix repeat only after PERIOD rows
SMALL_BYTE = 0x23  # any two such bytes are a finite fp16 of less than 2**-6, as a scale is


def small_bytes(number: int, generator: torch.Generator) -> Tensor:
    """Random bytes for quantised blocks: up to SMALL_BYTE in their lower bits, and of either sign. All of one sign, the
    weights have a mean, and behind three layers all activations are within a tenth of each other."""
    values = torch.randint(0, 2 * (SMALL_BYTE + 1), (number,), generator=generator)
    return (values >> 1 | (values & 1) << 7).to(torch.uint8)


class DummyWeights:
    """A `WeightSource` with the tensors `shapes` (name -> global shape, in bytes for quantised ones): matrices are
    normal with a deviation of 1 / sqrt(columns), norm weights are 1 and biases 0; quantised ones are `small_bytes`. The
    same seed gives the same model in every dtype up to rounding."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int = 0):
        self.shapes, self.seed = shapes, seed
        self._sequences: dict[tuple[torch.dtype, int], Tensor] = {}
        self._lock = threading.Lock()

    def read_piece(self, piece: Piece, out: Tensor) -> int:
        """Fills `out`, a CPU view (num_rows, num_cols), with the rectangle. Returns 0: nothing was read."""
        shape = self.shapes[piece.tensor]
        if len(shape) == 1:
            out.fill_(0.0 if piece.tensor.endswith(".bias") else 1.0)
            return 0
        num_cols = shape[1]
        sequence = self._sequence(out.dtype, num_cols)
        base = self._offset(piece.tensor) + piece.col
        done = 0
        while done < piece.num_rows:
            start = (base + (piece.row + done) * num_cols) % PERIOD
            fitting = (len(sequence) - start - piece.num_cols) // num_cols + 1
            rows = min(fitting, piece.num_rows - done)
            source = sequence.as_strided((rows, piece.num_cols), (num_cols, 1), start)
            out[done : done + rows].copy_(source)
            done += rows
        return 0

    def note_scales(self, tensor: str) -> None:
        assert not tensor, f"{tensor}: scales of SMALL_BYTE are finite"

    def finish(self) -> None:
        """Does nothing: there is nothing to warn of."""

    def _offset(self, name: str) -> int:
        digest = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % PERIOD

    def _sequence(self, dtype: torch.dtype, num_cols: int) -> Tensor:
        """One period, and a row more so that no row is ever cut: (PERIOD + num_cols,), scaled for the columns."""
        with self._lock:
            if (dtype, num_cols) not in self._sequences:
                generator = torch.Generator().manual_seed(self.seed)
                if dtype == torch.uint8:
                    period = small_bytes(PERIOD, generator)
                else:
                    period = torch.randn(PERIOD, generator=generator) * num_cols**-0.5
                repeats = -(-num_cols // PERIOD) + 1
                self._sequences[dtype, num_cols] = period.to(dtype).repeat(repeats)[: PERIOD + num_cols]
            return self._sequences[dtype, num_cols]
