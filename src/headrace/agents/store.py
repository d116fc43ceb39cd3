"""What the host keeps, and what it needs of a store: agents and their versions, executions, the queue, the nodes."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from headrace.agents.admission import Ledger
from headrace.agents.config import Isolation
from headrace.agents.definition import Source
from headrace.agents.execution import Execution, Priority
from headrace.agents.isolation.limits import Limits
from headrace.agents.rollout import Tally
from headrace.errors import AgentNotFound, ExecutionNotFound, VersionConflict, VersionNotFound

Key = tuple[str, str]
"""Tenant and execution id."""

SharedSource = Callable[[str], Awaitable[str | None]]
"""The source of a SHA-256, from wherever else it may be; None if it is not there."""


class Canary(msgspec.Struct, frozen=True, kw_only=True):
    """A version on trial beside the one in service."""

    version: str
    share: float
    """Of the executions, between 0 and 1."""
    trial: str
    """The deployment that began it: two trials of one version are not counted together."""


class Agent(msgspec.Struct, frozen=True, kw_only=True):
    """An agent and the version of it that is in service. Times are wall seconds."""

    tenant: str
    agent_id: str
    name: str
    tags: tuple[str, ...] = ()
    version: str
    source_sha256: str
    created_at: float
    updated_at: float
    canary: Canary | None = None
    aliases: dict[str, str] = {}
    """Names for versions."""


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """A version of an agent; what it stands for never changes."""

    source: Source
    is_idempotent: bool = False
    """Whether an execution that failed or was interrupted may be tried again."""
    attempts_max: int = 1
    capabilities: msgspec.Raw | None = None
    """What its `get_capabilities` returned when it was deployed, as JSON."""
    isolation: Isolation = "trusted"
    limits: Limits | None = None
    """Of its workers; None: `agents.limits`."""


class Totals(msgspec.Struct, frozen=True):
    """Finished executions of an agent over all time."""

    completed: int = 0
    failed: int = 0
    timeout: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A version of an agent that entered service, or a trial."""

    deployment_id: str
    tenant: str
    agent_id: str
    name: str
    tags: tuple[str, ...]
    source: Source
    compile_ms: float
    is_idempotent: bool = False
    attempts_max: int = 1
    capabilities: msgspec.Raw | None = None
    isolation: Isolation = "trusted"
    limits: Limits | None = None
    canary: float | None = None
    """The share of a canary; None: the version is in service."""


class Submission(msgspec.Struct, kw_only=True):
    """An execution that is on record before it ends, and all that is needed to run it, here or elsewhere."""

    execution: Execution
    claim: str
    """Tells a repeated write from a second caller."""
    owner: str | None = None
    """The node that has it; None: it waits for one."""
    input_json: bytes | None = None
    """None: it is not kept, because nobody else may run it."""
    attempts_max: int = 1
    head_start_s: float = 0.0
    """By how much it goes before those of normal priority; what waits longer than that goes first all the same."""
    timeout_s: float
    threaded: bool = False
    """Whether it needs a thread."""
    asked_version: str | None = None
    instance: str | None = None
    callback_url: str | None = None
    waited_ms: float = 0.0
    """From its submission until it was taken."""

    @property
    def key(self) -> Key:
        """What it is known by."""
        return self.execution.tenant, self.execution.id


@dataclass(frozen=True, slots=True)
class Beat:
    """What a node learns when it renews its lease."""

    is_member: bool
    """False: the lease had ended and what the node owned was given to others."""
    living: int
    cancelled: tuple[Key, ...]
    """Its executions that somebody asked to cancel."""
    ledgers: dict[str, Ledger]


@dataclass(frozen=True, slots=True)
class Reaped:
    """What became of the executions of nodes that died."""

    nodes: tuple[str, ...] = ()
    returned: int = 0
    """Had not begun, or may be tried again: they are queued."""
    ended: int = 0
    """Were under way: they are interrupted, or cancelled if somebody had asked for it."""


@dataclass(frozen=True, slots=True)
class Callback:
    """A finished execution that somebody wants to hear of."""

    execution: Execution
    url: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Kept:
    """An emitted event as it is kept."""

    tenant: str
    execution_id: str
    id: int
    data_json: bytes


