"""The composition root: a `Config` becomes open rooms that know each other only here."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from headrace.actions import Action, ClearCache, ResizeMemory, RollbackAgent, ScaleWorkers
from headrace.agents import AgentHost
from headrace.cache import Cache, CachePolicy, MemoryCache
from headrace.clock import Clock, SystemClock
from headrace.config import Config
from headrace.database import Database
from headrace.errors import BugError, CallerError
from headrace.events import Observer, Observers, Silent
from headrace.monitor import Counters, Monitor, SnapshotFile

# What is in service must be seen by all workers soon after a switch, and that an agent is not there is not remembered
# at all, since its deployment may be the next request; the totals in a status may be a little older.
_OWN_POLICIES = (
    CachePolicy(match="agent:*", ttl=60.0, memory_ttl=1.0, stale_max=30.0, negative_ttl=0.0),
    CachePolicy(match="agent-status:*", ttl=5.0, memory_ttl=1.0, stale_max=30.0, negative_ttl=0.0),
)


WORKERS_MAX = 256
"""Most serving processes of one service."""


def ask_for_workers(directory: Path, workers: int) -> None:
    """Leave word in the run directory for the supervisor, who reads it at SIGUSR1; the last word counts.

    A number rather than a signal a worker: signals that come close together are delivered as one.
    """
    unfinished = directory / f"workers.{os.getpid()}.new"
    unfinished.write_text(str(workers))
    unfinished.replace(directory / "workers")


def asked_for_workers(directory: Path) -> int | None:
    """How many workers somebody asked for; None if nobody did."""
    try:
        return int((directory / "workers").read_text())
    except (OSError, ValueError):
        return None


@asynccontextmanager
async def watching(monitor: Monitor) -> "AsyncIterator[asyncio.Task[None]]":
    """Let the monitor tick while the block runs, in the task that it gets: one that ends before it is a failure."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(monitor.run())
    task.add_done_callback(_tell_end)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _tell_end(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()):
        task.get_loop().call_exception_handler({"message": "the monitor stopped watching", "exception": error})


class Rooms:
    """Cache, database, agents and monitor, opened in the order in which they need each other and closed in reverse.

    In one process alone the monitor watches by itself. Under `headrace up`, `directory` is where the processes of the
    service meet: they count into one shared file, the controller adds up and publishes, the workers read.
    `tier_of` names the tier of a tenant that `agents.tenants` does not.
    """

    def __init__(
        self,
        config: Config,
        *,
        clock: Clock | None = None,
        observer: Observer | None = None,
        directory: Path | None = None,
        worker: int = 0,
        supervisor_pid: int | None = None,
        tier_of: Callable[[str], str | None] | None = None,
    ) -> None:
        self.config = config
        self._clock = clock or SystemClock()
        self._directory = directory
        self._supervisor_pid = supervisor_pid
        self._stack = AsyncExitStack()
        self._counters = Counters.open(
            directory and directory / "counters", slots=config.monitor.slots, slot_bytes=config.monitor.slot_bytes
        )
        self.monitor = Monitor(
            config.monitor,
            clock=self._clock,
            counters=self._counters,
            publication=SnapshotFile(directory / "snapshot") if directory else None,
            fold=directory is None,
            observer=observer or Silent(),
        )
        self.observer = observer = Observers(observer or Silent(), self.monitor.observer)
        self.cache = Cache(
            memory=config.cache.memory,
            remote=config.cache.remote,
            policies=(*config.cache.policies, *_OWN_POLICIES),
            namespace=config.cache.namespace,
            clock=self._clock,
            observer=observer,
        )
        self.database = (
            Database(config.database, cache=self.cache, clock=self._clock, observer=observer)
            if config.database.shards
            else None
        )
        self.agents = AgentHost(
            config.agents,
            cache=self.cache,
            database=self.database,
            observer=observer,
            clock=self._clock,
            writer=f"{os.uname().nodename}/{worker}",
            tier_of=tier_of,
        )
        self.monitor.add_source(self._measured)

    async def __aenter__(self) -> Self:
        """Open every room that the configuration turns on."""
        async with AsyncExitStack() as stack:
            # Finding a slot in the shared file, now or at the end, may wait for a lock; the loop must not.
            stack.push_async_callback(asyncio.to_thread, self._counters.close)
            await asyncio.to_thread(self._counters.settle)
            await stack.enter_async_context(watching(self.monitor))
            await stack.enter_async_context(self.cache)
            if self.database is not None:
                await stack.enter_async_context(self.database)
            await stack.enter_async_context(self.agents)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close them, the last one first."""
        await self._stack.aclose()

    async def apply(self, action: Action) -> None:
        """Carry out one decision: the only place where the system changes itself."""
        match action:
            case ClearCache():
                await self.cache.clear()
            case ResizeMemory(entries_max=entries_max):
                self._memory().resize(entries_max=entries_max)
            case RollbackAgent(agent_id=agent_id, version=version):
                await self.agents.rollback(agent_id, version)
            case ScaleWorkers(workers=workers):
                await self._scale(workers)
            case _:
                raise BugError(f"There is no way to carry out {type(action).__name__}.")

    def _memory(self) -> MemoryCache:
        if self.cache.memory is None:
            raise CallerError("The cache has no memory tier to resize.", fix="Turn `cache.memory` on.")
        return self.cache.memory

    async def _scale(self, workers: int) -> None:
        if self._supervisor_pid is None or self._directory is None:
            raise CallerError(
                "This process has no supervisor that could start workers.", fix="Run it under `headrace up`."
            )
        if not 1 <= workers <= WORKERS_MAX:
            raise CallerError(f"A service has between 1 and {WORKERS_MAX} workers, not {workers}.")
        await asyncio.to_thread(ask_for_workers, self._directory, workers)
        os.kill(self._supervisor_pid, signal.SIGUSR1)

    def _measured(self) -> dict[str, float]:
        """What this process's rooms count by themselves, for the monitor to publish."""
        statistics = self.cache.statistics()
        return {
            "memory_hits": statistics.memory_hits,
            "memory_misses": statistics.memory_misses,
            "remote_hits": statistics.remote_hits,
            "remote_misses": statistics.remote_misses,
            "entries": statistics.entries,
            "executions_running": self.agents.running,
            "executions_started": self.agents.started,
        }
