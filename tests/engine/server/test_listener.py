"""The socket on which a server listens: no chunk waits for an acknowledgement on its connections."""

import asyncio
import socket

from penstock.engine.server.listener import bind


def test_chunks_do_not_wait_for_acknowledgements():
    async def accepted() -> int:
        made = asyncio.get_running_loop().create_future()

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: asyncio.Transport) -> None:
                given = transport.get_extra_info("socket")
                made.set_result(given.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                transport.close()

        async with await asyncio.get_running_loop().create_server(Protocol, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            return await made

    with bind("127.0.0.1", 0) as listener:
        assert asyncio.run(accepted())