@dataclass(frozen=True, slots=True)
class State:
    """What an agent instance remembers; version 0: nothing yet."""

    version: int
    value_json: bytes


@dataclass(frozen=True, slots=True)
class Change:
    """What an execution made of the state of its instance."""

    instance: str
    state: State
    """Its version is one above that which the execution began with."""


class AgentStore(Protocol):
    """What the host needs of a store. Every write is safe to repeat."""

    @property
    def shards(self) -> Sequence[str]:
        """The parts that are queued, owned and reaped apart."""

    def shard_of(self, tenant: str) -> str:
        """The part that holds a tenant."""

    async def open(self) -> None:
        """Get ready."""

    async def close(self) -> None:
        """Finish what waits and let go."""

    # -- agents ----------------------------------------------------------------------------------------------------

    async def deploy(self, deployment: Deployment) -> Agent:
        """Keep a version and put it into service, or on trial.

        With another source, isolation or limits than it has, it is a `VersionConflict`.
        """

    async def put_in_service(self, tenant: str, agent_id: str, version: str) -> Agent:
        """Switch to a version that was deployed before; a trial ends."""

    async def end_trial(
        self, tenant: str, agent_id: str, *, promote: bool, trial: str | None = None
    ) -> tuple[Agent, Canary] | None:
        """End the trial, and with `promote` put its version into service; None if there is no such trial."""

    async def name_version(self, tenant: str, agent_id: str, alias: str, version: str | None) -> Agent:
        """Let an alias stand for a version; None removes it."""

    async def undeploy(self, tenant: str, agent_id: str) -> int:
        """Take an agent out of service; its versions stay. Queued executions are cancelled: how many."""

    async def agent(self, tenant: str, agent_id: str) -> Agent | None:
        """One agent."""

    async def agents(self, tenant: str, *, offset: int, limit: int) -> tuple[list[tuple[Agent, Totals]], int]:
        """A page of agents by id with their totals, and how many there are."""

    async def totals(self, tenant: str, agent_id: str) -> Totals:
        """The finished executions of an agent."""

    async def version(
        self, tenant: str, agent_id: str, version: str, *, shared: SharedSource | None = None
    ) -> Version:
        """A version. `shared` is asked for its source before the store's own copy is read."""

    async def has_isolated(self) -> bool:
        """Whether a version of any tenant runs in isolated processes."""

    async def tally(
        self, tenant: str, agent_id: str, trial: str, mine: dict[str, Tally], *, writer: str
    ) -> dict[str, Tally]:
        """Keep this writer's counts of a trial by version; those of all others together."""

    # -- executions ------------------------------------------------------------------------------------------------

    async def submit(self, submission: Submission) -> Execution | None:
        """Put an execution on record; None if its id is ours now, else what that id stands for already."""

    async def withdraw(self, submission: Submission) -> bool:
        """Take off the record what was begun with it and did not begin; False if it is not ours or was cancelled."""

    async def take(
        self, shard: str, *, owner: str, threaded: bool, limit: int, free: dict[str, int], free_default: int
    ) -> list[Submission]:
        """Own up to `limit` queued executions, tenants in turn, within the places that each has left."""

    async def begin(self, submission: Submission) -> bool:
        """Note that an attempt begins; False if it is not ours any more."""

    async def give_back(self, submission: Submission, *, delay_s: float) -> None:
        """Let others have what was taken and has not begun."""

    async def give_back_unknown(self, shard: str, *, owner: str, threaded: bool, known: Sequence[Key]) -> None:
        """Let others have what was taken without our knowing, after an answer was lost."""

    async def disown(self, shard: str, *, owner: str, known: Sequence[Key], older_than_s: float) -> None:
        """Leave what began under our name without our knowing to the next reaping."""

    async def retry(self, submission: Submission, *, error: str | None, delay_s: float) -> bool:
        """Queue an attempt that failed again; False if it is not ours any more or was cancelled."""

    async def report(self, shard: str, submissions: Sequence[Submission]) -> None:
        """Keep the progress of executions that are ours."""

    async def finish(
        self, execution: Execution, *, owner: str | None = None, change: Change | None = None
    ) -> Execution | None:
        """Keep a finished execution, with its change of a state; return what is on record when it is durable.

        The first result of an id stays, and only its owner's attempt can be it. None: somebody else has changed the
        state since, and neither is kept.
        """

    async def cancel(self, tenant: str, agent_id: str | None, execution_id: str) -> Execution:
        """Cancel what is queued, tell the owner of what runs; what it is now."""

    async def execution(self, tenant: str, agent_id: str | None, execution_id: str) -> Execution:
        """An execution; of no agent in particular if None."""

    async def forget(self, shard: str, *, older_than_s: float, limit: int) -> int:
        """Delete finished executions of before; how many."""

    # -- nodes -----------------------------------------------------------------------------------------------------

    async def join(self, shard: str, node: str, *, lease_s: float) -> None:
        """Be a node."""

    async def beat(self, shard: str, node: str, *, lease_s: float, tenants: Sequence[str]) -> Beat:
        """Renew the lease."""

    async def reap(self, shard: str, node: str, *, retry_first_s: float, retry_max_s: float) -> Reaped:
        """End the other nodes whose lease is over, and decide what becomes of the executions of dead ones."""

    async def leave(self, shard: str, node: str) -> None:
        """End one's own lease."""

    # -- events, states, callbacks ---------------------------------------------------------------------------------

    async def keep_events(self, shard: str, events: Sequence[Kept], *, events_max: int) -> None:
        """Keep emitted events, of each execution the newest."""

    async def events(self, tenant: str, execution_id: str, *, after: int, limit: int) -> list[Kept]:
        """Kept events with higher ids."""

    async def state(self, tenant: str, agent_id: str, instance: str, *, known: int) -> State | None:
        """The state of an instance; None if it is still the version that is known."""

    async def due_callbacks(
        self, shard: str, *, limit: int, within_s: float, free: dict[str, int], free_default: int
    ) -> list[Callback]:
        """Callbacks to try now, within the places that each tenant has left; nobody else gets them for `within_s`."""

    async def callback_done(self, callback: Callback, *, again_in_s: float | None) -> None:
        """It was sent or given up, or is to be tried again."""


