"""The socket on which a server listens: bound before anything is loaded."""

import socket

TAKES_NOTHING_S = 60  # after which a client that takes nothing is cut off, with what was kept for it


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ValueError if there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio lets no chunk wait for the client's acknowledgement of the one before (TCP_NODELAY), but only where the
    # listener names the protocol: with 0, the default, a token may come 40 ms late.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux has it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TAKES_NOTHING_S * 1000)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return listener
