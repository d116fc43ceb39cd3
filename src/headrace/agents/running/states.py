"""What agent instances remember between executions: a JSON object by tenant, agent and instance.

Millions of instances may exist; in memory are those that have something to do, or had within `state_idle_s`.
Executions of one instance take turns, direct ones in the order of their arrival. Between processes the version of the
state decides: each turn begins with the newest version, one question to Postgres, and a turn that would overwrite a
change made elsewhere in the meantime fails instead, or is tried again when its agent is idempotent.

The state is kept with the result, in one transaction: a node that dies, or that lost its lease, leaves both or
neither.
"""

import asyncio
from collections import OrderedDict, deque
from typing import Any

import msgspec

from headrace.agents.config import AgentsConfig
from headrace.agents.execution import JSON_DEPTH_MAX, Execution, as_json, is_deep
from headrace.agents.store import AgentStore, Change, Key, State
from headrace.clock import Clock
from headrace.errors import InvalidRequest, Overloaded

_AGAIN_S, _AGAIN_MAX_S = 0.05, 30.0
"""How far apart those come again who found an instance busy, and how late at most."""

InstanceKey = tuple[str, str, str]
"""Tenant, agent id and instance."""


class _Instance:
    """An instance that is awake. The waiting turns are a list that most never need."""

    __slots__ = ("idle_since", "is_busy", "passed_over", "state", "waiting")

    def __init__(self) -> None:
        self.state = State(0, b"{}")
        self.is_busy = False
        self.passed_over = 0
        """How many were sent away during this turn."""
        self.waiting: deque[asyncio.Future[None]] | None = None
        self.idle_since = 0.0


class Turn:
    """One execution's turn at an instance."""

    __slots__ = ("before_json", "key", "value", "version")

    def __init__(self, key: InstanceKey, state: State) -> None:
        self.key = key
        self.version = state.version
        self.before_json = state.value_json
        self.value: dict[str, Any] = msgspec.json.decode(state.value_json)


class States:
    """The instances that are awake in this process."""

    def __init__(self, store: AgentStore, config: AgentsConfig, *, clock: Clock) -> None:
        self._store = store
        self._config = config
        self._clock = clock
        self._awake: OrderedDict[InstanceKey, _Instance] = OrderedDict()
        self._turns: dict[Key, Turn] = {}

    def __len__(self) -> int:
        """How many instances are awake."""
        return len(self._awake)

    def __contains__(self, execution: Execution) -> bool:
        """Whether it is the execution's turn at an instance."""
        return (execution.tenant, execution.id) in self._turns

    def is_busy(self, tenant: str, agent_id: str, instance: str) -> bool:
        """Whether a turn would have to be waited for."""
        awake = self._awake.get((tenant, agent_id, instance))
        return awake is not None and awake.is_busy

    def pass_over(self, tenant: str, agent_id: str, instance: str) -> float:
        """When somebody who found it busy is to come again: one after the other, not all of a long queue at once."""
        awake = self._awake[tenant, agent_id, instance]
        awake.passed_over += 1
        return min(_AGAIN_MAX_S, _AGAIN_S * awake.passed_over)

    async def begin(self, execution: Execution, instance: str) -> None:
        """Wait for the execution's turn and wake the instance."""
        key = (execution.tenant, execution.agent_id, instance)
        awake = self._awake.setdefault(key, _Instance())
        await self._turn(key, awake)
        try:
            newer = await self._store.state(*key, known=awake.state.version)
        except BaseException:
            self._next(key)
            raise
        if newer is not None:
            awake.state = newer
        self._turns[execution.tenant, execution.id] = Turn(key, awake.state)

    def of(self, execution: Execution) -> dict[str, Any]:
        """The state of an execution's instance."""
        turn = self._turns.get((execution.tenant, execution.id))
        if turn is None:
            raise InvalidRequest(
                f"The execution {execution.id!r} has no instance whose state it could be.",
                fix="Execute with instance=...",
            )
        return turn.value

    def change(self, execution: Execution) -> Change | None:
        """What the execution made of the state; None if it has none or left it as it was.

        Raises `InvalidRequest` when that cannot be kept.
        """
        turn = self._turns.get((execution.tenant, execution.id))
        if turn is None:
            return None
        try:
            value_json = as_json(turn.value)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"The state cannot be written as JSON ({error}).") from error
        if len(value_json) > self._config.state_bytes_max:
            raise InvalidRequest(
                f"The state has {len(value_json):,} bytes; at most {self._config.state_bytes_max:,} are kept"
                " (agents.state_bytes_max)."
            )
        if is_deep(value_json):
            raise InvalidRequest(f"The state is nested deeper than {JSON_DEPTH_MAX}.")
        if value_json == turn.before_json:
            return None
        return Change(turn.key[2], State(turn.version + 1, value_json))

    def kept(self, execution: Execution, change: Change) -> None:
        """The change is on record: the next turn begins with it."""
        turn = self._turns.get((execution.tenant, execution.id))
        if turn is not None:
            self._awake[turn.key].state = change.state

    def end(self, execution: Execution) -> None:
        """The turn is over."""
        turn = self._turns.pop((execution.tenant, execution.id), None)
        if turn is not None:
            self._next(turn.key)

    def sleep_idle(self) -> None:
        """Forget the instances that have done nothing for a while; the oldest stand in front."""
        before = self._clock.monotonic() - self._config.state_idle_s
        for _ in range(len(self._awake)):
            key, awake = next(iter(self._awake.items()))
            if awake.is_busy:
                # Those that are busy go behind, so that one long turn does not keep the idle ones awake.
                self._awake.move_to_end(key)
            elif awake.idle_since <= before:
                del self._awake[key]
            else:
                return

    async def _turn(self, key: InstanceKey, awake: _Instance) -> None:
        if not awake.is_busy:
            awake.is_busy = True
            return
        waiting = awake.waiting = awake.waiting if awake.waiting is not None else deque()
        if len(waiting) >= self._config.state_turns_max:
            raise Overloaded(f"{len(waiting):,} executions wait for their turn at the instance {key[2]!r}.")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                if turn in waiting:  # else it was passed over since
                    waiting.remove(turn)
            else:
                self._next(key)  # it was given to us just when we gave up
            raise

    def _next(self, key: InstanceKey) -> None:
        awake = self._awake[key]
        awake.passed_over = 0
        while awake.waiting:
            turn = awake.waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        awake.waiting = None
        awake.is_busy = False
        awake.idle_since = self._clock.monotonic()
        self._awake.move_to_end(key)
