"""One end of the pair of sockets between front and engine. It never waits: what the other side does not take yet is
kept, which the answers of the requests that were let in bound."""

import contextlib
import select
import socket
import threading
import time

from penstock.engine.server.messages import Message, of_line, to_line

READ_BYTES = 1 << 18


class Channel:
    """Sends from any thread, and receives in one."""

    def __init__(self, own_end: socket.socket):
        own_end.setblocking(False)
        self._socket = own_end
        self._unsent, self._received = bytearray(), bytearray()
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """The descriptor, for whoever waits for it."""
        return self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        """Tells whether there is something that the other side has no room for."""
        return bool(self._unsent)

    def send(self, message: Message) -> None:
        """Sends a message, or keeps what there is no room for; `flush` goes on."""
        line = to_line(message)
        with self._lock:
            self._unsent += line
            self._send()

    def flush(self, within_s: float = 0.0) -> None:
        """Sends what is kept, as far as there comes to be room in that time."""
        end_s = time.monotonic() + within_s
        while self._unsent:
            with self._lock:
                self._send()
            if not self._unsent or (left_s := end_s - time.monotonic()) <= 0:
                return
            self._poll(select.POLLOUT, left_s)

    def wait(self) -> None:
        """Waits until something has come, or the other side has gone; meanwhile sends what is kept."""
        while not self._poll(select.POLLIN | (select.POLLOUT if self._unsent else 0)) & ~select.POLLOUT:
            self.flush()

    def receive(self) -> list[Message]:
        """The messages that have come. Raises EOFError once the other side has gone and all that it said was given."""
        has_line = has_ended = False
        while True:
            try:
                data = self._socket.recv(READ_BYTES)
            except BlockingIOError:
                break
            except OSError:  # it has gone before it had read everything
                data = b""
            if not data:
                has_ended = True
                break
            self._received += data
            has_line = has_line or b"\n" in data
        if not has_line:
            if has_ended:
                raise EOFError("the other side has gone")
            return []
        *lines, self._received = self._received.split(b"\n")
        return [of_line(line) for line in lines]

    def deafen(self) -> None:
        """Ends what this end receives, so that a thread which waits for it goes on."""
        with contextlib.suppress(OSError):  # the other side has gone
            self._socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Closes this end; what is kept is lost."""
        self._socket.close()

    def _send(self) -> None:
        """Sends as much as there is room for. To who has gone nothing is said: `receive` tells that."""
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()

    def _poll(self, events: int, most_s: float | None = None) -> int:
        """Waits for one of these events, at most so long; returns those that there are."""
        poll = select.poll()
        poll.register(self._socket, events)
        found = poll.poll(None if most_s is None else 1e3 * most_s)
        return found[0][1] if found else 0
