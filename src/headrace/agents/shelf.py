"""Loaded versions of agents: one of each in a process, started once, shared by all its executions, stopped at the end.

A loaded version may have a caretaker: one instance of the agent's class whose hooks are called for all of them.
`start()` runs after loading and `stop()` when the last execution has ended after the version was replaced, evicted or
its host closed; both once. `check()` says whether it works: it fails by raising or by returning False. What `start`
makes for the executions, a client, a model, it puts on the class or into the module, because each execution has an
instance of its own. Hooks may be synchronous, then they run in a thread, or asynchronous.
"""

import asyncio
import inspect
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import msgspec

from headrace.agents.config import AgentsConfig
from headrace.agents.definition import Definition, Source, load, unhealthy
from headrace.agents.isolated import IsolatedVersion, IsolatedVersions
from headrace.agents.retry import backoff_s
from headrace.agents.store import Version
from headrace.agents.threads import DaemonThreads
from headrace.clock import Clock
from headrace.errors import (
    AgentInvalid,
    AgentUnhealthy,
    HeadraceError,
    InvalidRequest,
    IsolationRequired,
    IsolationUnavailable,
    Overloaded,
)

if TYPE_CHECKING:
    from headrace.agents.code.cache import CodeCache

_AGAIN_FIRST_S, _AGAIN_MAX_S = 1.0, 60.0
"""How long a version that failed to load is not loaded again; twice as long each time."""
_FAILURES_MAX = 10_000
LOADS_MAX = 8
"""Sources that may be loading, and hooks that may be running in threads, at once."""

VersionKey = tuple[str, str, str]
"""Tenant, agent id and version."""


class Loaded:
    """A version that can be executed."""

    __slots__ = ("caretaker", "definition", "is_retired", "isolated", "users", "version")

    def __init__(self, definition: Definition, version: Version, *, isolated: IsolatedVersion | None = None) -> None:
        self.definition = definition
        self.version = version
        self.caretaker: Any = None
        self.isolated = isolated
        """Its workers, if it does not run in this process; its hooks are theirs then."""
        self.users = 0
        """Executions that hold it."""
        self.is_retired = False

    def require_room(self) -> None:
        """Raise `Overloaded` when no worker that it may have takes one more execution."""
        if self.isolated is not None:
            self.isolated.require_room(self.users)


class _Failure(NamedTuple):
    """Why a version does not load, how often in a row, and when it may be tried again, in monotonic seconds."""

    error: HeadraceError
    times: int
    again_at: float


