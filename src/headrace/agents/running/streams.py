"""What executions emit while they run, for readers who may come late, be slow, or sit in another process.

Each execution that emits has one bounded buffer; the oldest events go first, for everybody. A reader remembers the id
of the last event that it got, so it can go on after a break; what it missed meanwhile is told as a number with the
next event. Ids count up by one within an attempt, and begin anew far above for the next one.

Events of executions that are on record are written down a few times a second, in groups, and before the result, so
that readers elsewhere see all that the buffer holds. Those of direct executions are nobody else's and stay here.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import msgspec

from headrace.agents.config import AgentsConfig
from headrace.agents.execution import Execution, as_json
from headrace.agents.store import AgentStore, Kept, Key
from headrace.clock import Clock
from headrace.errors import HeadraceError, InvalidRequest

_ATTEMPT = 1 << 32
"""Ids of one attempt; JavaScript counts exactly to 2**53, which is two million attempts."""
_POLL_FIRST_S = 0.05
_POLL_MAX_S = 1.0
_PAGE = 500
_WRITE_BYTES_MAX = 4 << 20
"""Of events in one statement; a stream's worth (`agents.events_bytes_max`) may come on top."""


class Emitted(msgspec.Struct, frozen=True, kw_only=True):
    """An event of an execution as a reader gets it."""

    id: int
    data: msgspec.Raw
    """JSON."""
    dropped: int = 0
    """How many events before this one the reader missed, because it was slower than the buffer is long."""


class Stream:
    """The events of one execution under way. `emit` may be called from any thread."""

    __slots__ = (
        "_bytes",
        "_bytes_max",
        "_changed",
        "_events",
        "_events_max",
        "_loop",
        "_next",
        "execution",
        "is_durable",
        "is_over",
        "written",
    )

    def __init__(self, execution: Execution, *, events_max: int, bytes_max: int, is_durable: bool) -> None:
        self.execution = execution
        self._events: deque[tuple[int, bytes]] = deque()
        self._events_max = events_max
        self._bytes = 0
        self._bytes_max = bytes_max
        self._next = first_id(execution.attempt)
        self._changed: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_durable = is_durable
        self.is_over = False
        self.written = self._next - 1
        """The id of the last event that is written down."""

    def emit(self, data_json: bytes) -> None:
        """Add an event. The agent of an execution is one thread of control, so ids need no lock."""
        self._events.append((self._next, data_json))
        self._bytes += len(data_json)
        while self._bytes > self._bytes_max or len(self._events) > self._events_max:
            self._bytes -= len(self._events.popleft()[1])
        self._next += 1
        self._tell()

    def end(self) -> None:
        """Nothing more comes."""
        self.is_over = True
        self._tell()

    def after(self, last: int) -> list[tuple[int, bytes]]:
        """Events with higher ids."""
        if last >= self._next - 1:
            return []
        return [event for event in tuple(self._events) if event[0] > last]

    def unwritten(self) -> list[Kept]:
        """What is to be written down."""
        return [Kept(self.execution.tenant, self.execution.id, id, data) for id, data in self.after(self.written)]

    async def wait(self, last: int) -> None:
        """Return when there are events with higher ids, or nothing more comes."""
        if self._changed is None:
            self._changed = asyncio.Event()
            self._loop = asyncio.get_running_loop()
        while not self.is_over and last >= self._next - 1:
            self._changed.clear()
            await self._changed.wait()

    def _tell(self) -> None:
        changed, loop = self._changed, self._loop
        if changed is None or loop is None:
            return
        if _running() is loop:
            changed.set()
        elif not loop.is_closed():
            loop.call_soon_threadsafe(changed.set)


_Part = tuple[Stream, list[Kept]]
"""Of a stream, what is to be written down."""


