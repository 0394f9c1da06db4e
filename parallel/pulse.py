"""The pulse between ranks, by which each knows which others live: every rank says so twice a second, and says why it
leaves. Torch-free.

TCP connections join every rank to rank 0, and each rank has a thread for them. A message is a line: an empty line is a
beat; a line of JSON says that a rank has failed (which, why, with its traceback), or that it leaves. Rank 0 passes a
failure on to all, so the first one that reaches rank 0 is the cause that all ranks raise.

    a rank raises       it says so before it leaves, whether or not its process goes on
    a rank is killed    its connection ends without a word, or Linux says that its process is gone
    a rank is stopped   no beats come for STOPPED_S, and Linux says that its process is stopped
    on another host     a rank on that host asks Linux, and tells rank 0; or no beats come for SILENT_S

A process that Linux calls alive may be silent for any time: it compiles, loads, or holds Python's lock. This file does
not know what becomes of this rank after a failure (guard.py), nor the launcher (children.py).
"""

import contextlib
import json
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from penstock.parallel.failure import RankFailed
from penstock.parallel.processes import GONE, STOPPED, UNKNOWN, Process, Watched

BEAT_S = 0.5
STOPPED_S = 4.0
SILENT_S = 60.0
_SEND_S = 2.0
_ECHO_S = 1.0
_LEAVE_S = 1.0
_MOST_BYTES = 1 << 20  # of a line
_MOST_TRACEBACK = 16_000  # characters of a traceback that are sent
ENDED = "ended without a word (was it killed?)"


