"""One connection to one Redis node that many tasks use at once: auto-pipelining.

Intuition: a bus instead of a taxi for each. All calls made within one turn of the event loop leave together in one
write, and since Redis answers in order, the n-th reply belongs to the n-th call. There is no lock, no queue between
tasks and no timer a call: a future, a line in a deque, and one sweep a connection that looks at the oldest call.

Rules:
- A caller that gives up leaves its place in the line; its reply is read and dropped.
- A call without a reply after `timeout_s` fails; a connection that was silent for as long while calls waited is cut.
- When the connection breaks, calls on the way fail at once (they may or may not have been carried out). The first
  attempt to
  reconnect is made at once and new calls wait for it; if it fails, calls fail at once until an attempt in the
  background succeeds. An attempt connects, authenticates and gets an answer, so one probe stands for all: this is the
  half-open breaker.
- Deadlines are the event loop's time, as all of asyncio's are.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, cast

import hiredis

from headrace.errors import CacheRefused, CacheUnavailable

_MORE = object()
_WAIT_FIRST_S = 0.05
_FLAP_S = 1.0
_WRITE_BUFFER_MAX = 32 * 1024 * 1024
_REPLY_BYTES_MAX = 256 * 1024 * 1024


class Link(Protocol):
    """A connection as the driver set it up: what keeps it alive, and how to end it."""

    def close(self) -> None:
        """Close at once, without waiting."""


Dial = Callable[["Wire"], Awaitable[Link]]
"""Connects, authenticates, hands the transport to the Wire; raises CacheUnavailable."""


class Watcher(Protocol):
    """Who is told of what happens to a connection."""

    def on_up(self, pipeline: "Pipeline") -> None:
        """The connection stands."""

    def on_lost(self, pipeline: "Pipeline", reason: str) -> None:
        """The connection broke; the next attempt begins at once."""

    def on_down(self, pipeline: "Pipeline", reason: str) -> None:
        """An attempt to connect failed; calls fail at once from now on."""

    def on_push(self, pipeline: "Pipeline", message: list[Any]) -> None:
        """The server sent something unasked (RESP3)."""


class Wire(asyncio.Protocol):
    """The bytes of one connection: matches replies to calls in order."""

    __slots__ = (
        "_batches",
        "_loop",
        "_on_push",
        "_reader",
        "answered",
        "ended",
        "heard_at",
        "pending",
        "sent",
        "transport",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, on_push: Callable[[list[Any]], None]) -> None:
        self._loop = loop
        self._on_push = on_push
        self._reader = hiredis.Reader(replyError=CacheRefused, notEnoughData=_MORE)
        self._reader.setmaxbuf(64 * 1024)
        self._batches: deque[tuple[float, int]] = deque()
        self.pending: deque[asyncio.Future[Any]] = deque()
        self.sent = 0
        self.answered = 0
        self.heard_at = loop.time()
        self.ended: asyncio.Future[str] = loop.create_future()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take over a connection that is authenticated already."""
        # uvloop's transports do not inherit from asyncio.Transport.
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Hand each complete reply to the call that it answers."""
        self.heard_at = self._loop.time()
        reader = self._reader
        take = self.pending.popleft
        answered = 0
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _MORE:
                kind = reply.__class__
                if kind is hiredis.PushNotification:
                    self._on_push(reply)
                    continue
                future = take()
                answered += 1
                if future.done():
                    continue
                if kind is CacheRefused:
                    future.set_exception(reply)
                else:
                    future.set_result(reply)
        except (hiredis.HiredisError, IndexError) as error:
            self.cut(f"the server broke the protocol: {error}")
        self.answered += answered
        if reader.len() > _REPLY_BYTES_MAX:
            self.cut(f"a reply is larger than {_REPLY_BYTES_MAX} bytes")

    def connection_lost(self, exc: Exception | None) -> None:
        """Every call on the way fails: whether it was carried out is unknown."""
        if not self.ended.done():
            self.ended.set_result(str(exc) if exc else "the server closed the connection")
        self._fail_all()

    def cut(self, reason: str) -> None:
        """End the connection; every call on the way fails."""
        if not self.ended.done():
            self.ended.set_result(reason)
        if self.transport is not None:
            self.transport.abort()
        self._fail_all()

    def send(self, data: bytes, futures: list["asyncio.Future[Any]"], deadline: float) -> None:
        """Write the packed calls whose replies the futures wait for."""
        if self.transport is None or self.ended.done():
            _fail(futures, "the connection is lost")
            return
        self.pending.extend(futures)
        self.sent += len(futures)
        self._batches.append((deadline, self.sent))
        self.transport.write(data)

    def is_clogged(self) -> bool:
        """Whether the server takes bytes so slowly that more must not be queued."""
        return self.transport is not None and self.transport.get_write_buffer_size() > _WRITE_BUFFER_MAX

    def expire(self, now: float, timeout_s: float) -> bool:
        """Fail calls whose deadline passed; cut a silent connection. True while calls are on the way."""
        batches = self._batches
        while batches and batches[0][1] <= self.answered:
            batches.popleft()
        late = 0
        while batches and batches[0][0] <= now:
            late = batches.popleft()[1] - self.answered
        for future in list(self.pending)[:late] if late else ():
            if not future.done():
                future.set_exception(CacheUnavailable(f"Redis did not answer within {timeout_s:g} s."))
        if late and self.heard_at <= now - timeout_s:
            self.cut(f"no answer within {timeout_s:g} s")
        return bool(self.pending)

    def _fail_all(self) -> None:
        _fail(self.pending, "the connection was lost before the reply")
        self.pending.clear()


def _fail(futures: "deque[asyncio.Future[Any]] | list[asyncio.Future[Any]]", reason: str) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(CacheUnavailable(f"Redis call failed: {reason}."))
            # A caller that left through another exception never looks: that is no bug to report.
            future.exception()


class Pipeline:
    """A node of the shared tier, connected or being connected to."""

    def __init__(
        self,
        name: str,
        dial: Dial,
        watcher: Watcher,
        *,
        timeout_s: float,
        connect_timeout_s: float,
        pending_max: int,
        wait_max_s: float,
        rng: Callable[[], float],
    ) -> None:
        self.name = name
        self._dial = dial
        self._watcher = watcher
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._pending_max = pending_max
        self._wait_max_s = wait_max_s
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._wire: Wire | None = None
        self._down: str | None = None
        self._packed: list[bytes] = []
        self._unsent: list[asyncio.Future[Any]] = []
        self._flush_due = False
        self._sweep: asyncio.TimerHandle | None = None
        self._decided = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        state = f"down: {self._down}" if self._down else "up" if self._wire else "connecting"
        return f"<Pipeline {self.name} {state}>"

    @property
    def is_up(self) -> bool:
        """Whether a call would be sent now."""
        return self._wire is not None

    async def open(self) -> None:
        """Start connecting and return when the first attempt succeeded or failed."""
        if self._keeper is None:
            self._keeper = self._loop.create_task(self._keep_connected())
            self._keeper.add_done_callback(self._stand_down)
        await self._decided.wait()
        if self._keeper.done() and not self._keeper.cancelled():
            self._keeper.result()

    async def close(self) -> None:
        """Drop the connection; calls on the way and calls from now on fail."""
        self._down = "the cache is closed"
        while self._keeper is not None and not self._keeper.done():
            # More than once: `asyncio.wait_for`, which the driver uses, can swallow a cancellation before Python 3.12.
            self._keeper.cancel()
            await asyncio.wait([self._keeper], timeout=self._timeout_s)
        if self._sweep is not None:
            self._sweep.cancel()
        self._drop_unsent("the cache was closed")

    def call(self, packed: bytes) -> "asyncio.Future[Any]":
        """Send one packed command with everything else of this turn of the loop; the future holds its reply.

        The future raises CacheUnavailable, or CacheRefused when the server answers with an error.
        """
        future: asyncio.Future[Any] = self._loop.create_future()
        wire = self._wire
        if wire is None:
            if self._down is not None:
                future.set_exception(CacheUnavailable(f"Redis at {self.name} is away: {self._down}."))
                return future
            full = len(self._unsent) >= self._pending_max
        else:
            full = len(self._unsent) + len(wire.pending) >= self._pending_max
        if full:
            future.set_exception(CacheUnavailable(f"{self._pending_max} calls to {self.name} are on the way already."))
            return future
        self._packed.append(packed)
        self._unsent.append(future)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)
        return future

    def cut(self, reason: str) -> None:
        """Break the connection on purpose and make a new one."""
        if self._wire is not None:
            self._wire.cut(reason)

    def _flush(self) -> None:
        self._flush_due = False
        wire = self._wire
        if wire is None or not self._unsent:
            return
        if wire.is_clogged():
            self._drop_unsent("the server takes no more bytes")
            return
        packed, unsent = self._packed, self._unsent
        self._packed, self._unsent = [], []
        wire.send(b"".join(packed), unsent, self._loop.time() + self._timeout_s)
        if self._sweep is None:
            self._sweep = self._loop.call_later(self._timeout_s / 4, self._expire)

    def _expire(self) -> None:
        self._sweep = None
        wire = self._wire
        if wire is not None and wire.expire(self._loop.time(), self._timeout_s):
            self._sweep = self._loop.call_later(self._timeout_s / 4, self._expire)

    async def _keep_connected(self) -> None:
        failures = 0
        while True:
            started = self._loop.time()
            connected, reason = await self._connect_once()
            if connected and self._loop.time() - started >= _FLAP_S:
                failures = 0
                continue
            failures += 1
            if connected and failures == 1:
                continue
            self._fall(reason)
            # Full jitter (Brooker, "Exponential Backoff And Jitter", 2015), so that a fleet does not come back at
            # once.
            ceiling = min(self._wait_max_s, _WAIT_FIRST_S * 2 ** min(failures, 16))
            await asyncio.sleep(ceiling * (0.5 + self._rng() / 2))

    async def _connect_once(self) -> tuple[bool, str]:
        """Connect and stay until the connection ends: whether it ever stood, and why it ended or did not begin."""
        wire = Wire(self._loop, self._push)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                link = await self._dial(wire)
        except CacheUnavailable as error:
            return False, error.message
        except TimeoutError:
            return False, f"no connection within {self._connect_timeout_s:g} s"
        try:
            self._rise(wire)
            return True, await wire.ended
        finally:
            self._wire = None
            wire.cut("the cache was closed")
            link.close()
            self._watcher.on_lost(self, wire.ended.result())

    def _stand_down(self, keeper: "asyncio.Task[None]") -> None:
        """Nobody reconnects any more: calls must not wait for it."""
        self._down = self._down or "the connection is not kept up any more"
        self._drop_unsent(self._down)
        self._decided.set()

    def _rise(self, wire: Wire) -> None:
        self._wire = wire
        self._down = None
        self._decided.set()
        self._watcher.on_up(self)
        self._flush()

    def _fall(self, reason: str) -> None:
        self._down = reason
        self._drop_unsent(reason)
        self._decided.set()
        self._watcher.on_down(self, reason)

    def _drop_unsent(self, reason: str) -> None:
        unsent = self._unsent
        self._packed, self._unsent = [], []
        _fail(unsent, reason)

    def _push(self, message: list[Any]) -> None:
        self._watcher.on_push(self, message)
