"""HTTP/1.1 as uvicorn speaks it, with the head of an answer and the first part of its body in one piece.

uvicorn writes a head when the application sends it, and uvloop hands each write to the kernel at once: a small answer
is two system calls and two segments, and wakes its reader twice. ASGI lets a server keep the head until there is a
body (HTTP 2.4, "Response Start"). Here it is kept until then, but no longer than the turn of the event loop: an
application that takes its time for the body has its head on the way meanwhile.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_INTERIM = b"HTTP/1.1 100 "


class _Joining:
    """A transport that joins the first two writes of an answer; everything else is the transport's own."""

    __slots__ = ("_head", "_is_between", "_loop", "_write", "joined")

    def __init__(self, joined: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self.joined = joined
        self._loop = loop
        self._write = joined.write
        self._head = b""
        self._is_between = True
        """Whether the next write is a head."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.joined, name)

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif self._is_between and not data.startswith(_INTERIM):  # which the client waits for before it sends more
            self._is_between, self._head = False, data
            self._loop.call_soon(self._flush)
            return
        self._write(data)

    def finish(self) -> None:
        """The answer is complete, with or without a body."""
        self._flush()
        self._is_between = True

    def close(self) -> None:
        self._flush()
        self.joined.close()

    def _flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._write(head)


class Protocol(HttpToolsProtocol):
    """One connection."""

    transport: Any

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        self.transport = _Joining(transport, self.loop)

    def on_response_complete(self) -> None:
        """An answer has been written."""
        self.transport.finish()
        super().on_response_complete()

    def handle_websocket_upgrade(self) -> None:
        """What follows are no answers."""
        self.transport = self.transport.joined
        super().handle_websocket_upgrade()
