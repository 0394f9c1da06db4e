"""Host memory: exact, registered and given back; and refused where the cgroup's limit cannot hold it."""

import warnings
from pathlib import Path

import pytest
import torch
from penstock.engine.weights import host_arena
from penstock.engine.weights.host_arena import HostArena, cgroup_memory, check_host_memory


def test_arena_is_exact_zero_aligned_and_given_back():
    def resident_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    arena = HostArena(200_000_001)
    assert arena.tensor.numel() == 200_000_001 and arena.tensor.data_ptr() % 4096 == 0
    assert not arena.tensor[:: 2**20].any()
    arena.tensor.fill_(1)
    full, view = resident_bytes(), arena.tensor[:10]
    arena.close()
    assert view.sum() == 10  # a view that somebody kept is no dangling pointer
    del view
    assert full - resident_bytes() > 190e6
    assert HostArena(0).tensor.numel() == 0


def test_a_sparse_arena_takes_what_is_used_and_keeps_it():
    """Makes an arena larger than the machine's memory; what a huge page took behind the used bytes is given back."""

    def taken_bytes(arena):
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        start = f"{arena.tensor.data_ptr():x}-"
        next(line for line in lines if line.startswith(start))
        return int(next(line for line in lines if line.startswith("Rss:")).split()[1]) * 1024

    arena = HostArena(2**42 + 1, sparse=True)
    used = 5 * 2**20 + 7
    arena.tensor[:used].fill_(3)
    arena.trim(used)
    assert arena.nbytes == len(arena.tensor) == used and (arena.tensor == 3).all()
    assert used <= taken_bytes(arena) < used + 2 * 4096
    arena.close()


@pytest.mark.parametrize("used", [0, 1, 4096])
def test_trimming_a_small_arena(used):
    arena = HostArena(4096)
    arena.trim(used)
    assert arena.nbytes == len(arena.tensor) == used
    arena.close()


@pytest.mark.parametrize("status", [0, 2])
def test_registration_is_checked_and_undone(monkeypatch, status):
    calls = []

    class Cudart:
        def cudaHostRegister(self, pointer, nbytes, flags):
            calls.append(("register", pointer, nbytes))
            return status

        def cudaHostUnregister(self, pointer):
            calls.append(("unregister", pointer))
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    arena = HostArena(2**20)
    pointer = arena.tensor.data_ptr()
    if status:
        with pytest.raises(RuntimeError, match=r"cannot register 1\.00 MiB .*ulimit -l unlimited"):
            arena.register()
    else:
        arena.register()
    arena.close()
    assert calls == [("register", pointer, 2**20)] + ([] if status else [("unregister", pointer)])


def write_cgroup(root, version, limit, anon):
    own = root / "own"
    if version == 2:
        folder, own_line, limit_name, field = root / "job", "0::/job", "memory.max", "anon"
    else:
        folder, own_line, limit_name, field = root / "memory/job", "4:memory:/job", "memory.limit_in_bytes", "total_rss"
    folder.mkdir(parents=True)
    own.write_text(f"9:cpu:/elsewhere\n{own_line}\n")
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / "memory.stat").write_text(f"file 123\n{field} {anon}\n")
    return own


@pytest.mark.parametrize("version", [1, 2])
def test_the_cgroup_limit_refuses_what_cannot_fit(tmp_path, monkeypatch, version):
    own = write_cgroup(tmp_path, version, limit=100 * 2**30, anon=30 * 2**30)
    monkeypatch.setattr(host_arena, "cgroup_memory", lambda: cgroup_memory(tmp_path, own))
    assert cgroup_memory(tmp_path, own) == (100 * 2**30, 30 * 2**30)
    check_host_memory(69 * 2**30)
    check_host_memory(50 * 2**30, ranks_on_host=2)
    with pytest.raises(ValueError, match=r"need 71\.00 GiB of host memory, but the cgroup's limit is 100\.00 GiB"):
        check_host_memory(71 * 2**30)
    with pytest.raises(ValueError, match=r"need 51\.00 GiB on each of 2 ranks"):
        check_host_memory(51 * 2**30, ranks_on_host=2)


@pytest.mark.parametrize("limit", ["max", 9223372036854771712])
def test_without_a_limit_too_little_memory_is_only_warned_of(tmp_path, monkeypatch, limit):
    own = write_cgroup(tmp_path, 2, limit, anon=0)
    assert cgroup_memory(tmp_path, own) == (None, 0)
    monkeypatch.setattr(host_arena, "cgroup_memory", lambda: (None, 0))
    with pytest.warns(UserWarning, match=r"need 1048576\.00 GiB of host memory, but only .* GiB seem to be free"):
        check_host_memory(2**50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_host_memory(2**20)
