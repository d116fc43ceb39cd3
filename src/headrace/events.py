"""What happened, as frozen facts. Logs, metrics and the dashboard read them; nothing here decides anything."""

from typing import Protocol

import msgspec


class Event(msgspec.Struct, frozen=True, tag=True):
    """A fact. The class name is its type; fields carry units in their names."""


# -- the shared cache ---------------------------------------------------------------------------------------------


class TierUnavailable(Event, frozen=True):
    """A cache tier stopped answering; calls degrade until `TierRecovered`."""

    tier: str
    reason: str


class TierRecovered(Event, frozen=True):
    """A cache tier answers again."""

    tier: str
    down_s: float


class EntryRejected(Event, frozen=True):
    """Bytes in the shared cache could not be trusted or read: counted as a miss."""

    key: str
    reason: str


class LoadFailed(Event, frozen=True):
    """A loader raised. `stale` says whether an older value answered instead."""

    key: str
    error: str
    stale: bool


class WriteDropped(Event, frozen=True):
    """A write to the shared cache did not happen; the value lives in memory only."""

    key: str
    reason: str


# -- the database -------------------------------------------------------------------------------------------------


class ShardUnavailable(Event, frozen=True):
    """A shard stopped answering."""

    shard: str
    reason: str


class ShardRecovered(Event, frozen=True):
    """A shard answers again."""

    shard: str
    down_s: float


class MigrationApplied(Event, frozen=True):
    """A schema migration ran on a shard."""

    shard: str
    name: str
    seconds: float


# -- agents -------------------------------------------------------------------------------------------------------


class AgentDeployed(Event, frozen=True):
    """A version of an agent entered service."""

    agent_id: str
    version: str
    source_bytes: int
    compile_ms: float


class ExecutionFinished(Event, frozen=True):
    """An execution ended, one way or another."""

    agent_id: str
    version: str
    execution_id: str
    status: str
    queue_ms: float
    run_ms: float


class ExecutionNotRecorded(Event, frozen=True):
    """An execution ended, but its result could not be stored."""

    agent_id: str
    execution_id: str
    status: str
    error: str


# -- processes ----------------------------------------------------------------------------------------------------


class ProcessStarted(Event, frozen=True):
    """The supervisor started a process."""

    name: str
    pid: int


class ProcessExited(Event, frozen=True):
    """A supervised process ended; `exit_code` is negative for a signal."""

    name: str
    pid: int
    exit_code: int
    restart_in_s: float | None


class ProcessFailed(Event, frozen=True):
    """The supervisor could not start, watch or end a process. It tries again, unless the service stops."""

    name: str
    reason: str
    restart_in_s: float | None


class MonitorFailed(Event, frozen=True):
    """The monitor could not fold or publish. It tries again at every tick, and tells the first failure of a row."""

    step: str
    reason: str


class RequestFailed(Event, frozen=True):
    """A request ended in a 5xx answer."""

    method: str
    route: str
    status: int
    error: str


class Observer(Protocol):
    """Whoever wants to know. `on` must return at once and must not raise."""

    def on(self, event: Event) -> None:
        """Take note of one fact."""


class Silent:
    """The observer of someone who did not ask."""

    __slots__ = ()

    def on(self, event: Event) -> None:
        """Forget it."""


class Observers:
    """Passes each fact to several observers, in order."""

    __slots__ = ("_observers",)

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def on(self, event: Event) -> None:
        """Tell every observer."""
        for observer in self._observers:
            observer.on(event)
