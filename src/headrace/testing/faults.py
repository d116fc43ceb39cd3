"""Networks that fail on demand, between a client and a real server."""

import asyncio
import os
import socket
import struct
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Self

from headrace.clock import Clock, SystemClock

CHUNK_BYTES = 64 * 1024
QUEUED_MAX = 256
"""Chunks on the way in one direction of one connection; beyond it the sender is held up, as by a full socket."""
_RESET = struct.pack("ii", 1, 0)

Passage = Callable[[bytes], tuple[bytes, bool]]
"""What is passed on of a chunk, and whether the connection ends with it."""


class TcpProxy:
    """Passes TCP on to a server, well or badly.

        async with TcpProxy("127.0.0.1:6379") as proxy:
            cache = Cache(remote=RemoteConfig(url=f"redis://{proxy.address}/0"))
            ...
            proxy.deaf()          # nothing passes any more, and nobody is told
            proxy.heal()          # what was held up arrives
            proxy.delay(0.05)     # every byte takes so long, each way
            proxy.cut()           # connections are reset; new ones are welcome
            await proxy.stop()    # nobody listens; `start` listens on the same port again

    `upstream` is "host:port", or the path of a Unix socket. What is told holds for the connections that are there and
    those that come. All methods belong to the event loop that `start` ran on.
    """

    def __init__(self, upstream: str, *, clock: Clock | None = None) -> None:
        self._upstream = upstream
        self._clock = clock if clock is not None else SystemClock()
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._release_port: Callable[[], object] = lambda: None
        self.port = 0
        """Where it listens on 127.0.0.1; stays the same, and its own, over `stop` and `start`."""
        self.accepted = 0
        """Connections so far."""
        self.to_server = Direction(self._clock)
        """From the client to the server: requests."""
        self.to_client = Direction(self._clock)
        """From the server to the client: replies."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()
        self._release_port()

    @property
    def address(self) -> str:
        """`127.0.0.1:port`, once it was started."""
        return f"127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._connections)

    async def start(self) -> None:
        """Listen."""
        self._release_port()
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        self._server = await asyncio.start_server(self._welcome, sock=listener)

    async def stop(self) -> None:
        """Listen no more and reset every connection: new ones are refused."""
        server, self._server = self._server, None
        if server is not None:
            for listener in server.sockets:
                asyncio.get_running_loop().remove_reader(listener)
            try:
                # What was accepted at this very turn still needs the server, to become a connection that can be reset.
                await asyncio.sleep(0)
            finally:
                server.close()
                self._reserve_port()
                self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _reserve_port(self) -> None:
        """Keep the port from being given to anybody else. Nobody listens, so connections are refused."""
        with socket.socket() as reserved:
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as connections that just ended require
            reserved.bind(("127.0.0.1", self.port))
            self._release_port = weakref.finalize(self, os.close, reserved.detach())

    def deaf(self, *, to_server: bool = True, to_client: bool = True) -> None:
        """Hold up what is sent, in both directions or one, until `heal`; connections stay open.

        With `to_server=False` requests arrive and their replies do not: followed by `cut`, the outcome is unknown.
        """
        if to_server:
            self.to_server.hold()
        if to_client:
            self.to_client.hold()

    def delay(self, seconds: float) -> None:
        """Let everything take so long each way, in order and without narrowing what passes at a time."""
        self.to_server.delay_s = self.to_client.delay_s = seconds

    def cut(self, *, after_bytes: int | None = None) -> None:
        """Reset every connection now, or once so many more bytes have passed to its client: in the middle of a reply.

        Connections that come later are not cut.
        """
        for connection in list(self._connections):
            if after_bytes is None:
                connection.cut()
            else:
                connection.cut_after = after_bytes

    def heal(self) -> None:
        """Pass everything on at once, what was held up included; connections that were cut stay so."""
        for connection in self._connections:
            connection.cut_after = None
        self.delay(0.0)
        self.to_server.let_go()
        self.to_client.let_go()

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        connection = Connection(task, writer)
        if self._server is None:
            connection.abort()  # it was stopped while this one was being accepted
            return
        self.accepted += 1
        self._connections.add(connection)
        try:
            server_reader, server_writer = await self._connect()
            connection.writers.append(server_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self.to_server.carry(reader, server_writer, self._requests(connection)))
                group.create_task(self.to_client.carry(server_reader, writer, connection.replies))
        except* (OSError, asyncio.CancelledError):
            connection.abort()  # one end is gone, or it was cut: then so is the other
        finally:
            self._connections.discard(connection)
            for end in connection.writers:
                end.close()

    def _requests(self, connection: "Connection") -> Passage:
        """What becomes of what a client sends; a proxy for one protocol may look into it."""
        return lambda data: (data, False)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._upstream.startswith("/"):
            return await asyncio.open_unix_connection(self._upstream)
        host, _, port = self._upstream.rpartition(":")
        return await asyncio.open_connection(host, int(port))


class Direction:
    """One way through the proxy, for all connections."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._holders: set[object] = set()
        self.delay_s = 0.0
        self.bytes_passed = 0
        """How much has arrived."""

    def hold(self, holder: object = None) -> None:
        """Let nothing through."""
        self._holders.add(holder)
        self._is_open.clear()

    def let_go(self, holder: object = None) -> None:
        """Let everything through, unless another holder does not."""
        self._holders.discard(holder)
        if not self._holders:
            self._is_open.set()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passage: Passage) -> None:
        """Pass on what comes until it ends, or `passage` says so."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_MAX)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._deliver(queue, writer, passage))
            while data := await reader.read(CHUNK_BYTES):
                await queue.put((self._clock.monotonic() + self.delay_s, data))
            await queue.put((self._clock.monotonic() + self.delay_s, b""))

    async def _deliver(
        self,
        queue: asyncio.Queue[tuple[float, bytes]],
        writer: asyncio.StreamWriter,
        passage: Passage,
    ) -> None:
        while True:
            due, data = await queue.get()
            if (pause_s := due - self._clock.monotonic()) > 0:
                await self._clock.sleep(pause_s)
            await self._is_open.wait()
            if not data:
                writer.write_eof()
                return
            passed, is_last = passage(data)
            writer.write(passed)
            await writer.drain()
            self.bytes_passed += len(passed)
            if is_last:
                raise ConnectionResetError


class Connection:
    """Both ends of a client's connection."""

    def __init__(self, task: "asyncio.Task[None]", writer: asyncio.StreamWriter) -> None:
        self._task = task
        self.writers = [writer]
        self.cut_after: int | None = None

    def replies(self, data: bytes) -> tuple[bytes, bool]:
        """The passage of what goes to the client: everything, up to the cut."""
        if self.cut_after is None:
            return data, False
        if len(data) < self.cut_after:
            self.cut_after -= len(data)
            return data, False
        return data[: self.cut_after], True

    def cut(self) -> None:
        """End it now."""
        self.abort()
        self._task.cancel()

    def abort(self) -> None:
        """End both ends as a crash does: with RST, and without a word."""
        for writer in self.writers:
            end: socket.socket | None = writer.get_extra_info("socket")
            if end is not None and end.fileno() >= 0 and end.family != socket.AF_UNIX:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
