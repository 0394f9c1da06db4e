"""penstock pack and unpack as commands: what they print, what they refuse, and that they leave all or nothing."""

import concurrent.futures
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from penstock.engine.commands import pack as pack_command
from penstock.engine.commands.cli import main
from penstock.engine.planning.engine_plan import find_model
from penstock.engine.weights import new_directory, packing, unpacking

from tests.support.kernel_proof import DEVICE
from tests.support.odd_checkpoints import bf16, random_bytes, write_file

DEMO = find_model("demo")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def plain(tmp_path):
    """A checkpoint of one file, with one beside it."""
    (tmp_path / "plain").mkdir()
    tensors = {"a": bf16(100, 96), "b": bf16(300), "c": random_bytes("F32", (50,), 200)}
    write_file(tmp_path / "plain/model.safetensors", tensors)
    (tmp_path / "plain/config.json").write_text("{}")
    return tmp_path / "plain"


@pytest.fixture
def packed(plain, tmp_path, capsys):
    assert run("pack", "--model", plain, "--out", tmp_path / "packed") == 0
    capsys.readouterr()
    return tmp_path / "packed"


def run(*arguments: object) -> int:
    return main([*map(str, arguments), "--device", DEVICE])


def refused(capsys, *arguments: object) -> str:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_what_is_printed(tmp_path, capsys):
    assert run("pack", "--model", "demo", "--out", tmp_path / "demo", "--verify") == 0
    out = capsys.readouterr().out
    size, bits = re.fullmatch(
        r"6\.63 MiB -> (4\.\d\d) MiB, (10\.\d\d) bits a bf16 weight, 9 of 38 tensors raw\n", out
    ).groups()
    assert float(size) == pytest.approx((tmp_path / "demo/model.safetensors").stat().st_size / 2**20, abs=0.01)
    assert float(bits) == pytest.approx(16 * float(size) / 6.63, abs=0.1)
    assert run("pack", "--model", tmp_path / "demo", "--verify") == 0
    assert capsys.readouterr().out.endswith("demo: 38 tensors, 6.63 MiB once decoded, all with their checksums\n")
    assert run("unpack", "--model", tmp_path / "demo", "--out", tmp_path / "again") == 0
    assert capsys.readouterr().out.endswith("again: 6.63 MiB of safetensors files, with their checksums\n")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (DEMO / "model.safetensors").read_bytes()


def test_nothing_to_code(tmp_path, capsys):
    (tmp_path / "plain").mkdir()
    write_file(tmp_path / "plain/model.safetensors", {"c": random_bytes("F32", (50,), 200)})
    assert run("pack", "--model", tmp_path / "plain", "--out", tmp_path / "packed", "--verify") == 0
    assert "bytes, no bf16 weights, 1 of 1 tensors raw" in capsys.readouterr().out


def test_a_tensor_that_grows_stays_as_it_was(tmp_path, monkeypatch):
    """The last one: nothing of its blobs stays behind it."""
    monkeypatch.setattr(packing, "BLOCK_BYTES", 10_000)
    noise = random_bytes("BF16", (99, 103), 2 * 99 * 103)
    write_file(tmp_path / "plain", {"a": bf16(100, 96), "noise": noise})
    packed = packing.pack_file(tmp_path / "plain", tmp_path / "packed", torch.device(DEVICE), lambda nbytes: None)
    assert (packed.num_tensors, packed.num_raw) == (2, 1)
    assert (tmp_path / "packed").read_bytes().endswith(noise.data)
    assert packed.packed_bytes == (tmp_path / "packed").stat().st_size


