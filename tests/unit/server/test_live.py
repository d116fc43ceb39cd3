"""The live stream: what listeners hear, what a slow one costs, and how streams end."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import uvicorn

from headrace.errors import InvalidRequest
from headrace.monitor.snapshot import Agents, Host, Latency, Snapshot
from headrace.server.live import Live
from headrace.testing import FakeClock

NO_LATENCY = Latency(0, None, None, None, None, None)


def snapshot(at: float, **facts: Any) -> Snapshot:
    """An idle service's snapshot, with some facts replaced."""
    idle = Snapshot(
        at=at,
        interval_s=1.0,
        requests_per_s=0.0,
        errors_per_s=0.0,
        error_rate=None,
        connections=0,
        latency=NO_LATENCY,
        endpoints=(),
        tiers=(),
        agents=Agents(0, 0.0, 0.0, 0.0, 0.0, NO_LATENCY),
        workers=(),
        host=Host(None, 1.0, None, None, None, None, None, None),
    )
    return msgspec.structs.replace(idle, **facts)


@dataclass
class Source:
    """A monitor whose newest snapshot is taken at the very moment, unless it was told to stop."""

    clock: FakeClock
    asked: int = 0
    silent_since: float | None = None
    empty: bool = False
    error: Exception | None = None

    def __call__(self) -> Snapshot | None:
        self.asked += 1
        if self.error is not None:
            raise self.error
        if self.empty:
            return None
        return snapshot(self.clock.wall() if self.silent_since is None else self.silent_since)


