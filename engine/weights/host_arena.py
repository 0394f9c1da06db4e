"""Host memory of exact size that a GPU can copy from: an anonymous mapping, registered where it was touched.

torch's pinned allocator rounds to powers of two and pins before first touch (0.6 s per GiB); registering memory that
was touched takes 0.06 s per GiB and copies just as fast. A copy lies in one registered range.
"""

import contextlib
import mmap
import warnings
from pathlib import Path

import torch
from penstock.engine.model.shard import pad_to
from penstock.scheduler.units import show_bytes
from torch import Tensor

MAP_NORESERVE = 0x4000  # Linux; mmap has no name for it before Python 3.13
UNLIMITED = 2**60  # cgroup v1 writes "no limit" as a number near 2**63
CGROUP_ROOT = Path("/sys/fs/cgroup")


class HostArena:
    """Zeroed host memory of `nbytes` as one uint8 tensor on the CPU, aligned to a page.

    Pages are taken when they are first touched. Of a `sparse` arena only some ever will be, so it may be larger than
    the host's memory. Raises MemoryError if the system refuses the mapping.
    """

    def __init__(self, nbytes: int, sparse: bool = False):
        self.nbytes = nbytes
        self._registered: dict[int, int] = {}  # bytes by the address of the first
        self._map = None
        self.tensor = torch.empty(0, dtype=torch.uint8)
        if nbytes == 0:
            return
        try:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (MAP_NORESERVE if sparse else 0)
            self._map = mmap.mmap(-1, nbytes, flags=flags)
        except OSError as error:
            raise MemoryError(f"the system refuses {show_bytes(nbytes)} of host memory: {error}") from error
        with contextlib.suppress(OSError):  # a kernel without huge pages: slower first touch, nothing else
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)

    def trim(self, nbytes: int) -> None:
        """Keeps the first `nbytes` and gives back the pages behind them, which must not be registered."""
        assert nbytes <= self.nbytes
        unused = pad_to(nbytes, mmap.PAGESIZE)
        if unused < self.nbytes:
            self._map.madvise(mmap.MADV_DONTNEED, unused)
        self.nbytes, self.tensor = nbytes, self.tensor[:nbytes]

    def register(self, part: Tensor | None = None) -> None:
        """Makes the memory, or a view of it that begins at a page, a source of asynchronous copies and readable by
        kernels; call it after filling. Raises RuntimeError, with what to do, if CUDA refuses."""
        part = self.tensor if part is None else part
        pointer, nbytes = part.data_ptr(), len(part)
        if nbytes == 0 or pointer in self._registered:
            return
        error = torch.cuda.cudart().cudaHostRegister(pointer, nbytes, 0)
        if int(error) != 0:
            raise RuntimeError(
                f"CUDA cannot register {show_bytes(nbytes)} of host memory ({error}): raise the limit of locked "
                "memory (ulimit -l unlimited) and of the container's memory (cgroup), or keep more of the model "
                "resident, or use more ranks"
            )
        self._registered[pointer] = nbytes

    def close(self) -> None:
        """Unregisters the memory and gives it back. Views that others still hold stay valid; the memory goes with the
        last of them."""
        registered, self._registered = self._registered, {}
        errors = [torch.cuda.cudart().cudaHostUnregister(pointer) for pointer in registered]
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self._map = None
        for nbytes, error in zip(registered.values(), errors):
            if int(error) != 0:
                raise RuntimeError(f"CUDA cannot unregister {show_bytes(nbytes)} of host memory ({error})")


def check_host_memory(nbytes: int, ranks_on_host: int = 1, what: str = "the weights") -> None:
    """Raises ValueError if `nbytes` for this rank, or for all ranks together, cannot fit below the cgroup's limit;
    where no limit is set, warns if there seems to be too little. (MemTotal is no limit: some machines grow.)"""
    asked = show_bytes(nbytes) + (f" on each of {ranks_on_host} ranks" if ranks_on_host > 1 else "")
    advice = "allow more, keep more of the model resident, use a smaller dtype, or spread it over more hosts"
    limit, in_use = cgroup_memory()
    if limit is not None:
        if nbytes * ranks_on_host > limit or nbytes > limit - in_use:
            raise ValueError(
                f"{what} need {asked} of host memory, but the cgroup's limit is {show_bytes(limit)}, of which "
                f"{show_bytes(in_use)} are in use: {advice}"
            )
        return
    available = _fields(Path("/proc/meminfo"), scale=1024).get("MemAvailable:")
    if available is not None and nbytes > available:
        warnings.warn(
            f"{what} need {asked} of host memory, but only {show_bytes(available)} seem to be free: {advice}",
            stacklevel=2,
        )


def cgroup_memory(root: Path = CGROUP_ROOT, own: Path = Path("/proc/self/cgroup")) -> tuple[int | None, int]:
    """The tightest memory limit above this process, None where no limit is set, and the bytes below it that cannot be
    reclaimed: page cache is not counted. Reads cgroup v2 and v1."""
    tightest, in_use = None, 0
    for path, limit_name, anon_name in _levels(root, own):
        try:
            limit = int((path / limit_name).read_text())
        except (OSError, ValueError):  # not mounted here, or "max"
            continue
        if limit < UNLIMITED and (tightest is None or limit < tightest):
            tightest, in_use = limit, _fields(path / "memory.stat").get(anon_name, 0)
    return tightest, in_use


def _levels(root: Path, own: Path) -> list[tuple[Path, str, str]]:
    """This process's cgroup and every one above it: (directory, file with the limit, field of memory.stat)."""
    levels = [(root, "memory.max", "anon"), (root / "memory", "memory.limit_in_bytes", "total_rss")]
    lines = own.read_text().splitlines() if own.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base, *names = levels[1] if controllers else levels[0]
        inner = base / path.lstrip("/")
        levels += [(path, *names) for path in (inner, *inner.parents) if path != base and base in path.parents]
    return levels


def _fields(file: Path, scale: int = 1) -> dict[str, int]:
    """Numbers by name, the first and second word of each line; empty if the file is not there."""
    try:
        words = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) * scale for line in words if len(line) > 1 and line[1].isdigit()}
