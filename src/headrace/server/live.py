"""The live stream: every listener sees the newest snapshot, as server-sent events [1].

Intuition: a departure board, not a mailbox. One ticker writes the newest line on the board; whoever looks reads it. A
slow reader misses lines, and nothing is ever kept for it, so memory is bounded by one frame, however many listen and
however slowly. What the transport itself buffers is bounded by the server's flow control: `send` waits there.

[1] HTML Living Standard, 9.2 "Server-sent events".
"""

import asyncio
from collections.abc import Callable

import msgspec
from starlette.types import Message, Receive, Scope, Send

from headrace.clock import Clock
from headrace.errors import InvalidRequest, MethodNotAllowed, Overloaded
from headrace.monitor.snapshot import Snapshot
from headrace.server.exchange import problem_answer, reply_with

_RETRY_MS = 2_000
"""How long a browser waits before it reconnects; the page adds its own back-off and jitter on top."""

_RETRY_AFTER_S = 10
"""Streams last for hours, so a place rarely frees at once."""

_FAREWELL_S = 0.5
"""How long `close()` lets listeners take the end of their stream; then they are cut."""

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
    (b"x-content-type-options", b"nosniff"),
]

_HEARTBEAT = b": still here\n\n"


class Stale(msgspec.Struct, frozen=True):
    """What `event: stale` carries: the monitor is silent."""

    age_s: float | None
    """Seconds since the newest snapshot was taken; None when there never was one."""