class Pulse:
    """The pulse of this rank. `failure` is the first failure of which it heard, its own included. The pulse's thread
    calls `on_failure` with it once, unless it is this rank's own. `left` are the ranks that have left."""

    def __init__(self, rank: int, processes: list[Process], on_failure: Callable[[RankFailed], None]):
        self.rank, self.processes = rank, processes
        self.failure: RankFailed | None = None
        self.left: set[int] = set()
        self._on_failure = on_failure
        self._selector = selectors.DefaultSelector()
        self._sockets: dict[int, socket.socket] = {}
        self._received: dict[int, bytes] = {}
        self._quiet_s = dict.fromkeys(range(len(processes)) if rank == 0 else (0,), 0.0)
        self._quiet_s.pop(rank, None)
        host = processes[rank].host  # if it is not rank 0's, this rank asks Linux there in its place
        near = [other for other, one in enumerate(processes) if other != rank and one.host == host]
        self._neighbours = {other: Watched(processes[other]) for other in near if host != processes[0].host}
        self._listener: socket.socket | None = None
        self._token = secrets.token_hex(16)
        self._lock = threading.RLock()
        self._echoed = threading.Event()
        self._leaving = False
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def host(self, addresses: list[str]) -> str:
        """Starts the pulse on rank 0, and returns the text that the others need to `join`. `addresses` are those of
        rank 0; there are none where all ranks share this host."""
        family = socket.AF_INET6 if any(":" in address for address in addresses) else socket.AF_INET
        self._listener = socket.create_server(("" if addresses else "127.0.0.1", 0), family=family)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._thread.start()
        port = self._listener.getsockname()[1]
        return json.dumps({"addresses": addresses or ["127.0.0.1"], "port": port, "token": self._token})

    @property
    def is_whole(self) -> bool:
        """Tells, on rank 0, whether every other rank has joined and so hears this one."""
        return len(self._sockets) == len(self._quiet_s)

    def join(self, where: str) -> None:
        """Starts the pulse on a rank other than 0. Raises OSError if rank 0 cannot be reached."""
        told = json.loads(where)
        for address in told["addresses"]:
            try:
                rank_0 = socket.create_connection((address, told["port"]), timeout=_SEND_S)
                break
            except OSError:
                if address == told["addresses"][-1]:
                    raise
        rank_0.sendall(_line({"token": told["token"], "rank": self.rank}))
        self._add(0, rank_0)
        self._thread.start()

    def say_failed(self, failure: RankFailed) -> None:
        """Tells the others that this rank has failed, unless one failed before; waits until rank 0 has heard it."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure = failure
        self._send_all(_failure_line(failure))
        if self.rank > 0:
            self._echoed.wait(_ECHO_S)

    def leave(self) -> None:
        """Tells the others that this rank leaves, and ends the pulse; idempotent."""
        if self._leaving:
            return
        self._leaving = True
        self._send_all(_line({"leaves": self.rank}))
        if self.failure is not None:
            self._drop(self.failure.rank)  # it may be stopped, and would be waited for
        if self._thread.ident not in (None, threading.get_ident()):  # the garbage collector may call this in any thread
            self._thread.join(_LEAVE_S)
        for peer in list(self._sockets):
            self._drop(peer)
        if self._thread.ident is None:
            self._close()

    def _run(self) -> None:
        beat_at = time.monotonic()
        while not (self._leaving and not self._sockets):
            for key, _ in self._selector.select(BEAT_S):
                self._accept() if key.data is None else self._read(key.data)
            elapsed_s = time.monotonic() - beat_at
            if elapsed_s >= BEAT_S:
                beat_at += elapsed_s
                self._send_all(b"\n")
                self._judge(min(elapsed_s, 2 * BEAT_S))  # if this thread slept, the others were not silent
                self._look()
        self._close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            connection, _ = self._listener.accept()
            connection.settimeout(_SEND_S)
            hello, rest = _first_line(connection)
            if secrets.compare_digest(hello["token"], self._token) and hello["rank"] in self._quiet_s:
                self._add(hello["rank"], connection)
                self._take(hello["rank"], rest)
            else:
                connection.close()
        if self.is_whole:
            self._stop_listening()

    def _add(self, peer: int, connection: socket.socket) -> None:
        connection.settimeout(_SEND_S)
        self._received[peer] = b""
        self._sockets[peer] = connection
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _read(self, peer: int) -> None:
        try:
            data = self._sockets[peer].recv(1 << 16)
        except KeyError:  # leave() has dropped it
            return
        except OSError:
            data = b""
        if data:
            self._take(peer, data)
            return
        self._drop(peer)
        if peer not in self.left:
            self._hear(RankFailed(peer, ENDED))

    def _take(self, peer: int, data: bytes) -> None:
        self._quiet_s[peer] = 0.0
        *lines, self._received[peer] = (self._received[peer] + data)[-_MOST_BYTES:].split(b"\n")
        for line in filter(None, lines):
            message = json.loads(line)
            if "leaves" in message:
                self.left.add(message["leaves"])
                self._drop(peer)
            else:
                self._hear(RankFailed(**message))

    def _judge(self, elapsed_s: float) -> None:
        for peer in self._quiet_s.keys() - self.left:
            self._quiet_s[peer] += elapsed_s
            quiet_s = self._quiet_s[peer]
            state = self.processes[peer].state() if quiet_s > STOPPED_S else None
            if state == STOPPED:
                self._hear(RankFailed(peer, stopped_for(STOPPED_S), stopped=True))
            elif state == GONE:
                self._hear(RankFailed(peer, ENDED))
            elif state == UNKNOWN and quiet_s > SILENT_S:
                self._hear(RankFailed(peer, f"gave no sign of life for {SILENT_S:.0f} s", stopped=True))

    def _look(self) -> None:
        """Tells rank 0, which passes it on, of a stopped rank that only this host can see."""
        for rank in [rank for rank, one in self._neighbours.items() if one.stopped_s() > STOPPED_S]:
            del self._neighbours[rank]
            self._send_all(_failure_line(RankFailed(rank, stopped_for(STOPPED_S), stopped=True)))

    def _hear(self, failure: RankFailed) -> None:
        """Takes a failure, and passes on the first one."""
        with self._lock:
            is_first, own = self.failure is None, failure.rank == self.rank
            if is_first:
                self.failure = failure
        self._echoed.set()
        if is_first and not self._leaving:
            if self.rank == 0:
                self._send_all(_failure_line(failure))
            if not own:
                self._on_failure(failure)

    def _send_all(self, line: bytes) -> None:
        with self._lock:
            for connection in list(self._sockets.values()):
                with contextlib.suppress(OSError):  # _read will find out why
                    connection.sendall(line)

    def _drop(self, peer: int) -> None:
        with self._lock:
            connection = self._sockets.pop(peer, None)
            if connection is not None:
                with contextlib.suppress(OSError, ValueError, KeyError):
                    self._selector.unregister(connection)
                connection.close()

    def _stop_listening(self) -> None:
        with self._lock:
            listener, self._listener = self._listener, None
            if listener is not None:
                self._selector.unregister(listener)
                listener.close()

    def _close(self) -> None:
        self._stop_listening()
        self._selector.close()


def stopped_for(seconds: float) -> str:
    """Completes the sentence "rank N ..." for a stopped rank."""
    return f"was stopped (SIGSTOP) for more than {seconds:.0f} s"


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _failure_line(failure: RankFailed) -> bytes:
    text = failure.traceback_text[-_MOST_TRACEBACK:]
    return _line({"rank": failure.rank, "cause": failure.cause, "traceback_text": text, "stopped": failure.stopped})


def _first_line(connection: socket.socket) -> tuple[dict[str, Any], bytes]:
    """Receives the first line and the bytes behind it. Raises OSError if no line comes in time."""
    received = b""
    while b"\n" not in received:
        data = connection.recv(4096)
        if not data or len(received) > 4096:
            raise OSError("no greeting")
        received += data
    line, _, rest = received.partition(b"\n")
    return json.loads(line), rest
