"""Versions that run in isolated processes, as their host sees them: sources go to a worker unread, results come back.

Nothing of such a version is compiled, imported or checked in the host. Its executions are executions as any other:
what bounds, queues, repeats and records those does not see the difference.
"""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import fields, replace

import msgspec

from headrace.agents.config import AgentsConfig
from headrace.agents.execution import JSON_DEPTH_MAX, Execution, Outcome, Progress, Room, is_deep, storable
from headrace.agents.isolation import Limits, ProcessOutcome, ProcessPool, Stopped, WorkerKey
from headrace.agents.store import Version
from headrace.clock import Clock
from headrace.errors import AgentNotFound, HeadraceError, InvalidRequest, NotOpen, Overloaded
from headrace.events import Observer

_PAUSE_FIRST_S = 0.01
_PAUSE_MAX_S = 0.25


class IsolatedVersions:
    """The pool of isolated workers of one host, opened when the first version needs it."""

    def __init__(self, config: AgentsConfig, *, clock: Clock, observer: Observer) -> None:
        self._config = config
        self._clock = clock
        self._observer = observer
        self._stack = AsyncExitStack()
        self._opening = asyncio.Lock()
        self._pool: ProcessPool | None = None
        self._is_closed = False
        self._holders: dict[WorkerKey, int] = {}

    @property
    def is_open(self) -> bool:
        """Whether there is a pool."""
        return self._pool is not None

    async def open(self) -> ProcessPool:
        """The pool. Raises `IsolationUnavailable` naming every part that this machine lacks."""
        async with self._opening:
            if self._is_closed:
                raise NotOpen("The host of the agents is closed.")
            if self._pool is None:
                config, isolation = self._config, self._config.isolation
                isolation = replace(
                    isolation,
                    source_bytes_max=min(isolation.source_bytes_max, config.source_bytes_max),
                    # A worker must be killed, and its end be seen, before the host leaves an execution behind.
                    cancel_grace_s=min(isolation.cancel_grace_s, config.cancel_grace_s / 2),
                )
                pool = ProcessPool(isolation, limits=config.limits, clock=self._clock, observer=self._observer)
                self._pool = await self._stack.enter_async_context(pool)
            return self._pool

    async def close(self) -> None:
        """End every worker."""
        async with self._opening:
            self._is_closed = True
            self._pool = None
            await self._stack.aclose()

    async def start(self, tenant: str, version: Version) -> "IsolatedVersion":
        """Load, start and check a version in a worker of its own.

        Raises `IsolationUnavailable`, `AgentInvalid`, `AgentUnhealthy`, and `InvalidRequest` when its limits are above
        `agents.limits_max`.
        """
        limits = self._allowed(version.limits)
        pool = await self.open()
        isolated = IsolatedVersion(self, pool, tenant, version, limits, clock=self._clock)
        await isolated.load()
        return isolated

    def hold(self, key: WorkerKey) -> None:
        """Somebody needs a version. One that is deployed again is loaded while it serves, so that may be several."""
        self._holders[key] = self._holders.get(key, 0) + 1

    async def release(self, key: WorkerKey) -> None:
        """Somebody needs a version no more; its workers end when nobody does and its executions have ended."""
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            if self._pool is not None:
                await self._pool.stop(key)

    def _allowed(self, asked: Limits | None) -> Limits:
        """The limits of a version. Raises `InvalidRequest` when they are above what may be asked for."""
        config = self._config
        limits, most = asked or config.limits, config.limits_max
        for name in (field.name for field in fields(Limits)):
            if asked is not None and getattr(asked, name) > getattr(most, name):
                raise InvalidRequest(
                    f"limits.{name} is {getattr(asked, name):,}; at most {getattr(most, name):,} may be asked for.",
                    fix=f"Ask for less, or raise agents.limits_max.{name}.",
                )
        return replace(limits, output_bytes=min(limits.output_bytes, config.output_bytes_max))


