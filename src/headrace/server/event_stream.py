"""Server-sent events of one thing that ends, for one reader: with ids to go on from, and an end that says so.

Every event has its id, so a reader that lost the connection names the last one in Last-Event-ID and misses and repeats
nothing that is still kept. The last frame is `event: end`; whoever reconnects after it is answered 204, which is how
an EventSource is told to stop [1]. In silence a comment keeps proxies from closing the connection. What a slow reader
does not take is not kept for it: `send` waits for the transport, and what the source drops meanwhile is told as
`event: dropped`.

[1] HTML Living Standard, 9.2 "Server-sent events".
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.types import Message, Receive, Send

from headrace.agents import Emitted
from headrace.errors import HeadraceError, InvalidRequest, Overloaded, RateLimited
from headrace.server.exchange import Answer, problem_answer

_RETRY_MS = 1_000
_RETRY_AFTER_S = 5.0
_FAREWELL_S = 0.5
_ENDED = ".end"
_HEARTBEAT = b": still here\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
    (b"x-content-type-options", b"nosniff"),
]

NO_MORE = Answer(b"", 204, ((b"cache-control", b"no-store"),))
"""What a reader gets who has seen the end."""


def last_seen(header: str | None, after: int | None) -> int | None:
    """The id to go on after, of Last-Event-ID or else of the query; None when the end was seen."""
    if header is None or not header.strip():
        return after or 0
    text = header.strip()
    if text.endswith(_ENDED):
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 16):
        raise InvalidRequest(
            f"Last-Event-ID is {text[:40]!r}, which is no id of an event of an execution.",
            fix="Send the id of the last event that you got, or leave the header out.",
        )
    return int(text)


class Frames:
    """How a stream is written: the words of one protocol. Made for one stream, so it may remember what it wrote."""

    def opening(self) -> bytes:
        """What comes before everything else."""
        return b"retry: %d\n\n" % _RETRY_MS

    def event(self, event: Emitted) -> bytes:
        """An event; empty: nothing is written for it."""
        data = _one_line(bytes(event.data))
        dropped = b'event: dropped\ndata: {"count":%d}\n\n' % event.dropped if event.dropped else b""
        return b"%bid: %d\ndata: %b\n\n" % (dropped, event.id, data)

    def ending(self, last: int, data: bytes) -> bytes:
        """The last frame, after the event with the id `last`; `data` is what the source's `ending` returned."""
        return b"event: end\nid: %d%b\ndata: %b\n\n" % (last, _ENDED.encode(), _one_line(data))

    def problem(self, error: HeadraceError) -> bytes:
        """The last frame of a stream that cannot go on."""
        return b"event: problem\ndata: %b\n\n" % problem_answer(error).body


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is streamed."""

    events: Callable[[], AsyncIterator[Emitted]]
    ending: Callable[[], Awaitable[bytes]]
    """The JSON of the last frame."""
    left: Callable[[], Awaitable[Any]] | None = None
    """What to do when the reader leaves before the end; None: nothing, the work goes on."""
    after: int = 0
    tenant: str = "default"
    frames: Frames = field(default_factory=Frames)


class EventStreams:
    """The streams of one process: at most `streams_max`; `close()` ends them and belongs before a server drains.

    A reader that takes nothing for `stalled_s_max` is dropped, so that dead peers cannot hold all places.
    """

    def __init__(self, *, streams_max: int = 1_000, heartbeat_s: float = 15.0, stalled_s_max: float = 30.0) -> None:
        self._streams_max = streams_max
        self._by_tenant_max = max(1, streams_max // 4)
        self._heartbeat_s = heartbeat_s
        self._stalled_s_max = stalled_s_max
        self._serving: dict[asyncio.Task[bool], str] = {}
        self._closed = asyncio.Event()

    def __len__(self) -> int:
        """How many are read now."""
        return len(self._serving)

    async def close(self) -> None:
        """End every stream; readers come back to another process and go on after their last id."""
        self._closed.set()
        if serving := list(self._serving):
            await asyncio.wait(serving, timeout=_FAREWELL_S)
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)

    def admit(self, tenant: str) -> None:
        """Refuse a stream too many; of one tenant, above a quarter of all places."""
        if self._closed.is_set():
            raise Overloaded("This server is shutting down and takes no new streams.", retry_after_s=1.0)
        if len(self._serving) >= self._streams_max:
            raise Overloaded(
                f"All {self._streams_max:,} event streams of this process are taken.", retry_after_s=_RETRY_AFTER_S
            )
        if sum(each == tenant for each in self._serving.values()) >= self._by_tenant_max:
            raise RateLimited(
                f"The tenant {tenant!r} reads {self._by_tenant_max:,} event streams of this process already.",
                retry_after_s=_RETRY_AFTER_S,
                fix="Close those that are not read.",
            )

    async def serve(self, source: Source, receive: Receive, send: Send, *, is_head: bool = False) -> None:
        """Stream to one reader until the end, its departure or the server's."""
        transmit = _Transmission(send, self._stalled_s_max)
        if is_head:
            await transmit.start(source.frames.opening())
            return await transmit.finish()
        loop = asyncio.get_running_loop()
        feed = loop.create_task(self._feed(source, transmit))
        departure = loop.create_task(_wait_until_gone(receive))
        closing = loop.create_task(self._closed.wait())
        self._serving[feed] = source.tenant
        try:
            await asyncio.wait({feed, departure, closing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._serving[feed]
            has_ended = await _stopped(feed, departure, closing)
        if has_ended:
            return None
        if self._closed.is_set():
            return await transmit.finish()
        if source.left is not None:
            await source.left()
        return None

    async def _feed(self, source: Source, transmit: "_Transmission") -> bool:
        """True when the reader got the end."""
        try:
            await transmit.start(source.frames.opening())
            try:
                last = await self._pass_on(source, transmit)
                await transmit.write(source.frames.ending(last, await source.ending()))
            except HeadraceError as error:
                # The status has left already, so the reader learns it as an event; it may come back.
                await transmit.write(source.frames.problem(error))
            await transmit.finish()
        except (OSError, TimeoutError):
            # How an ASGI server says that the reader left during a send (ASGI 2.4), and a reader that is stuck.
            return False
        return True

    async def _pass_on(self, source: Source, transmit: "_Transmission") -> int:
        """Write every event, and a sign of life in silence; the last id."""
        loop = asyncio.get_running_loop()
        last = source.after
        async with aclosing(cast("AsyncGenerator[Emitted, None]", source.events())) as events:
            following = loop.create_task(_next(events))
            try:
                while True:
                    await asyncio.wait({following}, timeout=self._heartbeat_s)
                    if not following.done():
                        await transmit.write(_HEARTBEAT)
                    elif (event := following.result()) is not None:
                        last = event.id
                        await transmit.write(source.frames.event(event))
                        following = loop.create_task(_next(events))
                    else:
                        return last
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)


class _Transmission:
    """The way to one reader."""

    __slots__ = ("_send", "_stalled_s_max")

    def __init__(self, send: Send, stalled_s_max: float) -> None:
        self._send = send
        self._stalled_s_max = stalled_s_max

    async def start(self, opening: bytes) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await self.write(opening)

    async def write(self, frame: bytes) -> None:
        if frame:
            await self._transmit({"type": "http.response.body", "body": frame, "more_body": True})

    async def finish(self) -> None:
        await self._transmit({"type": "http.response.body", "body": b""})

    async def _transmit(self, message: Message) -> None:
        async with asyncio.timeout(self._stalled_s_max):
            await self._send(message)


def _one_line(json: bytes) -> bytes:
    """The same JSON without line breaks: white space to it, and the end of a line of a frame."""
    return json.replace(b"\n", b" ").replace(b"\r", b" ")


async def _next(events: AsyncIterator[Emitted]) -> Emitted | None:
    try:
        return await anext(events)
    except StopAsyncIteration:
        return None


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _stopped(feed: "asyncio.Task[bool]", *others: "asyncio.Task[Any]") -> bool:
    """Stop what still goes on; whether the feed had come to its end. Raises what a bug in it raised."""
    is_done = feed.done() and not feed.cancelled()
    for task in (feed, *others):
        task.cancel()
    await asyncio.gather(feed, *others, return_exceptions=True)
    return feed.result() if is_done else False
