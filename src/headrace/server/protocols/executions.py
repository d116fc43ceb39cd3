"""Executions as the doors of the protocols need them: begun on record, followed in the words of the protocol.

Every execution that comes in by a protocol is submitted, so whichever process a client comes back to finds it, and it
passes the tenant's limits as any other does.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, cast

import msgspec

from headrace.agents import AgentHost, Emitted, Execution
from headrace.server.event_stream import EventStreams, Frames, Source
from headrace.server.exchange import Streamed

_LOOK_FIRST_S = 0.05
_LOOK_MAX_S = 1.0
"""How often an execution under way is asked how far it is; its host writes that down about as often."""
_NOTHING = msgspec.Raw(b"null")


class Seen(Emitted, frozen=True, kw_only=True):
    """No event of the agent's: how its execution is doing, told when that has changed."""

    execution: Execution


class Words(Frames, ABC):
    """A stream in the words of one protocol."""

    def opening(self) -> bytes:
        """What comes before the first event."""
        return b""

    def event(self, event: Emitted) -> bytes:
        """An event, or how the execution is doing."""
        return self.seen(event.execution) if isinstance(event, Seen) else self.said(event)

    @abstractmethod
    def said(self, event: Emitted) -> bytes:
        """What the agent said."""

    @abstractmethod
    def seen(self, execution: Execution) -> bytes:
        """How its execution is doing."""

    @abstractmethod
    def end(self, execution: Execution) -> bytes:
        """What became of it."""

    def ending(self, last: int, data: bytes) -> bytes:
        """What `end` said."""
        return data


class Executions:
    """Begins and follows the executions of one host."""

    def __init__(self, host: AgentHost, streams: EventStreams) -> None:
        self._host = host
        self._streams = streams

    def admit(self, tenant: str) -> None:
        """Refuse a stream too many, before anything is begun for it."""
        self._streams.admit(tenant)

    async def begin(
        self, agent_id: str, value: Any, *, tenant: str, execution_id: str | None = None, instance: str | None = None
    ) -> Execution:
        """Submit an execution, or find the one that its id stands for."""
        return await self._host.submit(agent_id, value, tenant=tenant, execution_id=execution_id, instance=instance)

    async def find(self, agent_id: str, execution_id: str, *, tenant: str) -> Execution:
        """An execution. Raises `ExecutionNotFound`."""
        return await self._host.execution(agent_id, execution_id, tenant=tenant)

    async def cancel(self, execution: Execution) -> Execution:
        """Ask it to stop; what it is now."""
        return await self._host.cancel(execution.id, agent_id=execution.agent_id, tenant=execution.tenant)

    async def end_of(self, execution: Execution, *, within_s: float) -> Execution:
        """It when it has ended, or as it is then."""
        if execution.is_finished:
            return execution
        try:
            async with asyncio.timeout(within_s), aclosing(self._events(execution)) as events:
                async for _ in events:
                    continue
        except TimeoutError:
            pass  # it is answered as it is
        return await self._again(execution)

    def streamed(self, execution: Execution, words: Words, *, is_left_cancelled: bool) -> Streamed:
        """Follow it to its end; with `is_left_cancelled`, who leaves before that stops it."""

        async def ending() -> bytes:
            return words.end(await self._again(execution))

        source = Source(
            events=partial(_followed, partial(self._events, execution), partial(self._again, execution)),
            ending=ending,
            left=partial(self.cancel, execution) if is_left_cancelled else None,
            tenant=execution.tenant,
            frames=words,
        )
        return partial(self._streams.serve, source)

    def _events(self, execution: Execution) -> AsyncGenerator[Emitted, None]:
        events = self._host.events(execution.id, agent_id=execution.agent_id, tenant=execution.tenant)
        return cast("AsyncGenerator[Emitted, None]", events)

    async def _again(self, execution: Execution) -> Execution:
        return await self._host.execution(execution.agent_id, execution.id, tenant=execution.tenant)


async def _followed(
    events_of: Callable[[], AsyncGenerator[Emitted, None]], look: Callable[[], Awaitable[Execution]]
) -> AsyncIterator[Emitted]:
    """The events, and between them how the execution is doing whenever that is another than before."""
    loop = asyncio.get_running_loop()
    pause, last = _LOOK_FIRST_S, 0
    look_at = loop.time() + pause
    told: tuple[object, ...] = ()
    async with aclosing(events_of()) as events:
        following = loop.create_task(_next(events))
        try:
            while True:
                await asyncio.wait({following}, timeout=max(0.0, look_at - loop.time()))
                if following.done():
                    event = following.result()
                    if event is None:
                        return
                    last = event.id
                    yield event
                    following = loop.create_task(_next(events))
                if loop.time() >= look_at:
                    execution = await look()
                    if (state := (execution.status, execution.progress)) != told and not execution.is_finished:
                        told = state
                        yield Seen(id=last, data=_NOTHING, execution=execution)
                    pause = min(pause * 2, _LOOK_MAX_S)
                    look_at = loop.time() + pause
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


async def _next(events: AsyncIterator[Emitted]) -> Emitted | None:
    try:
        return await anext(events)
    except StopAsyncIteration:
        return None
