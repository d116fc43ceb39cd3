"""Agents and executions in memory, for tests and small uses: one node, nothing outlives it."""

from collections import deque
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import msgspec

from headrace.agents.admission import Ledger
from headrace.agents.execution import Execution
from headrace.agents.rollout import Tally
from headrace.agents.store import (
    NOT_BEGUN,
    Agent,
    Beat,
    Callback,
    Canary,
    Change,
    Deployment,
    Kept,
    Key,
    Reaped,
    SharedSource,
    State,
    Submission,
    Totals,
    Version,
    agent_not_found,
    counted,
    execution_not_found,
    merged,
    version_conflict,
    version_not_found,
)
from headrace.clock import Clock

_SHARD = "memory"
_NO_STATE = State(0, b"{}")
_NONE = Totals()


class MemoryStore:
    """Keeps everything in this process, of finished executions the newest `executions_max`; gone when it ends."""

    def __init__(self, *, clock: Clock, executions_max: int = 10_000) -> None:
        self._clock = clock
        self._executions_max = executions_max
        self._agents: dict[Key, Agent] = {}
        self._versions: dict[tuple[str, str, str], Version] = {}
        self._executions: dict[Key, Execution] = {}
        self._ended: deque[Key] = deque()
        """Of finished executions, oldest first: a dict from which the first is taken again and again is searched from
        its beginning, where nothing is left, each time."""
        self._submissions: dict[Key, Submission] = {}
        self._queue: dict[Key, float] = {}
        self._available: dict[Key, float] = {}
        self._lines: dict[tuple[bool, str], list[tuple[float, Key]]] = {}
        """The queue by kind and tenant, as heaps; what is not in the queue any more is dropped when it is met."""
        self._cancelled: set[Key] = set()
        self._totals: dict[Key, Totals] = {}
        self._used: dict[tuple[str, int], int] = {}
        self._events: dict[Key, deque[Kept]] = {}
        self._states: dict[tuple[str, str, str], State] = {}
        self._callbacks: dict[Key, tuple[Callback, float]] = {}

    @property
    def shards(self) -> Sequence[str]:
        """There is one."""
        return (_SHARD,)

    def shard_of(self, tenant: str) -> str:
        """That one."""
        return _SHARD

    async def open(self) -> None:
        """Nothing to open."""

    async def close(self) -> None:
        """Forget everything."""
        for kept in vars(self).values():
            if isinstance(kept, dict | set | deque):
                kept.clear()

    # -- agents ----------------------------------------------------------------------------------------------------

    async def deploy(self, deployment: Deployment) -> Agent:
        """Keep a version and put it into service, or on trial."""
        source = deployment.source
        key = (deployment.tenant, deployment.agent_id, source.version)
        version = Version(
            source=source,
            is_idempotent=deployment.is_idempotent,
            attempts_max=deployment.attempts_max,
            capabilities=deployment.capabilities,
            isolation=deployment.isolation,
            limits=deployment.limits,
        )
        if _what_runs(self._versions.get(key, version)) != _what_runs(version):
            raise version_conflict(source)
        before = self._agents.get(key[:2])
        now = self._clock.wall()
        if deployment.canary is not None:
            if before is None:
                raise agent_not_found(deployment.agent_id)
            trial = Canary(version=source.version, share=deployment.canary, trial=deployment.deployment_id)
            agent = msgspec.structs.replace(before, canary=trial, updated_at=now)
        else:
            agent = Agent(
                tenant=deployment.tenant,
                agent_id=deployment.agent_id,
                name=deployment.name,
                tags=deployment.tags,
                version=source.version,
                source_sha256=source.sha256,
                created_at=before.created_at if before else now,
                updated_at=now,
                aliases=before.aliases if before else {},
            )
        self._versions[key] = version
        self._agents[key[:2]] = agent
        return agent

    async def put_in_service(self, tenant: str, agent_id: str, version: str) -> Agent:
        """Switch to a version that was deployed before."""
        agent = self._found(tenant, agent_id)
        source = (await self.version(tenant, agent_id, version)).source
        return self._changed(agent, version=version, source_sha256=source.sha256, canary=None)

    async def end_trial(
        self, tenant: str, agent_id: str, *, promote: bool, trial: str | None = None
    ) -> tuple[Agent, Canary] | None:
        """End the trial."""
        agent = self._agents.get((tenant, agent_id))
        if agent is None or agent.canary is None or trial not in {None, agent.canary.trial}:
            return None
        canary = agent.canary
        if not promote:
            return self._changed(agent, canary=None), canary
        return await self.put_in_service(tenant, agent_id, canary.version), canary

    async def name_version(self, tenant: str, agent_id: str, alias: str, version: str | None) -> Agent:
        """Let an alias stand for a version."""
        agent = self._found(tenant, agent_id)
        aliases = {name: known for name, known in agent.aliases.items() if name != alias}
        if version is not None:
            await self.version(tenant, agent_id, version)
            aliases[alias] = version
        return self._changed(agent, aliases=aliases)

    async def undeploy(self, tenant: str, agent_id: str) -> int:
        """Take an agent out of service."""
        self._found(tenant, agent_id)
        del self._agents[tenant, agent_id]
        waiting = [key for key in self._queue if key[0] == tenant and self._executions[key].agent_id == agent_id]
        for key in waiting:
            await self.cancel(tenant, agent_id, key[1])
        return len(waiting)

    async def agent(self, tenant: str, agent_id: str) -> Agent | None:
        """One agent."""
        return self._agents.get((tenant, agent_id))

    async def agents(self, tenant: str, *, offset: int, limit: int) -> tuple[list[tuple[Agent, Totals]], int]:
        """A page of agents by id."""
        mine = sorted(key for key in self._agents if key[0] == tenant)
        page = [(self._agents[key], self._totals.get(key, Totals())) for key in mine[offset : offset + limit]]
        return page, len(mine)

    async def totals(self, tenant: str, agent_id: str) -> Totals:
        """The finished executions of an agent."""
        return self._totals.get((tenant, agent_id), Totals())

    async def version(
        self, tenant: str, agent_id: str, version: str, *, shared: SharedSource | None = None
    ) -> Version:
        """A version; nothing is nearer than it."""
        found = self._versions.get((tenant, agent_id, version))
        if found is None:
            raise version_not_found(agent_id, version)
        return found

    async def has_isolated(self) -> bool:
        """None, when it is opened."""
        return any(version.isolation == "process" for version in self._versions.values())

    async def tally(
        self, tenant: str, agent_id: str, trial: str, mine: dict[str, Tally], *, writer: str
    ) -> dict[str, Tally]:
        """There is no other writer."""
        return {}

    def _found(self, tenant: str, agent_id: str) -> Agent:
        agent = self._agents.get((tenant, agent_id))
        if agent is None:
            raise agent_not_found(agent_id)
        return agent

    def _changed(self, agent: Agent, **changes: object) -> Agent:
        agent = msgspec.structs.replace(agent, updated_at=self._clock.wall(), **changes)
        self._agents[agent.tenant, agent.agent_id] = agent
        return agent

    # -- executions ------------------------------------------------------------------------------------------------

    async def submit(self, submission: Submission) -> Execution | None:
        """Put an execution on record."""
        key = submission.key
        held = self._executions.get(key)
        if held is not None:
            known = self._submissions.get(key)
            return None if known is not None and known.claim == submission.claim else self._copied(held)
        self._executions[key] = msgspec.structs.replace(submission.execution)
        self._submissions[key] = msgspec.structs.replace(submission, execution=self._executions[key])
        if submission.owner is None:
            self._line_up(key, 0.0)
        return None

    async def withdraw(self, submission: Submission) -> bool:
        """Forget an execution that did not begin."""
        kept = self._submissions.get(submission.key)
        if kept is None or kept.claim != submission.claim or submission.key in self._cancelled:
            return False
        del self._submissions[submission.key]
        self._drop(submission.key)
        return True

    async def take(
        self, shard: str, *, owner: str, threaded: bool, limit: int, free: dict[str, int], free_default: int
    ) -> list[Submission]:
        """Own queued executions, tenants in turn."""
        now, taken = self._clock.wall(), list[Key]()
        later: list[tuple[list[tuple[float, Key]], tuple[float, Key]]] = []
        turns = [(1, line[0], line) for (kind, _), line in self._lines.items() if kind is threaded and line]
        heapify(turns)
        while turns and len(taken) < limit:
            turn, (rank, key), line = heappop(turns)
            if turn > free.get(key[0], free_default):
                continue
            heappop(line)
            if self._queue.get(key) == rank and self._available[key] > now:
                later.append((line, (rank, key)))
            elif self._queue.get(key) == rank:
                taken.append(key)
                turn += 1
            if line:
                heappush(turns, (turn, line[0], line))
        for line, entry in later:
            heappush(line, entry)
        self._lines = {name: line for name, line in self._lines.items() if line}
        return [self._taken(key, owner, now) for key in taken]

    def _taken(self, key: Key, owner: str, now: float) -> Submission:
        del self._queue[key]
        submission = self._submissions[key]
        submission.owner, submission.waited_ms = owner, (now - self._available[key]) * 1000
        return msgspec.structs.replace(submission, execution=self._copied(submission.execution))

    async def begin(self, submission: Submission) -> bool:
        """Note that an attempt begins."""
        held, kept = self._executions.get(submission.key), self._submissions.get(submission.key)
        if held is None or kept is None or held.is_finished or kept.owner != submission.owner:
            return False
        ours = submission.execution
        is_repeated = held.attempt == ours.attempt and held.started_at == ours.started_at
        if not (held.attempt == ours.attempt - 1 if held.status == "queued" else is_repeated):
            return False
        held.status, held.attempt, held.version, held.started_at = (
            "running",
            ours.attempt,
            ours.version,
            ours.started_at,
        )
        return True

    async def give_back(self, submission: Submission, *, delay_s: float) -> None:
        """Let it be taken again."""
        kept = self._submissions.get(submission.key)
        is_ours = kept is not None and kept.owner == submission.owner
        if kept is not None and is_ours and self._executions[submission.key].status == "queued":
            kept.owner = None
            self._line_up(submission.key, delay_s)

    async def give_back_unknown(self, shard: str, *, owner: str, threaded: bool, known: Sequence[Key]) -> None:
        """No answer is ever lost here."""

    async def disown(self, shard: str, *, owner: str, known: Sequence[Key], older_than_s: float) -> None:
        """No answer is ever lost here."""

    async def retry(self, submission: Submission, *, error: str | None, delay_s: float) -> bool:
        """Queue an attempt that failed again."""
        held, kept = self._executions.get(submission.key), self._submissions.get(submission.key)
        if held is None or kept is None or kept.owner != submission.owner or submission.key in self._cancelled:
            return False
        held.status, held.error, kept.owner = "queued", error, None
        self._line_up(submission.key, delay_s)
        return True

    async def report(self, shard: str, submissions: Sequence[Submission]) -> None:
        """Keep progress."""
        for submission in submissions:
            held = self._executions.get(submission.key)
            if held is not None and not held.is_finished:
                held.progress = submission.execution.progress

    async def finish(
        self, execution: Execution, *, owner: str | None = None, change: Change | None = None
    ) -> Execution | None:
        """Keep a finished execution."""
        key = (execution.tenant, execution.id)
        held, submission = self._executions.get(key), self._submissions.get(key)
        is_owners = submission is None or (submission.owner, held and held.attempt) == (owner, execution.attempt)
        if held is not None and (held.is_finished or not is_owners):
            return self._copied(held)
        if change is not None:
            instance = (execution.tenant, execution.agent_id, change.instance)
            if self._states.get(instance, _NO_STATE).version != change.state.version - 1:
                return None
            self._states[instance] = change.state
        self._end(self._copied(execution))
        day = (execution.tenant, int(self._clock.wall() // 86_400))
        self._used[day] = self._used.get(day, 0) + 1
        return execution

    async def cancel(self, tenant: str, agent_id: str | None, execution_id: str) -> Execution:
        """Cancel what is queued, mark what runs."""
        held = await self.execution(tenant, agent_id, execution_id)
        if held.status == "queued":
            ended = msgspec.structs.replace(held, status="cancelled", error=NOT_BEGUN, finished_at=self._clock.wall())
            self._end(ended)
            return self._copied(ended)
        if not held.is_finished:
            self._cancelled.add((tenant, execution_id))
            held.status = "cancelling"
        return held

    async def execution(self, tenant: str, agent_id: str | None, execution_id: str) -> Execution:
        """An execution."""
        held = self._executions.get((tenant, execution_id))
        if held is None or agent_id not in {None, held.agent_id}:
            raise execution_not_found(agent_id, execution_id)
        return self._copied(held)

    async def forget(self, shard: str, *, older_than_s: float, limit: int) -> int:
        """Delete finished executions of before."""
        before = self._clock.wall() - older_than_s
        old = [key for key, held in self._executions.items() if held.is_finished and (held.finished_at or 0) < before]
        for key in old[:limit]:
            self._drop(key)
        if old:
            self._ended = deque(key for key in self._ended if key in self._executions)
        return len(old[:limit])

    def _line_up(self, key: Key, delay_s: float) -> None:
        self._available[key] = self._clock.wall() + delay_s
        submission = self._submissions[key]
        self._queue[key] = rank = self._available[key] - submission.head_start_s
        heappush(self._lines.setdefault((submission.threaded, key[0]), []), (rank, key))

    def _copied(self, execution: Execution) -> Execution:
        copy = msgspec.structs.replace(execution)
        if copy.status == "running" and (copy.tenant, copy.id) in self._cancelled:
            copy.status = "cancelling"
        return copy

    def _end(self, execution: Execution) -> None:
        key = (execution.tenant, execution.id)
        submission = self._submissions.pop(key, None)
        self._queue.pop(key, None)
        self._available.pop(key, None)
        self._cancelled.discard(key)
        self._executions[key] = execution
        self._ended.append(key)
        if submission is not None and submission.callback_url is not None:
            self._callbacks[key] = (Callback(execution, submission.callback_url, 0), self._clock.wall())
        self._forget_oldest()
        agent = (execution.tenant, execution.agent_id)
        self._totals[agent] = merged((self._totals.get(agent, _NONE), counted(execution)))

    def _forget_oldest(self) -> None:
        """Bound the memory: of finished executions only the newest are kept."""
        while len(self._executions) > self._executions_max and self._ended:
            self._drop(self._ended.popleft())

    def _drop(self, key: Key) -> None:
        del self._executions[key]
        self._events.pop(key, None)

    # -- nodes -----------------------------------------------------------------------------------------------------

    async def join(self, shard: str, node: str, *, lease_s: float) -> None:
        """The only node."""

    async def beat(self, shard: str, node: str, *, lease_s: float, tenants: Sequence[str]) -> Beat:
        """It always lives."""
        day = int(self._clock.wall() // 86_400)
        queued = dict[str, int]()
        for tenant, _ in self._queue:
            queued[tenant] = queued.get(tenant, 0) + 1
        ledgers = {tenant: Ledger(self._used.get((tenant, day), 0), queued.get(tenant, 0)) for tenant in tenants}
        return Beat(is_member=True, living=1, cancelled=tuple(self._cancelled), ledgers=ledgers)

    async def reap(self, shard: str, node: str, *, retry_first_s: float, retry_max_s: float) -> Reaped:
        """Nobody else can die."""
        return Reaped()

    async def leave(self, shard: str, node: str) -> None:
        """Nobody else is told."""

    # -- events, states, callbacks ---------------------------------------------------------------------------------

    async def keep_events(self, shard: str, events: Sequence[Kept], *, events_max: int) -> None:
        """Keep emitted events."""
        for event in events:
            key = (event.tenant, event.execution_id)
            self._events.setdefault(key, deque(maxlen=events_max)).append(event)

    async def events(self, tenant: str, execution_id: str, *, after: int, limit: int) -> list[Kept]:
        """Kept events with higher ids."""
        return [event for event in self._events.get((tenant, execution_id), ()) if event.id > after][:limit]

    async def state(self, tenant: str, agent_id: str, instance: str, *, known: int) -> State | None:
        """The state of an instance."""
        kept = self._states.get((tenant, agent_id, instance), _NO_STATE)
        return None if kept.version == known else kept

    async def due_callbacks(
        self, shard: str, *, limit: int, within_s: float, free: dict[str, int], free_default: int
    ) -> list[Callback]:
        """Callbacks to try now."""
        now, due, left = self._clock.wall(), list[Key](), dict(free)
        for key in [key for key, (_, at) in self._callbacks.items() if at <= now]:
            left.setdefault(key[0], free_default)
            if left[key[0]] > 0 and len(due) < limit:
                left[key[0]] -= 1
                due.append(key)
        for key in due:
            callback = self._callbacks[key][0]
            again = Callback(callback.execution, callback.url, callback.attempt + 1)
            self._callbacks[key] = (again, now + within_s)
        return [self._callbacks[key][0] for key in due]

    async def callback_done(self, callback: Callback, *, again_in_s: float | None) -> None:
        """It is over, or tried again."""
        key = (callback.execution.tenant, callback.execution.id)
        if again_in_s is None:
            self._callbacks.pop(key, None)
        else:
            self._callbacks[key] = (callback, self._clock.wall() + again_in_s)


def _what_runs(version: Version) -> tuple[object, ...]:
    """What a version stands for, and never changes."""
    return version.source.text, version.source.entrypoint, version.isolation, version.limits