@dataclass
class Listener:
    """One client of the ASGI app, who can leave, and can stop taking what is sent."""

    live: Live
    method: str = "GET"
    messages: list[Any] = field(default_factory=list)
    taking: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.taking.set()
        scope = {"type": "http", "method": self.method, "path": "/api/v1/system/live", "headers": []}
        self.call = asyncio.get_running_loop().create_task(self.live(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.taking.wait()
        self.messages.append(message)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.messages[1:]]

    def events(self) -> list[tuple[str, int, Any]]:
        """Event, id and decoded data of every event so far."""
        frames = [
            dict(line.split(": ", 1) for line in body.decode().splitlines() if line) for body in self.bodies if body
        ]
        return [
            (each["event"], int(each["id"]), msgspec.json.decode(each["data"])) for each in frames if "event" in each
        ]

    async def leave(self) -> None:
        self.gone.set()
        await self.call


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def source(clock: FakeClock) -> Source:
    return Source(clock)


@pytest.fixture
async def open_live(source: Source, clock: FakeClock) -> AsyncIterator[Callable[..., Live]]:
    """Makes streams that are closed after the test."""
    made: list[Live] = []

    def make(**options: Any) -> Live:
        made.append(Live(source, clock=clock, **options))
        return made[-1]

    yield make
    for live in made:
        await live.close()


async def test_opening_says_how_to_reconnect_and_shows_the_newest_snapshot_at_once(open_live, source, clock):
    """A new listener gets `retry:` and the snapshot of now, without waiting for a tick."""
    listener = Listener(open_live())

    await clock.run_for(0)

    assert listener.status == 200
    assert listener.headers[b"content-type"].startswith(b"text/event-stream")
    assert listener.headers[b"cache-control"] == b"no-store"
    assert listener.headers[b"x-accel-buffering"] == b"no"
    assert listener.bodies[0] == b"retry: 2000\n\n"
    assert [event for event, _, _ in listener.events()] == ["snapshot"]


async def test_each_tick_brings_a_new_snapshot_with_a_higher_id(open_live, clock):
    """Snapshots arrive every `interval_s`, complete, and their ids rise."""
    listener = Listener(open_live(interval_s=2.0))

    await clock.run_for(6.0)

    events = listener.events()
    assert [event for event, _, _ in events] == ["snapshot"] * 4
    ids = [identifier for _, identifier, _ in events]
    assert ids == sorted(set(ids))
    assert msgspec.convert(events[-1][2], Snapshot) == snapshot(clock.wall())


async def test_a_tick_is_asked_for_and_encoded_once_for_all_listeners(open_live, source, clock):
    """Fifty listeners cost one snapshot and one encoding a tick: they are sent the same bytes object."""
    live = open_live()
    listeners = [Listener(live) for _ in range(50)]
    await clock.run_for(0)
    asked = source.asked

    await clock.run_for(3.0)

    assert source.asked == asked + 3
    newest = {id(listener.bodies[-1]) for listener in listeners}
    assert len(newest) == 1


async def test_an_unchanged_snapshot_is_not_repeated_but_silence_is_broken_by_a_comment(open_live, source, clock):
    """Between two reports of the monitor nothing is sent, except a comment after `heartbeat_s`."""
    source.silent_since = clock.wall()
    listener = Listener(open_live(heartbeat_s=15.0, stale_after_s=60.0))
    await clock.run_for(14.0)
    quiet = len(listener.bodies)

    await clock.run_for(2.0)

    assert quiet == 2, "retry and the first snapshot"
    assert listener.bodies[2].startswith(b":")
    assert len(listener.events()) == 1


async def test_a_monitor_that_never_reported_is_stale_without_an_age(open_live, source, clock):
    """No snapshot at all is said as such, with null for the age."""
    source.empty = True
    listener = Listener(open_live())

    await clock.run_for(0)

    assert [(event, data) for event, _, data in listener.events()] == [("stale", {"age_s": None})]


async def test_an_old_snapshot_is_stale_with_its_growing_age_until_a_new_one_comes(open_live, source, clock):
    """Above `stale_after_s` the age is sent every tick; the next report ends it."""
    source.silent_since = clock.wall()
    listener = Listener(open_live(stale_after_s=10.0))
    await clock.run_for(12.0)
    source.silent_since = None

    await clock.run_for(1.0)

    said = [(event, data.get("age_s")) for event, _, data in listener.events()]
    assert said == [("snapshot", None), ("stale", 11.0), ("stale", 12.0), ("snapshot", None)]


async def test_a_wall_clock_that_jumps_back_never_makes_an_age_negative(open_live, source, clock):
    """A snapshot from the future counts as fresh."""
    source.silent_since = clock.wall() + 3_600
    listener = Listener(open_live())

    await clock.run_for(2.0)

    assert [event for event, _, _ in listener.events()] == ["snapshot"]


async def test_a_slow_listener_gets_the_newest_and_misses_the_rest(open_live, clock):
    """Nothing is queued for a listener that is busy: afterwards it hears the newest snapshot only."""
    live = open_live()
    slow, quick = Listener(live), Listener(live)
    await clock.run_for(0)
    slow.taking.clear()
    await clock.run_for(20.0)

    slow.taking.set()
    await clock.run_for(0)

    assert len(quick.events()) == 21
    heard = [identifier for _, identifier, _ in slow.events()]
    assert heard == [1, 2, 21], "what it had, what it was stuck in, and the newest"


async def test_a_listener_that_takes_nothing_for_too_long_loses_its_place(open_live, clock):
    """A dead peer is dropped after `stalled_s_max`, and its place is free again."""
    live = open_live(stalled_s_max=30.0, streams_max=1)
    dead = Listener(live)
    await clock.run_for(0)
    dead.taking.clear()

    await clock.run_for(29.0)
    kept = live.streams
    await clock.run_for(4.0)

    assert kept == 1
    assert live.streams == 0
    assert dead.call.done()


async def test_over_the_limit_the_answer_is_503_with_retry_after(open_live, clock):
    """The listener too many is told when to come back, as problem+json, and gets in once another left."""
    live = open_live(streams_max=2)
    first, _ = Listener(live), Listener(live)
    await clock.run_for(0)
    refused = Listener(live)
    await refused.call

    await first.leave()
    late = Listener(live)
    await clock.run_for(0)

    assert refused.status == 503
    assert refused.headers[b"content-type"] == b"application/problem+json"
    assert refused.headers[b"retry-after"] == b"10"
    problem = msgspec.json.decode(refused.bodies[0])
    assert problem["code"] == "overloaded"
    assert "2 live streams" in problem["detail"]
    assert late.status == 200


async def test_the_ticker_runs_only_while_someone_listens(open_live, source, clock):
    """The monitor is asked while there are listeners, and is left alone before and after."""
    live = open_live()
    await clock.run_for(5.0)
    before = source.asked
    listener = Listener(live)
    await clock.run_for(2.0)

    await listener.leave()
    asked = source.asked
    await clock.run_for(5.0)

    assert before == 0
    assert asked == 3
    assert source.asked == asked
    assert clock.sleepers == 0


async def test_a_listener_that_leaves_is_gone_without_waiting_for_a_tick(open_live, clock):
    """A disconnect ends the stream although the clock stands still, even in the middle of a send."""
    live = open_live()
    idle, stuck = Listener(live), Listener(live)
    await clock.run_for(0)
    stuck.taking.clear()
    await clock.run_for(1.0)

    await idle.leave()
    await stuck.leave()

    assert live.streams == 0


async def test_a_listener_that_comes_back_hears_the_present_and_not_the_past(open_live, source, clock):
    """After a pause without listeners, the first frame is of now."""
    live = open_live()
    first = Listener(live)
    await clock.run_for(1.0)
    await first.leave()
    clock.advance(3_600)

    second = Listener(live)
    await clock.run_for(0)

    assert second.events()[0][2]["at"] == clock.wall()


async def test_closing_ends_every_stream_and_takes_no_new_ones(open_live, clock):
    """`close()` finishes the answers properly, and whoever comes then is told to come back."""
    live = open_live()
    listeners = [Listener(live) for _ in range(3)]
    await clock.run_for(0)

    await live.close()
    for listener in listeners:
        await listener.call
    late = Listener(live)
    await late.call

    assert all(listener.messages[-1] == {"type": "http.response.body", "body": b""} for listener in listeners)
    assert late.status == 503
    assert clock.sleepers == 0


async def test_closing_does_not_wait_for_a_listener_that_takes_nothing(open_live, clock):
    """A stuck listener is cut, so that a server can always drain."""
    live = open_live()
    stuck = Listener(live)
    await clock.run_for(0)
    stuck.taking.clear()
    await clock.run_for(1.0)

    async with asyncio.timeout(5):
        await live.close()
        await stuck.call

    assert live.streams == 0


async def test_closing_twice_is_harmless(open_live, clock):
    """The second `close()` has nothing to do."""
    live = open_live()
    listener = Listener(live)
    await clock.run_for(0)

    await live.close()
    await live.close()

    await listener.call
    assert live.streams == 0


async def test_an_error_of_the_monitor_ends_the_streams_with_that_error(open_live, source, clock):
    """A bug in `snapshot()` is not swallowed: every stream raises it, and the next listener starts afresh."""
    live = open_live()
    listeners = [Listener(live) for _ in range(2)]
    await clock.run_for(0)
    source.error = ZeroDivisionError("broken monitor")

    await clock.run_for(1.0)

    for listener in listeners:
        with pytest.raises(ExceptionGroup) as raised:
            await listener.call
        assert raised.value.subgroup(ZeroDivisionError) is not None
    source.error = None
    assert live.streams == 0
    recovered = Listener(live)
    await clock.run_for(1.0)
    assert len(recovered.events()) == 2


async def test_a_server_that_reports_a_lost_listener_on_send_ends_the_stream_quietly(open_live, clock):
    """ASGI servers may raise OSError from `send` once the listener is gone; that is an end, not a failure."""
    live = open_live()

    async def send(message: Any) -> None:
        raise OSError("connection lost")

    async def receive() -> Any:
        return await asyncio.get_running_loop().create_future()

    await live({"type": "http", "method": "GET", "path": "/", "headers": []}, receive, send)

    assert live.streams == 0


async def test_head_gets_the_headers_and_other_methods_are_refused(open_live):
    """HEAD answers at once without a stream; POST is 405 and says what is allowed."""
    head, post = Listener(open_live(), method="HEAD"), Listener(open_live(), method="POST")

    await head.call
    await post.call

    assert (head.status, head.bodies) == (200, [b""])
    assert post.status == 405
    assert post.headers[b"allow"] == b"GET, HEAD"


async def test_a_websocket_is_refused(open_live):
    """The stream speaks http only, and says so."""
    with pytest.raises(InvalidRequest, match="websocket"):
        await open_live()({"type": "websocket"}, None, None)


@asynccontextmanager
async def serving(live: Live) -> AsyncIterator[int]:
    """A real uvicorn with small socket buffers, serving nothing but the stream; yields its port."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
    server = uvicorn.Server(uvicorn.Config(live, lifespan="off", log_level="critical", timeout_graceful_shutdown=1))
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(server.serve(sockets=[listening]))
        try:
            yield listening.getsockname()[1]
        finally:
            await live.close()
            server.should_exit = True
            await running
            listening.close()


async def test_over_a_real_connection_that_is_not_read_memory_stays_bounded(clock):
    """A peer that stops reading makes the server skip, not buffer: little of what it missed arrives afterwards."""
    note = "x" * 60_000
    asked = 0

    def produce() -> Snapshot:
        nonlocal asked
        asked += 1
        return msgspec.structs.replace(snapshot(clock.wall()), tiers=(note,))

    async def tick_on() -> None:
        while True:
            clock.advance(1.0)
            await asyncio.sleep(0.001)

    live = Live(produce, clock=clock, interval_s=1.0, stalled_s_max=1e9)
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    peer.setblocking(False)
    loop = asyncio.get_running_loop()
    async with serving(live) as port, asyncio.timeout(100):
        await loop.sock_connect(peer, ("127.0.0.1", port))
        await loop.sock_sendall(peer, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        ticking = loop.create_task(tick_on())
        try:
            while asked < 300:
                await asyncio.sleep(0.001)
            produced_bytes = asked * len(note)
            received = bytearray()
            while received.count(b"event: snapshot") < 12:
                received += await loop.sock_recv(peer, 65_536)
        finally:
            ticking.cancel()
            await asyncio.wait({ticking})
            peer.close()

    ids = [int(part.split(b"\n")[0]) for part in bytes(received).split(b"\nid: ")[1:]]
    skipped = [after - before for before, after in pairwise(ids)]
    assert max(skipped) > 200, f"it skipped {skipped} of {asked}"
    buffered = sum(1 for identifier in ids if identifier < 200) * len(note)
    assert buffered < produced_bytes / 10
