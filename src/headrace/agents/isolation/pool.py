"""The door of the isolation: sources in, outcomes out, a process between.

One worker runs one version of one agent of one tenant. Workers are made from warm ones, which are hardened and wait
for a source; how many are kept warm follows the arrivals.
"""

import asyncio
import os
import socket
from collections import OrderedDict
from collections.abc import Coroutine, Iterable
from types import TracebackType
from typing import NamedTuple, Self

import msgspec

from headrace.agents.definition import Source
from headrace.agents.isolation import page
from headrace.agents.isolation.arrivals import Arrivals
from headrace.agents.isolation.limits import IsolationConfig, Limits
from headrace.agents.isolation.nursery import Nursery
from headrace.agents.isolation.probe import probe
from headrace.agents.isolation.process import WorkerProcess
from headrace.agents.isolation.running import OnEvent, OnOutput, OnProgress, ProcessOutcome
from headrace.clock import Clock, SystemClock
from headrace.errors import (
    AgentInvalid,
    AgentNotFound,
    BackendError,
    InvalidRequest,
    IsolationUnavailable,
    NotOpen,
    Overloaded,
    VersionConflict,
    WorkerFailed,
)
from headrace.events import Observer, Silent, WorkerKilled

_EXIT_TIMEOUT_S = 5.0
_DEATHS_FREE = 3
_PAUSE_FIRST_S = 0.02
_PAUSE_MAX_S = 1.0


class WorkerKey(NamedTuple):
    """What a worker is for."""

    tenant: str
    agent_id: str
    version: str


class PoolStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What the pool did since it was opened, and what it holds now."""

    agents: int
    """Versions that were started and not stopped."""
    workers: int
    """Workers now, warm ones included."""
    warm: int
    """Hardened workers without an agent."""
    executing: int
    """Executions under way."""
    executions: int
    """Executions that were given to a worker."""
    forks: int
    """Workers that were made."""
    cold_starts: int
    """Agents loaded into a worker."""
    replaced: int
    """Workers that ended after their calls, age, memory, CPU time or idleness."""
    killed: int
    """Workers killed for what they did, or that died by themselves."""
    hogs: int
    """Workers killed for a step that did not end."""
    interrupted: int
    """Executions that ended because another one ended their worker."""
    dropped_bytes: int
    """Printed and not kept."""
    zygotes: int
    """Zygotes started; above 1, one died."""


class _Agent:
    """A version that was started, and its workers."""

    __slots__ = (
        "capabilities_json", "claims", "deaths", "first", "is_stopped", "key", "limits", "source", "starting",
        "workers",
    )  # fmt: skip

    def __init__(self, key: WorkerKey, source: Source, limits: Limits) -> None:
        self.key = key
        self.source = source
        self.limits = limits
        self.workers: list[WorkerProcess] = []
        self.starting: set[asyncio.Task[None]] = set()
        self.first: asyncio.Task[None]
        """The start of its first worker, or of the first one after there was none."""
        self.capabilities_json: bytes | None = None
        """What its `get_capabilities` returned in the worker that started last."""
        self.deaths = 0
        """Workers that it has cost since an execution of it completed."""
        self.claims = 0
        """Executions that run or wait for a worker."""
        self.is_stopped = False

    def free_worker(self) -> WorkerProcess | None:
        """The least busy worker that has room."""
        best = None
        for worker in self.workers:
            if worker.has_room and (best is None or len(worker.running) < len(best.running)):
                best = worker
        return best


class ProcessPool:
    """Executes agents in isolated processes. Opening it raises `IsolationUnavailable` where a part is lacking."""

    def __init__(
        self,
        config: IsolationConfig | None = None,
        *,
        limits: Limits | None = None,
        clock: Clock | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.config = config or IsolationConfig()
        self.limits = limits or Limits()
        """Of agents that are started without limits of their own. Warm workers have its scratch space."""
        self._clock = clock or SystemClock()
        self._observer = observer or Silent()
        self._nursery = Nursery(self.config, clock=self._clock, observer=self._observer)
        self._agents: dict[WorkerKey, _Agent] = {}
        self._workers: OrderedDict[int, WorkerProcess] = OrderedDict()
        self._owners: dict[int, _Agent] = {}
        self._warm: list[WorkerProcess] = []
        self._forking = 0
        self._filling = 0
        self._arrivals = Arrivals()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_open = False
        self._counts = dict.fromkeys(
            ("executions", "forks", "cold_starts", "replaced", "killed", "hogs", "interrupted", "dropped_bytes"), 0
        )

    async def __aenter__(self) -> Self:
        """Probe the kernel, start the zygote and the first warm workers."""
        achievable = asyncio.get_running_loop().run_in_executor(None, probe)
        try:
            await self._nursery.open()
            (await achievable).require()
        except BaseException:
            await self._nursery.close()
            (await achievable).require()  # it names every part that is missing, the zygote its first one
            raise
        self._is_open = True
        self._own(self._tend())
        self._refill()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.close()

    async def close(self) -> None:
        """Kill every worker, which interrupts its executions, and the zygote."""
        self._is_open = False
        tasks = [*self._tasks, *(task for agent in self._agents.values() for task in agent.starting)]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        workers = list(self._workers.values())
        for worker in workers:
            worker.kill("the pool is closed")
        if workers:
            await asyncio.wait([worker.exited for worker in workers], timeout=_EXIT_TIMEOUT_S)
        await self._nursery.close()
        self._agents.clear()

    # -- agents -------------------------------------------------------------------------------------------------

    async def start(self, key: WorkerKey, source: Source, limits: Limits | None = None) -> bytes | None:
        """Load a version into a worker; what it says that it can do, as JSON. Starting it again is harmless.

        Raises `AgentInvalid` with the reason when it does not load, `AgentUnhealthy` when a hook fails, and
        `VersionConflict` when the version is started already with another source or other limits.
        """
        self._check_open()
        limits = limits or self.limits
        known = self._agents.get(key)
        if known is not None:
            if (known.source, known.limits) != (source, limits):
                raise VersionConflict(f"{key.agent_id!r} {key.version} is started already with another source.")
            await self._loaded(known)
            return known.capabilities_json
        size = len(source.text.encode(errors="replace"))
        if size > self.config.source_bytes_max:
            raise AgentInvalid(
                f"The source of {key.agent_id!r} is {size:,} bytes; at most {self.config.source_bytes_max:,} go in.",
                fix="Shorten it, move data out of it, or raise IsolationConfig.source_bytes_max.",
            )
        agent = _Agent(key, source, limits)
        self._agents[key] = agent
        self._start_worker(agent)
        await self._loaded(agent)
        return agent.capabilities_json

    async def _loaded(self, agent: _Agent) -> None:
        """Wait for the first worker; a version of which it fails is forgotten, and each that waits gets the error."""
        first = agent.first
        await asyncio.wait((first,))
        if first.cancelled():
            raise NotOpen("The pool of isolated workers was closed meanwhile.")
        if (error := first.exception()) is not None:
            if self._agents.get(agent.key) is agent:
                await self.stop(agent.key)
            raise error

    async def stop(self, key: WorkerKey) -> None:
        """Forget a version; its workers end when their executions have."""
        agent = self._agents.pop(key, None)
        if agent is not None:
            agent.is_stopped = True
            for worker in agent.workers:
                worker.retire()

    async def execute(
        self,
        key: WorkerKey,
        input_json: bytes,
        *,
        execution_id: str,
        deadline_s: float,
        state_json: bytes | None = None,
        attempt: int = 1,
        on_progress: OnProgress | None = None,
        on_event: OnEvent | None = None,
        on_output: OnOutput | None = None,
    ) -> ProcessOutcome:
        """Run a started version once; returns how it ended, whatever it did.

        `state_json` is the object that the agent's instance remembers, for `context.state`; the outcome has it as the
        agent left it. `on_event` is given what it emits, as JSON, and `on_output` what it prints.

        A cancelled call returns after the work has stopped, or its worker was killed; it is `Stopped` then. Raises
        `AgentNotFound` for a version that was not started, `Overloaded` when all its workers are full, `WorkerFailed`
        when none can be made.
        """
        self._check_open()
        agent = self._agents.get(key)
        if agent is None:
            raise AgentNotFound(f"{key.agent_id!r} {key.version} of {key.tenant!r} is not started.")
        if len(input_json) > self.config.input_bytes_max:
            raise InvalidRequest(
                f"The input is {len(input_json):,} bytes; at most {self.config.input_bytes_max:,} go in.",
                fix="Send less, or raise IsolationConfig.input_bytes_max.",
            )
        if agent.claims >= agent.limits.concurrent * self.config.workers_per_agent_max:
            raise Overloaded(f"{key.agent_id!r} {key.version} runs {agent.claims} times, which is its limit.")
        ends_at = self._clock.monotonic() + deadline_s
        agent.claims += 1
        try:
            worker = agent.free_worker() or await self._worker_for(agent)
            if self._clock.monotonic() >= ends_at:
                return ProcessOutcome("timeout", error=f"No worker was ready for it within {deadline_s:g} s.")
            self._counts["executions"] += 1
            outcome = await worker.execute(
                input_json,
                execution_id=execution_id,
                deadline_s=deadline_s,
                due_at=ends_at,
                state_json=state_json,
                attempt=attempt,
                on_progress=on_progress,
                on_event=on_event,
                on_output=on_output,
            )
        finally:
            agent.claims -= 1
        self._counts["dropped_bytes"] += outcome.dropped_bytes
        if outcome.status == "completed":
            agent.deaths = 0
        return outcome

    def statistics(self) -> PoolStatistics:
        """Counters and sizes."""
        return PoolStatistics(
            agents=len(self._agents),
            workers=len(self._workers),
            warm=len(self._warm),
            executing=sum(len(worker.running) for worker in self._workers.values()),
            zygotes=self._nursery.starts,
            **self._counts,
        )

    def pids(self, key: WorkerKey | None = None) -> list[int]:
        """The processes of a version's workers; of all workers without one."""
        if key is None:
            return list(self._workers)
        agent = self._agents.get(key)
        return [] if agent is None else [worker.pid for worker in agent.workers]

    @property
    def zygote_pid(self) -> int | None:
        """The process that workers are forked from."""
        return self._nursery.pid

    # -- workers ------------------------------------------------------------------------------------------------

    async def _worker_for(self, agent: _Agent) -> WorkerProcess:
        """A worker with room, after starting as many as the claims need."""
        while True:
            self._check_open()
            wanted = min(-(-agent.claims // agent.limits.concurrent), self.config.workers_per_agent_max)
            staying = sum(not worker.is_leaving for worker in agent.workers)
            for _ in range(wanted - staying - len(agent.starting)):
                self._start_worker(agent)
            if not agent.starting:
                raise Overloaded(f"All workers of {agent.key.agent_id!r} {agent.key.version} are full.")
            done, _ = await asyncio.wait(agent.starting, return_when=asyncio.FIRST_COMPLETED)
            worker = agent.free_worker()
            if worker is not None:
                return worker
            for task in done:
                if not task.cancelled() and (error := task.exception()) is not None:
                    raise error

    def _start_worker(self, agent: _Agent) -> None:
        task = asyncio.get_running_loop().create_task(self._add_worker(agent))
        if not agent.starting and not agent.workers:
            agent.first = task
        agent.starting.add(task)
        task.add_done_callback(agent.starting.discard)
        task.add_done_callback(_retrieve)

    async def _add_worker(self, agent: _Agent) -> None:
        if agent.deaths >= _DEATHS_FREE:
            # To make workers for an agent that ends each of them would be its way to use up the host.
            pause_s = min(_PAUSE_FIRST_S * 2 ** min(agent.deaths - _DEATHS_FREE, 10), _PAUSE_MAX_S)
            await self._clock.sleep(pause_s)
        self._require_share(agent.key.tenant)
        self._arrivals.note(self._clock.monotonic())
        worker = await self._take_warm(agent.limits)
        try:
            agent.capabilities_json = await worker.load(agent.source, tenant=agent.key.tenant, limits=agent.limits)
        except BaseException:
            worker.kill("its agent did not load")
            raise
        if worker.exited.done() or agent.is_stopped:
            worker.kill("its agent was stopped")
            raise WorkerFailed("A worker ended as soon as it had its agent.")
        self._counts["cold_starts"] += 1
        worker.idle_since = self._clock.monotonic()
        agent.workers.append(worker)
        self._owners[worker.pid] = agent

    async def _take_warm(self, limits: Limits) -> WorkerProcess:
        """A hardened worker, which is from then on the caller's."""
        if (
            limits.scratch_bytes == self.limits.scratch_bytes
        ):  # mounted when it was made; all else is set with an agent
            while self._warm:
                worker = self._warm.pop(0)
                if not worker.is_leaving:
                    self._refill()
                    return worker
            self._refill()
        return await self._fork(limits)

    async def _fork(self, limits: Limits) -> WorkerProcess:
        self._make_room()
        self._forking += 1
        try:
            worker = await self._born(limits)
        finally:
            self._forking -= 1
        try:
            await worker.wait_until_hardened()
        except BaseException:
            worker.kill("it did not harden")
            raise
        return worker

    async def _born(self, limits: Limits) -> WorkerProcess:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        page_fd, shared = page.create()
        last_words, printed = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            pid = await self._nursery.fork(limits.scratch_bytes, (theirs.fileno(), printed, page_fd))
        except BaseException:
            ours.close()
            shared.close()
            os.close(last_words)
            raise
        finally:
            theirs.close()
            os.close(printed)
            os.close(page_fd)
        ours.setblocking(False)  # noqa: FBT003 - the socket's own signature
        self._counts["forks"] += 1
        worker = WorkerProcess(
            pid,
            ours,
            shared,
            last_words,
            config=self.config,
            limits=limits,
            clock=self._clock,
            on_end=self._ended,
        )
        self._workers[pid] = worker
        return worker

    def _make_room(self) -> None:
        """Stay within `workers_max`: the worker that was idle longest goes."""
        if len(self._workers) + self._forking < self.config.workers_max:
            return
        known = [each for each in self._workers.values() if each.pid in self._owners or each in self._warm]
        if not _retire_idle(known):
            raise Overloaded(f"All {self.config.workers_max} isolated workers are busy.")

    def _require_share(self, tenant: str) -> None:
        """Stay within `workers_per_tenant_max`, the one that is being started included."""
        agents = [agent for agent in self._agents.values() if agent.key.tenant == tenant]
        workers = [worker for agent in agents for worker in agent.workers if not worker.is_leaving]
        most = self.config.workers_per_tenant_max
        if len(workers) + sum(len(agent.starting) for agent in agents) > most and not _retire_idle(workers):
            raise Overloaded(f"The tenant {tenant!r} has {most} isolated workers, and all of them are busy.")

    def _ended(self, worker: WorkerProcess, reason: str, interrupted: int) -> None:
        self._workers.pop(worker.pid, None)
        if worker in self._warm:
            self._warm.remove(worker)
        agent = self._owners.pop(worker.pid, None)
        if agent is not None and worker in agent.workers:
            agent.workers.remove(worker)
        if worker.is_retired:
            self._counts["replaced"] += 1
            return
        self._counts["hogs"] += worker.is_hog
        self._counts["interrupted"] += interrupted
        if agent is not None and self._is_open:
            self._counts["killed"] += 1
            agent.deaths += 1
            key = agent.key
            self._observer.on(WorkerKilled(key.agent_id, key.version, key.tenant, reason, interrupted))

    # -- tending ------------------------------------------------------------------------------------------------

    async def _tend(self) -> None:
        """Look at every worker now and then."""
        while True:
            await self._clock.sleep(self.config.watch_s)
            now = self._clock.monotonic()
            for worker in list(self._workers.values()):
                if worker.pid in self._owners:
                    worker.watch(now)
                    if not worker.running and now - worker.idle_since >= self.config.idle_s:
                        worker.retire()
            wanted = self._warm_wanted()
            while len(self._warm) > wanted:
                self._warm.pop().retire()
            self._refill()

    def _warm_wanted(self) -> int:
        config = self.config
        return self._arrivals.wanted(
            self._clock.monotonic(), horizon_s=config.warm_horizon_s, least=config.warm_min, most=config.warm_max
        )

    def _refill(self) -> None:
        """Make as many warm workers as are wanted, while there is room for them."""
        room = self.config.workers_max - len(self._workers) - self._forking
        for _ in range(min(room, self._warm_wanted() - len(self._warm) - self._filling)):
            self._filling += 1
            self._own(self._fill())

    async def _fill(self) -> None:
        try:
            self._warm.append(await self._fork(self.limits))
        except (BackendError, IsolationUnavailable):
            # Whoever needs a worker next makes one and gets the error; to be without a warm one is only slower.
            return
        finally:
            self._filling -= 1

    def _own(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _check_open(self) -> None:
        if not self._is_open:
            raise NotOpen("The pool of isolated workers is not open.")


def _retire_idle(workers: Iterable[WorkerProcess]) -> bool:
    """Retire the one that was idle longest; False when none is."""
    idle = [worker for worker in workers if not (worker.running or worker.is_leaving)]
    oldest = min(idle, key=lambda worker: worker.idle_since, default=None)
    if oldest is not None:
        oldest.retire()
    return oldest is not None


def _retrieve(task: "asyncio.Task[None]") -> None:
    """Its waiters look at the error themselves; without any, nobody needs it."""
    if not task.cancelled():
        task.exception()