class Streams:
    """The streams of one process."""

    def __init__(self, store: AgentStore, config: AgentsConfig, *, clock: Clock) -> None:
        self._store = store
        self._config = config
        self._clock = clock
        self._streams: dict[Key, Stream] = {}

    def __contains__(self, execution: Execution) -> bool:
        """Whether the execution has emitted something, or somebody listens."""
        return (execution.tenant, execution.id) in self._streams

    def of(self, execution: Execution, *, is_durable: bool) -> Stream:
        """The stream of an execution under way, made when it is first needed."""
        key = (execution.tenant, execution.id)
        stream = self._streams.get(key)
        if stream is None:
            stream = Stream(
                execution,
                events_max=self._config.events_max,
                bytes_max=self._config.events_bytes_max,
                is_durable=is_durable,
            )
            stream = self._streams.setdefault(key, stream)
        return stream

    def emit(self, execution: Execution, event: Any, *, is_durable: bool) -> None:
        """An agent says something. Raises `InvalidRequest` in the agent when it is no JSON or too large."""
        try:
            data = as_json(event)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"An emitted event cannot be written as JSON: {error}.") from error
        if len(data) > self._config.event_bytes_max:
            raise InvalidRequest(
                f"An emitted event has {len(data):,} bytes; at most {self._config.event_bytes_max:,} are accepted.",
                fix="Emit less at once, or raise agents.event_bytes_max.",
            )
        self.of(execution, is_durable=is_durable).emit(data)

    async def write(self, streams: Iterable[Stream] | None = None) -> None:
        """Write down what is new, in one statement for each shard and so many bytes."""
        by_shard: dict[str, list[_Part]] = {}
        for stream in list(self._streams.values()) if streams is None else streams:  # agents' threads add theirs
            if stream.is_durable and (events := stream.unwritten()):
                by_shard.setdefault(self._store.shard_of(events[0].tenant), []).append((stream, events))
        for shard, parts in by_shard.items():
            for group in _in_groups(parts):
                events = [event for _, part in group for event in part]
                await self._store.keep_events(shard, events, events_max=self._config.events_max)
                for stream, part in group:
                    stream.written = max(stream.written, part[-1].id)

    async def end(self, execution: Execution) -> None:
        """An execution is about to end: its last events go down first."""
        stream = self._streams.get((execution.tenant, execution.id))
        if stream is None:
            return
        try:
            await self.write([stream])
        except HeadraceError:
            return  # the result, which matters more, goes to the same shard and will tell

    def close(self, execution: Execution) -> None:
        """An attempt has ended: readers learn the rest from the record."""
        key = (execution.tenant, execution.id)
        stream = self._streams.get(key)
        if stream is not None and stream.execution is execution:
            del self._streams[key]
            stream.end()

    async def read(self, tenant: str, execution_id: str, *, after: int) -> AsyncIterator[Emitted]:
        """Events with ids above `after`, from here or from the record, until the execution has ended."""
        last, pause = after, _POLL_FIRST_S
        current: Stream | None = None
        while True:
            current = current or self._streams.get((tenant, execution_id))
            if current is not None:
                events = current.after(last)
                if not events and current.is_over:
                    current = None
                elif not events:
                    await current.wait(last)
            else:
                # Asked first: what is emitted before the end is written down before it.
                is_finished = (await self._store.execution(tenant, None, execution_id)).is_finished
                kept = await self._store.events(tenant, execution_id, after=last, limit=_PAGE)
                events = [(event.id, event.data_json) for event in kept]
                if not events and is_finished:
                    return
                if not events:
                    await self._clock.sleep(pause)
                    pause = min(pause * 2, _POLL_MAX_S)
            for id, data in events:
                yield Emitted(id=id, data=msgspec.Raw(data), dropped=_dropped(last, id))
                last, pause = id, _POLL_FIRST_S


def _in_groups(parts: list[_Part]) -> Iterator[list[_Part]]:
    """The streams' events for one statement after the other; what a stream has stays together."""
    group, size = list[_Part](), 0
    for part in parts:
        group.append(part)
        size += sum(len(event.data_json) for event in part[1])
        if size >= _WRITE_BYTES_MAX:
            yield group
            group, size = [], 0
    if group:
        yield group


def first_id(attempt: int) -> int:
    """The id of an attempt's first event; the first attempt begins at 1."""
    return (max(attempt, 1) - 1) * _ATTEMPT + 1


def _dropped(last: int, id: int) -> int:
    if last // _ATTEMPT == id // _ATTEMPT:
        return id - last - 1
    return id % _ATTEMPT - 1


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