def merged(parts: Sequence[Totals]) -> Totals:
    """The sum of several totals."""
    completed = failed = timeout = 0
    for part in parts:
        completed += part.completed
        failed += part.failed
        timeout += part.timeout
    return Totals(completed, failed, timeout)


def counted(execution: Execution) -> Totals:
    """What one finished execution adds to its agent's totals."""
    return Totals(
        completed=execution.status == "completed",
        failed=execution.status in {"failed", "interrupted", "cancelled"},
        timeout=execution.status == "timeout",
    )


def interrupted(execution: Execution) -> Execution:
    """An execution whose process ended before it did."""
    return msgspec.structs.replace(execution, status="interrupted", error=INTERRUPTED)


INTERRUPTED = "The process that ran it ended; it may have run in part."
NOT_BEGUN = "It was cancelled before it began."

HEAD_STARTS: dict[Priority, Literal[-1, 0, 1]] = {"low": -1, "normal": 0, "high": 1}
"""In units of `agents.ageing_s`."""


def agent_not_found(agent_id: str) -> AgentNotFound:
    """The error for an agent that is not deployed."""
    return AgentNotFound(f"No agent {agent_id!r} is deployed.")


def version_not_found(agent_id: str, version: str) -> VersionNotFound:
    """The error for a version that was never deployed."""
    return VersionNotFound(f"The agent {agent_id!r} has no version {version!r}.")


def version_conflict(source: Source) -> VersionConflict:
    """The error for a version that stands for something else already."""
    return VersionConflict(
        f"The agent {source.agent_id!r} has a version {source.version!r} with another source, isolation or limits."
    )


def execution_not_found(agent_id: str | None, execution_id: str) -> ExecutionNotFound:
    """The error for an execution that nobody started."""
    if agent_id is None:
        return ExecutionNotFound(f"There is no execution {execution_id!r}.")
    return ExecutionNotFound(f"The agent {agent_id!r} has no execution {execution_id!r}.")