class Shelf:
    """The loaded versions of a process; the least recently used one goes first.

    What does not load is not loaded anew by every request: its error is told again for a while, longer each time.
    """

    def __init__(
        self, config: AgentsConfig, isolated: IsolatedVersions, code_cache: "CodeCache | None" = None, *, clock: Clock
    ) -> None:
        self._config = config
        self._clock = clock
        self._isolated = isolated
        self._code_cache = code_cache
        self._loaded: OrderedDict[VersionKey, Loaded] = OrderedDict()
        self._with_workers: set[VersionKey] = set()
        """Which of them are isolated: to look for those among all, with each deployment, grows with all."""
        self._loads: dict[VersionKey, asyncio.Task[Loaded]] = {}
        self._failures: dict[VersionKey, _Failure] = {}
        self._stops: set[asyncio.Task[None]] = set()
        self._hooks: set[asyncio.Task[Any]] = set()
        """Asynchronous hooks that run; one may swallow its cancellation, so nobody waits for its end."""
        self._threads = DaemonThreads(LOADS_MAX, name="headrace-load")

    def __len__(self) -> int:
        """How many versions are loaded."""
        return len(self._loaded)

    async def close(self) -> None:
        """Stop and forget everything."""
        for load_task in self._loads.values():
            load_task.cancel()
        await asyncio.gather(*self._loads.values(), return_exceptions=True)
        for loaded in self._loaded.values():
            # What still runs was left behind by its host; nobody waits for it any more.
            loaded.users = 0
            self.retire(loaded)
        self._loaded.clear()
        self._with_workers.clear()
        if self._stops:
            await asyncio.wait(self._stops, timeout=self._config.health_timeout_s)
        for stop in self._stops:
            stop.cancel()
        await asyncio.gather(*self._stops, return_exceptions=True)
        for hook in self._hooks:
            hook.cancel()
        self._threads.close()

    def find(self, key: VersionKey) -> Loaded | None:
        """A version that is loaded."""
        loaded = self._loaded.get(key)
        if loaded is not None:
            self._loaded.move_to_end(key)
        return loaded

    async def get(self, key: VersionKey, version_of: Callable[[], Awaitable[Version]]) -> Loaded:
        """A version; one load however many ask."""
        if (loaded := self.find(key)) is not None:
            return loaded
        load_task = self._loads.get(key)
        if load_task is None:
            failure = self._failures.get(key)
            if failure is not None and self._clock.monotonic() < failure.again_at:
                raise failure.error.with_traceback(None)
            load_task = asyncio.get_running_loop().create_task(self._load(key, version_of))
            self._loads[key] = load_task
            load_task.add_done_callback(lambda _: self._loads.pop(key, None))
        return await asyncio.shield(load_task)

    async def _load(self, key: VersionKey, version_of: Callable[[], Awaitable[Version]]) -> Loaded:
        version = await version_of()
        try:
            loaded = await self.load(key[0], version)
        except (AgentInvalid, IsolationUnavailable) as error:
            self._note_failure(key, error)
            raise
        self.put(key, loaded)
        return loaded

    def _note_failure(self, key: VersionKey, error: HeadraceError) -> None:
        before = self._failures.pop(key, None)
        times = 1 if before is None else before.times + 1
        pause_s = backoff_s(times, first_s=_AGAIN_FIRST_S, limit_s=_AGAIN_MAX_S, rng=lambda: 1.0)
        self._failures[key] = _Failure(error, times, self._clock.monotonic() + pause_s)
        if len(self._failures) > _FAILURES_MAX:
            del self._failures[next(iter(self._failures))]

    async def load(self, tenant: str, version: Version) -> Loaded:
        """Load a version and start it, here or in a worker; it is not on the shelf yet.

        Raises `AgentInvalid` when it does not load, `AgentUnhealthy` when its `start` or `check` fails,
        `IsolationUnavailable` and `IsolationRequired` when it cannot or may not run where it is to.
        """
        if version.isolation == "process":
            isolated = await self._isolated.start(tenant, version)
            return Loaded(_definition_of(version.source), version, isolated=isolated)
        if not self._config.trusted_allowed:
            source = version.source
            raise IsolationRequired(
                f"{source.agent_id!r} {source.version} is a trusted version, and agents.trusted_allowed is false."
            )
        definition = await self._load_in_thread(version.source)
        loaded = Loaded(definition, version)
        try:
            if definition.caretaker is not None:
                loaded.caretaker = await self._in_thread(version.source, "__init__", definition.caretaker)
            await self._hook(loaded, "start")
            await self._check(loaded)
        except BaseException:
            self.retire(loaded)
            raise
        return loaded

    async def _check(self, loaded: Loaded) -> None:
        if await self._hook(loaded, "check") is False:
            raise unhealthy(*_name_of(loaded), "check", "it returned False")

    async def capabilities(self, loaded: Loaded) -> msgspec.Raw | None:
        """What the agent says that it can do, as JSON; one that cannot say it is retired."""
        if loaded.isolated is not None:
            return loaded.isolated.capabilities
        try:
            said = await self._hook(loaded, "get_capabilities")
            return None if said is None else msgspec.Raw(msgspec.json.encode(said))
        except (TypeError, ValueError, RecursionError) as error:
            self.retire(loaded)
            raise unhealthy(*_name_of(loaded), "get_capabilities", f"no JSON: {error}") from error
        except BaseException:
            self.retire(loaded)
            raise

    def put(self, key: VersionKey, loaded: Loaded) -> None:
        """Keep a version for all that ask; what it replaces is retired."""
        self._failures.pop(key, None)
        replaced = self._loaded.pop(key, None)
        self._loaded[key] = loaded
        (self._with_workers.discard if loaded.isolated is None else self._with_workers.add)(key)
        if replaced is not None:
            self.retire(replaced)
        if len(self._loaded) > self._config.definitions_max:
            self._remove(next(iter(self._loaded)))

    def drop(self, tenant: str, agent_id: str) -> None:
        """Retire all versions of an agent."""
        for key in [key for key in self._loaded if key[:2] == (tenant, agent_id)]:
            self._remove(key)

    def _remove(self, key: VersionKey) -> None:
        self._with_workers.discard(key)
        self.retire(self._loaded.pop(key))

    def keep_workers_of(self, tenant: str, agent_id: str, versions: Collection[str]) -> None:
        """Retire an agent's isolated versions but these: workers take memory even when nothing is sent to them."""
        mine = [key for key in self._with_workers if key[:2] == (tenant, agent_id)]
        for key in mine:
            if key[2] not in versions:
                self._remove(key)

    def release(self, loaded: Loaded) -> None:
        """An execution is done with it."""
        loaded.users -= 1
        if loaded.is_retired and not loaded.users:
            self._stop(loaded)

    def retire(self, loaded: Loaded) -> None:
        """Stop it as soon as no execution holds it."""
        loaded.is_retired = True
        if not loaded.users:
            self._stop(loaded)

    def _stop(self, loaded: Loaded) -> None:
        has_hook = callable(getattr(loaded.caretaker, "stop", None))
        if loaded.isolated is None and not has_hook:
            loaded.definition.unload()
            return
        task = asyncio.get_running_loop().create_task(self._stop_and_unload(loaded))
        self._stops.add(task)
        task.add_done_callback(self._stops.discard)

    async def _stop_and_unload(self, loaded: Loaded) -> None:
        if loaded.isolated is not None:
            await loaded.isolated.stop()
            return
        try:
            await self._hook(loaded, "stop")
        except (AgentUnhealthy, Overloaded) as error:
            # Nothing depends on it any more; its author finds it where other faults of the process are told.
            asyncio.get_running_loop().call_exception_handler({"message": "an agent did not stop", "exception": error})
        finally:
            loaded.definition.unload()

    async def _hook(self, loaded: Loaded, name: str) -> Any:
        hook = getattr(loaded.caretaker, name, None)
        if not callable(hook):
            return None
        source = loaded.version.source
        if not inspect.iscoroutinefunction(hook):
            return await self._in_thread(source, name, hook)
        calling = asyncio.get_running_loop().create_task(hook())
        self._hooks.add(calling)
        calling.add_done_callback(self._hooks.discard)
        try:
            return await self._result_of(calling, source, name)
        finally:
            calling.cancel()

    async def _in_thread(self, source: Source, name: str, function: Callable[[], Any]) -> Any:
        if not self._threads.reserve():
            raise Overloaded(
                f"{LOADS_MAX} sources are being loaded or checked in this process, and none of them ends."
            )
        return await self._result_of(self._threads.run(function), source, name)

    async def _result_of(self, calling: "asyncio.Future[Any]", source: Source, name: str) -> Any:
        """What a hook returned in its time."""
        done, _ = await asyncio.wait({calling}, timeout=self._config.health_timeout_s)
        if not done:
            raise unhealthy(
                source.agent_id, source.version, name, f"it took longer than {self._config.health_timeout_s:g} s"
            )
        if calling.cancelled():
            raise unhealthy(source.agent_id, source.version, name, "it cancelled itself")
        error = calling.exception()
        if error is not None:
            raise unhealthy(source.agent_id, source.version, name, f"{type(error).__name__}: {error}") from error
        return calling.result()

    async def _load_in_thread(self, source: Source) -> Definition:
        # Threads of their own: a deployment must not wait for busy agents, nor a hanging one hold up anything else.
        if not self._threads.reserve():
            raise Overloaded(f"{LOADS_MAX} sources are being loaded in this process, and none of them ends.")
        loading = self._threads.run(
            partial(load, source, bytes_max=self._config.source_bytes_max, code_cache=self._code_cache)
        )
        done, _ = await asyncio.wait({loading}, timeout=self._config.load_timeout_s)
        if not done:
            loading.add_done_callback(_unload)
            raise AgentInvalid(
                f"The source of {source.agent_id!r} is not loaded after {self._config.load_timeout_s:g} s.",
                fix="Move slow work out of the module's top level, into `execute`.",
            )
        definition: Definition = loading.result()
        return definition


def _definition_of(source: Source) -> Definition:
    """A version as the host knows it that has not so much as looked at its source."""

    def refuse() -> NoReturn:
        raise InvalidRequest(
            f"{source.agent_id!r} {source.version} runs in isolated processes; there are no instances of it here.",
            fix="Execute it.",
        )

    return Definition(
        agent_id=source.agent_id,
        version=source.version,
        sha256=source.sha256,
        make=refuse,
        is_async=True,
        timeout_s=source.timeout_s,
        module="",
    )


def _name_of(loaded: Loaded) -> tuple[str, str]:
    return loaded.definition.agent_id, loaded.definition.version


def _unload(loading: "asyncio.Future[Definition]") -> None:
    """Forget what was loaded too late."""
    if not loading.cancelled() and loading.exception() is None:
        loading.result().unload()