class Live:
    """A pure ASGI app that streams `snapshot()` to everyone who listens.

    Every `interval_s` it asks for the snapshot, which must return at once, and sends `event: snapshot` when there is a
    new one, `event: stale` with `age_s` while there is none or the newest is older than `stale_after_s`, and
    otherwise, after `heartbeat_s` of silence, a comment that keeps proxies from closing the connection. Each event is
    encoded once, whatever the number of streams. Ids rise within a process.

    Above `streams_max` listeners the answer is 503 with Retry-After. A listener that takes nothing for `stalled_s_max`
    is dropped, so that dead peers cannot hold all places. The ticker runs only while someone listens; `close()` ends
    every stream and belongs before the server waits for its connections to drain.
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot | None],
        *,
        clock: Clock,
        interval_s: float = 1.0,
        streams_max: int = 100,
        heartbeat_s: float = 15.0,
        stale_after_s: float = 10.0,
        stalled_s_max: float = 30.0,
    ) -> None:
        self._snapshot = snapshot
        self._clock = clock
        self._interval_s = interval_s
        self._streams_max = streams_max
        self._heartbeat_s = heartbeat_s
        self._stale_after_s = stale_after_s
        self._stalled_s_max = stalled_s_max
        self._feeds: dict[asyncio.Task[None], _Stream] = {}
        self._ticker: asyncio.Task[None] | None = None
        self._closed = False
        self._encoder = msgspec.json.Encoder()
        self._frame = b""
        self._frame_id = 0
        self._shown_at: float | None = None
        self._spoke_at = clock.monotonic()
        self._turn = asyncio.Event()

    @property
    def streams(self) -> int:
        """How many listen now."""
        return len(self._feeds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream to one listener until it leaves, stalls or the server closes."""
        if scope["type"] != "http":
            raise InvalidRequest(f"The live stream speaks http, not {scope['type']}.")
        if scope["method"] not in ("GET", "HEAD"):
            error = MethodNotAllowed(f"The live stream does not take {scope['method']}.")
            await reply_with(send, problem_answer(error, (b"allow", b"GET, HEAD")))
        elif self._closed:
            await _refuse_for_now(send, "This server is shutting down and takes no new streams.")
        elif len(self._feeds) >= self._streams_max:
            await _refuse_for_now(send, f"All {self._streams_max} live streams are taken.")
        elif scope["method"] == "HEAD":
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
            await send({"type": "http.response.body", "body": b""})
        else:
            await self._serve(receive, send)

    async def close(self) -> None:
        """End every stream and the ticker; safe to call twice."""
        self._closed = True
        self._wake()
        if feeds := list(self._feeds):
            await asyncio.wait(feeds, timeout=_FAREWELL_S)
            for feed in feeds:
                feed.cancel()
            await asyncio.wait(feeds)
        await self._stop_ticker()

    async def _serve(self, receive: Receive, send: Send) -> None:
        if self._ticker is None or self._ticker.done():
            self._publish()
            self._ticker = asyncio.get_running_loop().create_task(self._tick_forever())
        async with asyncio.TaskGroup() as tasks:
            stream = _Stream(send, self._clock)
            feed = tasks.create_task(self._feed(stream))
            departure = tasks.create_task(_wait_until_gone(receive))
            self._feeds[feed] = stream
            try:
                await asyncio.wait({feed, departure}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                feed.cancel()
                departure.cancel()
                del self._feeds[feed]
                if not self._feeds:
                    await self._stop_ticker()

    async def _feed(self, stream: "_Stream") -> None:
        seen = 0
        try:
            await stream.open()
            while not self._closed:
                turn = self._turn
                if seen < self._frame_id:
                    seen = self._frame_id
                    await stream.write(self._frame)
                else:
                    await stream.write(_HEARTBEAT)
                await turn.wait()
                if self._ticker is not None and self._ticker.done():
                    self._ticker.result()
            await stream.finish()
        except OSError:
            # How an ASGI server says that the listener left during a send (ASGI 2.4, "Disconnected Client").
            return

    async def _tick_forever(self) -> None:
        try:
            while True:
                await self._clock.sleep(self._interval_s)
                now = self._clock.monotonic()
                if self._publish() or now - self._spoke_at >= self._heartbeat_s:
                    self._spoke_at = now
                    self._wake()
                for feed, stream in self._feeds.items():
                    if stream.stalled_s() > self._stalled_s_max:
                        feed.cancel()
        finally:
            # Should `snapshot()` raise, the streams wake, find the ticker done and raise its error themselves.
            self._wake()

    async def _stop_ticker(self) -> None:
        ticker, self._ticker = self._ticker, None
        if ticker is not None:
            ticker.cancel()
            await asyncio.wait({ticker})

    def _publish(self) -> bool:
        """Put the newest event on the board; False when there is nothing new to say."""
        snapshot = self._snapshot()
        age_s = None if snapshot is None else max(0.0, self._clock.wall() - snapshot.at)
        if snapshot is None or age_s is None or age_s > self._stale_after_s:
            self._shown_at = None
            return self._show(b"stale", Stale(age_s))
        if snapshot.at == self._shown_at:
            return False
        self._shown_at = snapshot.at
        return self._show(b"snapshot", snapshot)

    def _show(self, event: bytes, fact: Snapshot | Stale) -> bool:
        self._frame_id += 1
        self._frame = b"event: %b\nid: %d\ndata: %b\n\n" % (event, self._frame_id, self._encoder.encode(fact))
        return True

    def _wake(self) -> None:
        turn, self._turn = self._turn, asyncio.Event()
        turn.set()


class _Stream:
    """The way to one listener, which knows since when it is stuck in a send."""

    __slots__ = ("_clock", "_send", "_sending_since")

    def __init__(self, send: Send, clock: Clock) -> None:
        self._send = send
        self._clock = clock
        self._sending_since: float | None = None

    async def open(self) -> None:
        await self._transmit({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await self.write(b"retry: %d\n\n" % _RETRY_MS)

    async def write(self, frame: bytes) -> None:
        await self._transmit({"type": "http.response.body", "body": frame, "more_body": True})

    async def finish(self) -> None:
        await self._transmit({"type": "http.response.body", "body": b""})

    def stalled_s(self) -> float:
        return 0.0 if self._sending_since is None else self._clock.monotonic() - self._sending_since

    async def _transmit(self, message: Message) -> None:
        self._sending_since = self._clock.monotonic()
        await self._send(message)
        self._sending_since = None


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _refuse_for_now(send: Send, message: str) -> None:
    error = Overloaded(message, fix=f"Try again in {_RETRY_AFTER_S} s, or poll /api/v1/system/history.")
    await reply_with(send, problem_answer(error, retry_after_s=_RETRY_AFTER_S))
