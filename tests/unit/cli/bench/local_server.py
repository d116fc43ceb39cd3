"""A server on the test's own event loop whose behaviour is a function: exact stalls, cut connections, odd answers."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

Behaviour = Callable[["LocalServer", asyncio.Transport, int, bytes], None]


class LocalServer:
    """Calls its behaviour with every request's transport, its number from 0 on, and its bytes."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.requests = 0
        self.connections = 0
        self.transports: set[asyncio.Transport] = set()
        self.listener: asyncio.Server | None = None
        self.url = ""

    def close(self) -> None:
        """Listen no more and cut every connection."""
        if self.listener is not None:
            self.listener.close()
        for transport in list(self.transports):
            transport.abort()


class Requests(asyncio.Protocol):
    def __init__(self, server: LocalServer) -> None:
        self.server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.server.connections += 1
        self.server.transports.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.transports.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        number = self.server.requests
        self.server.requests += 1
        self.server.behaviour(self.server, self.transport, number, data)


@asynccontextmanager
async def serving(behaviour: Behaviour) -> AsyncIterator[LocalServer]:
    """A server on a free port, closed at the end with all its connections."""
    server = LocalServer(behaviour)
    with socket.socket() as place:  # bound to the end: nobody else listens there once the server listens no more
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(("127.0.0.1", 0))
        host, port = place.getsockname()
        server.listener = await asyncio.get_running_loop().create_server(lambda: Requests(server), host, port)
        server.url = f"http://{host}:{port}"
        try:
            yield server
        finally:
            server.close()
            await server.listener.wait_closed()


def answer(server: LocalServer, transport: asyncio.Transport, number: int, data: bytes) -> None:
    """The behaviour of a server without any."""
    transport.write(OK)
