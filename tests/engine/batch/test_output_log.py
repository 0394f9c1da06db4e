"""The output as a log: whole lines or none, one writer, a torn tail cut, and what is said when it takes no more."""

import errno
import fcntl
import os
import resource
import threading
from contextlib import closing

import pytest
from penstock.engine.batch import syncing
from penstock.engine.batch.output_log import OutputLog
from penstock.engine.batch.row_form import RowForm

from tests.support.batch_jobs import begin_in_fork, status_of

JOB = "0123456789abcdef" * 4
ONE, TWO, THREE, FOUR = (
    f'{{"id": "batch_req_0123456789abcdef_{number}", "custom_id": "a", "error": null}}\n'.encode()
    for number in range(4)
)


def read(log: OutputLog) -> list[tuple[int, bytes]]:
    return list(log.rows(RowForm(JOB)))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.mark.parametrize("tail", [b"", THREE[:-1], THREE[:20], b"{", b"\0" * 9, b"\0\0\nwreck\n" + THREE[:9]])
def test_a_torn_tail_is_cut_and_rows_follow_the_last_whole_one(file, tail):
    file.write_bytes(ONE + TWO + tail)
    with closing(OutputLog("-o", file)) as log:
        assert read(log) == [(0, ONE), (len(ONE), TWO)]
        log.append([THREE, FOUR])
    assert file.read_bytes() == ONE + TWO + THREE + FOUR


@pytest.mark.parametrize(
    "content, line",
    [
        (ONE + b"wreck\n" + TWO, 2),
        (ONE + b"\0\n" + TWO, 2),
        (b"my letters", 1),
        (b"my letters\n", 1),
        (ONE.replace(b"0123", b"3210"), 1),
        (ONE + TWO[:-3] + b"\n", 2),
    ],
)
def test_what_no_kill_leaves_is_refused_and_left_alone(file, content, line):
    file.write_bytes(content)
    with closing(OutputLog("-o", file)) as log, pytest.raises(ValueError, match=f"line {line}: is no row of this job"):
        read(log)
    assert file.read_bytes() == content


def test_a_file_that_got_nothing_is_gone_again(file):
    OutputLog("-o", file).close()
    assert not file.exists()


def test_an_empty_file_of_the_users_stays(file):
    file.touch()
    OutputLog("-o", file).close()
    assert file.exists()


def test_a_file_written_anew_stays_behind_its_link_and_keeps_its_mode(file, tmp_path):
    (tmp_path / "far").mkdir()
    far = tmp_path / "far/rows"
    far.write_bytes(ONE)
    far.chmod(0o640)
    file.symlink_to(far)
    with closing(OutputLog("-o", file)) as log:
        log.rewrite([TWO])
        log.append([THREE])
    assert file.is_symlink() and far.read_bytes() == TWO + THREE
    assert far.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("how", ["here", "in another process"])
def test_there_is_one_writer(file, how):
    def second() -> int:
        with pytest.raises(ValueError, match="out.jsonl: another job writes it now$"):
            OutputLog("-o", file)
        return 0

    with closing(OutputLog("-o", file)) as log:
        log.append([ONE])
        assert second() == 0 if how == "here" else status_of(begin_in_fork(second)) == 0
        log.rewrite([TWO])  # the lock goes on with the new file
        assert second() == 0
    with closing(OutputLog("-o", file)) as log:
        assert read(log) == [(0, TWO)]


def test_a_file_that_is_replaced_before_it_is_locked_is_opened_anew(file, monkeypatch):
    """As by another process, which has sorted it."""
    flock = fcntl.flock

    def replaced_before(descriptor, operation):
        monkeypatch.undo()
        new = file.with_name("new")
        new.write_bytes(ONE)
        new.rename(file)
        flock(descriptor, operation)

    file.write_bytes(TWO)
    monkeypatch.setattr(fcntl, "flock", replaced_before)
    with closing(OutputLog("-o", file)) as log:
        assert read(log) == [(0, ONE)]
        log.append([THREE])
    assert file.read_bytes() == ONE + THREE


