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


class IdNodeLost(Event, frozen=True):
    """A process that made ids lost its node number to another one, after a pause; it goes on under a new number."""

    node: int


class ShardMapChanged(Event, frozen=True):
    """A newer shard map is in force in this process. Of a map with other ranges or keys, `slots_moved` is 0."""

    epoch_before: int
    epoch: int
    slots_moved: int


class ShardUnavailable(Event, frozen=True):
    """A shard stopped answering."""

    shard: str
    reason: str


class ShardRecovered(Event, frozen=True):
    """A shard answers again."""

    shard: str
    down_s: float


class IndexBuilt(Event, frozen=True):
    """An index was made on a shard, and is valid."""

    shard: str
    name: str
    seconds: float
    size_bytes: int


class IndexDropped(Event, frozen=True):
    """An index was dropped on a shard."""

    shard: str
    name: str
    reason: str


class IndexLeftoverDropped(Event, frozen=True):
    """What a build that failed or was killed had left on a shard, an invalid index, was dropped."""

    shard: str
    name: str


class LeaderChanged(Event, frozen=True):
    """A shard is written to on another server from now on."""

    shard: str
    address: str
    timeline: int


class LeaderRefused(Event, frozen=True):
    """What is connected of a shard must not be written to any more, and there is nothing else to write to."""

    shard: str
    reason: str


class OutcomeResolved(Event, frozen=True):
    """The answer to a commit was lost, and the shard was asked whether it happened."""

    shard: str
    committed: bool


class PoolLimited(Event, frozen=True):
    """The server has room for fewer connections than the pools of all processes were to have; each gets its share."""

    shard: str
    connections: int
    wanted: int
    pools: int
    limit: int
    """Connections of the server that are not reserved or taken by others."""


class CommitDelayed(Event, frozen=True):
    """A two-phase transaction is committed, and these shards could not be told yet."""

    transaction: str
    shards: tuple[str, ...]


class TransactionsRecovered(Event, frozen=True):
    """Two-phase transactions whose process was gone were ended on a shard."""

    shard: str
    committed: int
    rolled_back: int


class TransactionsInDoubt(Event, frozen=True):
    """Prepared transactions of ours have held their locks for too long on a shard."""

    shard: str
    count: int
    oldest_s: float


class QueryNotCached(Event, frozen=True):
    """A query that asked to be cached is not; told once a text and reason."""

    query: str
    reason: str


class ChangesFollowed(Event, frozen=True):
    """The query cache hears of every change on a shard from now on."""

    shard: str
    tables: int
    """How many it hears of; -1: all."""
    warning: str | None
    """What may go wrong with it later."""


class ChangesLost(Event, frozen=True):
    """The query cache does not hear of changes on a shard: own writes and TTL alone bound the age of results."""

    shard: str
    reason: str


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


class AgentRolledBack(Event, frozen=True):
    """An earlier version of an agent was put back into service."""

    agent_id: str
    version: str


class AgentUndeployed(Event, frozen=True):
    """An agent was taken out of service; `cancelled` of its executions were still queued."""

    agent_id: str
    cancelled: int


class CanaryStarted(Event, frozen=True):
    """A version gets a share of an agent's executions, on trial."""

    agent_id: str
    version: str
    share: float


class CanaryPromoted(Event, frozen=True):
    """A version on trial entered service."""

    agent_id: str
    version: str


class CanaryAborted(Event, frozen=True):
    """A trial ended and the version in service stayed. `by_itself` when the counts showed that it was worse."""

    agent_id: str
    version: str
    reason: str
    by_itself: bool


class NodesLost(Event, frozen=True):
    """Processes were not heard of for their whole lease. What they had is queued again or ended."""

    shard: str
    nodes: tuple[str, ...]
    returned: int
    ended: int


class NodeFenced(Event, frozen=True):
    """This process lost its lease, after a pause or a cut; what it ran was given to others, and it joins anew."""

    shard: str
    node: str
    runs: int


class CallbackGivenUp(Event, frozen=True):
    """Somebody who wanted to hear of an execution could not be reached."""

    agent_id: str
    execution_id: str
    attempts: int
    reason: str


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


class CodeRejected(Event, frozen=True):
    """Stored code, or a shared source, could not be trusted or read: set aside and counted as a miss."""

    agent_id: str
    record: str
    reason: str


class CodeStoreUnavailable(Event, frozen=True):
    """Compiled code can no longer be read from or written to its directory; memory goes on without."""

    operation: str
    directory: str
    reason: str


class CodeStoreRecovered(Event, frozen=True):
    """Compiled code can be read or written again."""

    operation: str
    directory: str


class StepInterrupted(Event, frozen=True):
    """A step of an agent held the event loop for too long and was ended; how often this version did so by now."""

    agent_id: str
    version: str
    held_s: float
    strikes: int


class GuardOff(Event, frozen=True):
    """This process cannot interrupt agents that hold its event loop."""

    reason: str


class VersionQuarantined(Event, frozen=True):
    """A version of an agent had its last strike: this process executes it no more."""

    agent_id: str
    version: str
    strikes: int


class WorkerKilled(Event, frozen=True):
    """An isolated worker ended, or was ended, while executions ran in it."""

    agent_id: str
    version: str
    tenant: str
    reason: str
    interrupted: int


class ZygoteEnded(Event, frozen=True):
    """The process that isolated workers are forked from is gone or did not start; workers that run go on."""

    reason: str
    restart_in_s: float


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