class IsolatedVersion:
    """A version in the workers of this host."""

    __slots__ = ("_clock", "_is_held", "_limits", "_owner", "_pool", "_source", "capabilities", "key")

    def __init__(
        self,
        owner: IsolatedVersions,
        pool: ProcessPool,
        tenant: str,
        version: Version,
        limits: Limits,
        *,
        clock: Clock,
    ) -> None:
        self._owner = owner
        self._pool = pool
        # What the worker is not given must not make the same source another one.
        self._source = replace(version.source, timeout_s=None, dependencies=())
        self._limits = limits
        self._clock = clock
        self._is_held = False
        self.key = WorkerKey(tenant, version.source.agent_id, version.source.version)
        self.capabilities: msgspec.Raw | None = None
        """What its `get_capabilities` returned, as JSON."""

    async def load(self) -> None:
        """Have it in a worker; harmless when it is in one."""
        if not self._is_held:
            self._is_held = True
            self._owner.hold(self.key)
        try:
            said = await self._pool.start(self.key, self._source, self._limits)
        except BaseException:
            await self.stop()
            raise
        self.capabilities = None if said is None else msgspec.Raw(said)

    async def stop(self) -> None:
        """Let its workers end, unless others hold it; harmless when that is done."""
        if self._is_held:
            self._is_held = False
            await self._owner.release(self.key)

    def require_room(self, holders: int) -> None:
        """Raise `Overloaded` when the workers that it may have are full."""
        most = self._limits.concurrent * self._pool.config.workers_per_agent_max
        if holders >= most:
            raise Overloaded(
                f"{self.key.agent_id!r} {self.key.version} runs {holders:,} times in its workers; no more fit."
            )

    async def execute(
        self, execution: Execution, input: object, *, deadline_s: float, due_at: float, room: Room | None
    ) -> Outcome:
        """Run it once in a worker, and note on the execution what it says meanwhile and what it took.

        `deadline_s` is what was asked for, which errors name; `due_at` is when that is over, in monotonic seconds.
        Cancelled, it returns after the work has stopped.
        """
        try:
            input_json = msgspec.json.encode(input)
        except (TypeError, ValueError, RecursionError) as error:
            return Outcome("failed", error=f"The input cannot be written as JSON ({error}).")
        state = _state_of(room, execution)
        try:
            outcome = await self._run(execution, input_json, state, due_at=due_at, room=room)
        except Stopped as stopped:
            _note(execution, stopped.outcome)
            raise
        except HeadraceError as error:
            return Outcome("failed", error=error.message)
        if outcome is None:
            return Outcome("timeout", error=f"No worker was free for it within {deadline_s:g} s.")
        _note(execution, outcome)
        for name, json in (("output", outcome.output_json), ("state", outcome.state_json)):
            if json is not None and is_deep(json):
                return Outcome("failed", error=f"The {name} is nested deeper than {JSON_DEPTH_MAX}.")
        if state is not None and outcome.state_json is not None:
            state.clear()
            state.update(msgspec.json.decode(outcome.state_json))
        if outcome.status == "timeout":
            return Outcome("timeout", error=f"It ran longer than {deadline_s:g} s and was stopped.")
        reason = None if outcome.error is None else storable(outcome.error)
        return Outcome(outcome.status, outcome.output_json, reason)

    async def _run(
        self,
        execution: Execution,
        input_json: bytes,
        state: dict[str, object] | None,
        *,
        due_at: float,
        room: Room | None,
    ) -> ProcessOutcome | None:
        """What came of it; None when no worker had room for it in time."""
        voice = _Voice(execution, room)
        pause_s = _PAUSE_FIRST_S
        while (left_s := due_at - self._clock.monotonic()) > 0:
            try:
                return await self._pool.execute(
                    self.key,
                    input_json,
                    execution_id=execution.id,
                    deadline_s=left_s,
                    state_json=None if state is None else msgspec.json.encode(state),
                    attempt=execution.attempt,
                    on_progress=voice.progress,
                    on_event=voice.emit,
                    on_output=voice.print,
                )
            except AgentNotFound:
                await self.load()  # it was stopped after it was chosen, or its last worker could not be replaced
            except Overloaded:
                # It was accepted. What is short, the workers of all versions together, is so for a moment.
                await self._clock.sleep(min(pause_s, left_s))
                pause_s = min(2 * pause_s, _PAUSE_MAX_S)
        return None


class _Voice:
    """What an agent says from its worker, brought to where others can hear it. None of it is believed to be small."""

    __slots__ = ("_execution", "_room")

    def __init__(self, execution: Execution, room: Room | None) -> None:
        self._execution = execution
        self._room = room

    def progress(self, progress: Progress) -> None:
        """How far it is."""
        self._execution.progress = msgspec.structs.replace(progress, note=storable(progress.note))

    def emit(self, event_json: bytes) -> None:
        """An event."""
        self._say(msgspec.Raw(event_json), len(event_json))

    def print(self, stream: str, text: str) -> None:
        """What it printed is an event with one key, the name of the stream."""
        self._say({stream: text}, len(text))

    def _say(self, event: object, size: int) -> None:
        if self._room is None:
            return
        try:
            self._room.emit(self._execution, event)
        except InvalidRequest:
            self._room.emit(self._execution, {"dropped_bytes": size})


def _state_of(room: Room | None, execution: Execution) -> dict[str, object] | None:
    """What the instance remembers; None for an execution without an instance."""
    try:
        return None if room is None else room.state_of(execution)
    except InvalidRequest:
        return None


def _note(execution: Execution, outcome: ProcessOutcome) -> None:
    execution.cpu_ms += outcome.cpu_ms
    execution.memory_bytes = outcome.memory_bytes