def test_a_file_system_without_locks_is_refused(file, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match=r"out.jsonl: cannot be locked there: No locks available \(flock has to work"):
        OutputLog("-o", file)


def test_the_rows_of_a_pass_are_one_write(file, monkeypatch):
    written, write = [], os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: written.append(bytes(data)) or write(descriptor, data))
    with closing(OutputLog("-o", file)) as log:
        log.append([ONE, TWO])
    assert written == [ONE + TWO]


def test_a_file_written_anew_is_on_disk_before_it_takes_the_place_of_the_old_one(file, monkeypatch):
    done, fsync, rename = [], os.fsync, os.rename

    def synced(descriptor):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    with closing(OutputLog("-o", file)) as log:
        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "rename", lambda *names: done.append("renamed") or rename(*names))
        log.rewrite([ONE])
    assert done[:3] == ["out.jsonl.job.rows", "renamed", file.parent.name]


def test_a_full_disk_leaves_whole_lines_and_says_so(file):
    """A limit on the size of files: a write is cut short there, and the next one fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(OutputLog("-o", file)) as log:
        log.append([ONE, TWO])
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * len(ONE) - 9, limits[1]))
        try:
            with pytest.raises(ValueError, match=r"out.jsonl: File too large \(the rows before it are kept: make room"):
                log.append([THREE, FOUR])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert file.read_bytes() == ONE + TWO


def test_a_full_disk_while_a_new_file_is_made_leaves_the_old_one(file):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(OutputLog("-o", file)) as log:
        log.append([ONE])
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * len(ONE) - 9, limits[1]))
        try:
            with pytest.raises(ValueError, match="out.jsonl: File too large"):
                log.rewrite([ONE] * 9)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        log.append([TWO])
    assert file.read_bytes() == ONE + TWO and [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_an_output_that_is_gone_is_noticed_before_more_is_written(file, how):
    with closing(OutputLog("-o", file)) as log:
        log.append([ONE])
        file.unlink()
        if how == "replaced":
            file.write_bytes(b"mine\n")
        for write in (log.append, log.rewrite):
            with pytest.raises(ValueError, match="out.jsonl: was removed or replaced while the job ran"):
                write([TWO])
    assert file.exists() == (how == "replaced") and (how == "removed" or file.read_bytes() == b"mine\n")


def test_rows_are_synced_by_themselves_and_a_failed_sync_ends_the_job(file, monkeypatch):
    synced, fails = threading.Event(), threading.Event()

    def fsync(descriptor):
        failing = fails.is_set()  # as it began: who waits for `synced` may set it before this ends
        synced.set()
        if failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(syncing.os, "fsync", fsync)
    assert syncing.MOST_S <= 0.5 and syncing.MOST_ROWS == 256
    with closing(OutputLog("-o", file)) as log:
        log.append([ONE])
        assert synced.wait(timeout=60)
        fails.set()
        synced.clear()
        log.append([TWO])
        assert synced.wait(timeout=60)
        with pytest.raises(ValueError, match="out.jsonl: Input/output error"):
            log.sync()
        with pytest.raises(ValueError, match="out.jsonl: Input/output error"):
            log.append([THREE])


def test_many_rows_are_synced_at_once(file, monkeypatch):
    synced, waits = threading.Event(), threading.Event()
    monkeypatch.setattr(syncing, "MOST_S", 3600.0)
    monkeypatch.setattr(syncing.os, "fsync", lambda descriptor: synced.set())
    with closing(OutputLog("-o", file)) as log:
        news = log._syncing._news
        wait_for = news.wait_for
        news.wait_for = lambda comes, timeout=None: (timeout and waits.set()) or wait_for(comes, timeout)
        log.append([ONE])
        assert waits.wait(timeout=60), "for more rows"
        log.append([TWO] * syncing.MOST_ROWS)
        assert synced.wait(timeout=60)
