"""Collectives of ranks on GPUs over NCCL alone."""

import contextlib
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist
from penstock.parallel.connections import Connections
from penstock.parallel.gloo import Distributed

# torch 2.13 warns about the older name, and 2.11 has only that.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Nccl(Distributed):
    """Collectives of CUDA tensors over NCCL, on the caller's stream; host messages go over a gloo group. Captured calls
    have a communicator of their own, so that an eager call never meets one that a graph has under way."""

    uses_gpus = True

    def __init__(self, timeout_s: float, connections: Connections):
        super().__init__(timeout_s, connections)
        self._graph_group = dist.new_group(backend="nccl", timeout=self._timeout)
        self._warms_up = False

    @contextlib.contextmanager
    def for_graphs(self) -> Iterator[None]:
        self._warms_up = True
        try:
            yield
        finally:
            self._warms_up = False

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return self._graph_group if self._warms_up or torch.cuda.is_current_stream_capturing() else None

    def all_gather_columns(self, part: torch.Tensor, out: torch.Tensor) -> None:
        stacked = part.new_empty((self.size, *part.shape))  # (size, N, V_loc)
        with self._peers():
            _all_gather_single(stacked, part.contiguous(), group=self._group)
        out.view(part.shape[0], self.size, part.shape[1]).copy_(stacked.transpose(0, 1))

    def _abort(self) -> list[threading.Thread]:
        """Aborts both communicators at once. NCCL ends the kernels of one at once, and returns when no graph holds its
        calls any more. Graphs are dropped behind eager calls, whose end must not wait for that."""
        threads = [threading.Thread(target=_abort_group, args=(group,), daemon=True) for group in self._groups()]
        for thread in threads:
            thread.start()
        return threads

    def _groups(self) -> list[dist.ProcessGroup]:
        return [group for group in (self._graph_group, dist.group.WORLD) if group is not None]

    def close(self) -> None:
        super().close()
        self._graph_group = None


def _abort_group(group: dist.ProcessGroup) -> None:
    with contextlib.suppress(RuntimeError):
        group.abort()