def test_an_empty_directory_may_be_there(plain, packed, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert run("pack", "--model", plain, "--out", tmp_path / "link") == 0
    assert (tmp_path / "empty/model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["empty", "link", "packed", "plain"]


def test_refusals(plain, packed, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert "pack: --out DIR says where to write" in refused(capsys, "pack", "--model", plain)
    assert f"--model {plain}: is not packed" in refused(capsys, "pack", "--model", plain, "--verify")
    assert f"--model {plain}: is not packed" in refused(capsys, "unpack", "--model", plain, "--out", out)
    for more in ((), ("--verify",)):
        assert f"--model {packed}: is packed already" in refused(capsys, "pack", "--model", packed, "--out", out, *more)
    assert "no such file or directory" in refused(capsys, "pack", "--model", tmp_path / "nowhere", "--out", out)
    assert "no such directory" in refused(capsys, "pack", "--model", plain / "config.json", "--out", out)
    for command, model in (("pack", plain), ("unpack", packed)):
        for place, why in {
            model: f"lies in {model}, which is read",
            model / "inside": f"lies in {model}, which is read",
            DEMO: "is not empty",
            DEMO / "config.json": "is a file",
            "/proc": "is not empty",
            tmp_path / "no/where": f"there is no directory {tmp_path / 'no'}",
        }.items():
            assert f"--out {place}: {why}" in refused(capsys, command, "--model", model, "--out", place)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
        error = refused(capsys, command, "--model", model, "--out", out)
        assert re.search(f"--out {out}: needs [0-9]+ bytes of disk space, there are 1000 bytes", error)
        monkeypatch.undo()
        (tmp_path / "out.partial").mkdir()
        assert "out.partial, or was broken off" in refused(capsys, command, "--model", model, "--out", out)
        (tmp_path / "out.partial").rmdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: True)
        assert f"--out {out}: is a mount point" in refused(capsys, command, "--model", model, "--out", out)
        monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["packed", "plain"]


def test_what_cannot_be_packed(plain, tmp_path, capsys):
    arguments = ("pack", "--model", plain, "--out", tmp_path / "out")
    with open(plain / "model.safetensors", "ab") as file:
        file.write(b"more")
    assert "model.safetensors: not packed: some of its bytes belong to no tensor" in refused(capsys, *arguments)
    (plain / "loop").symlink_to(plain)
    assert f"{plain / 'loop'}: neither a file nor a directory" in refused(capsys, *arguments)
    (plain / "loop").unlink()
    os.mkfifo(plain / "pipe")
    assert f"{plain / 'pipe'}: neither a file nor a directory" in refused(capsys, *arguments)
    assert os.listdir(tmp_path) == ["plain"]


FAULTS = {  # of each command: where in it one strikes
    "pack": [(packing, "encode"), (packing, "render"), (pack_command, "copy_files"), (pack_command, "verify_file")],
    "unpack": [(unpacking, "_write_exactly"), (new_directory.shutil, "copyfile"), (new_directory, "_sync")],
}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["stopped", "full"])
@pytest.mark.parametrize("command, fault", [(name, fault) for name in FAULTS for fault in FAULTS[name]])
def test_a_broken_run_leaves_nothing(plain, packed, tmp_path, monkeypatch, capsys, command, fault, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(*fault, fail)
    arguments = [command, "--model", {"pack": plain, "unpack": packed}[command], "--out", tmp_path / "out"]
    arguments += ["--verify"] * (command == "pack")
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            run(*arguments)
    else:
        assert f"--out {tmp_path / 'out'}: [Errno 28] No space left" in refused(capsys, *arguments)
    assert sorted(os.listdir(tmp_path)) == ["packed", "plain"]


def test_all_is_on_the_disk_before_it_has_its_name(plain, tmp_path, monkeypatch):
    synced = []

    def sync(path: Path) -> None:
        synced.append((path.name, (tmp_path / "out").exists()))

    monkeypatch.setattr(new_directory, "_sync", sync)
    assert run("pack", "--model", plain, "--out", tmp_path / "out") == 0
    before = {name for name, there in synced if not there}
    assert before == {"model.safetensors", "config.json", "out.partial"} and synced[-1] == (tmp_path.name, True)


ENDING = """
import os, signal, sys
from penstock.engine.commands import pack as pack_command, unpack as unpack_command
from penstock.engine.commands.cli import main

def end(*_, **__):
    os.kill(os.getpid(), int(sys.argv[1]))
    signal.pause()

pack_command.copy_files = unpack_command.copy_files = end
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("command, number", [("pack", signal.SIGTERM), ("unpack", signal.SIGHUP)])
def test_a_run_that_is_asked_to_end_leaves_nothing(plain, packed, tmp_path, command, number):
    """So that the next one is not in its way."""
    arguments = [command, "--model", {"pack": plain, "unpack": packed}[command], "--out", tmp_path / "out"]
    script = [sys.executable, "-c", ENDING, int(number), *arguments, "--device", "cpu"]
    done = subprocess.run([*map(str, script)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (128 + number, "")
    assert sorted(os.listdir(tmp_path)) == ["packed", "plain"]


def test_signals_are_as_they_were_after_a_run(plain, tmp_path):
    """One that is ignored, as nohup does, is ignored in the run too."""
    kept = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with new_directory.new_directory(tmp_path / "out", plain, 0):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
            os.kill(os.getpid(), signal.SIGHUP)
        assert (tmp_path / "out").is_dir()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, kept)


def test_it_may_run_in_a_thread(plain, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        assert thread.submit(run, "pack", "--model", plain, "--out", tmp_path / "out").result() == 0


def test_a_header_that_a_packed_one_cannot_hold_is_refused(plain, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packing, "MAX_HEADER_BYTES", 1000)
    error = refused(capsys, "pack", "--model", plain, "--out", tmp_path / "out")
    assert re.search(
        r"model\.safetensors: not packed: a packed file's header could not hold its own of \d+ bytes", error
    )
    assert sorted(os.listdir(tmp_path)) == ["plain"]


def test_pointers_are_not_packed(plain, tmp_path, capsys):
    (plain / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    error = refused(capsys, "pack", "--model", plain, "--out", tmp_path / "out")
    assert "model.safetensors: is a git-lfs pointer" in error
