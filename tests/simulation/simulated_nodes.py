"""Several hosts in one event loop whose time is simulated: each can be cut off, frozen and killed by itself.

Everything above the database's connections is the real thing: acceptance, queue, membership, runs, journals and the
store's own code. A statement on its way is one of the things that may happen next whenever the loop is idle. What
belongs to a node is known by a context variable that all its callbacks inherit, so that a frozen node is one whose
callbacks wait, and a killed one is one whose callbacks never come.
"""

import asyncio
import json
import random
import re
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

from headrace.agents import AgentHost, AgentsConfig
from headrace.agents.code.cache import CodeCache
from headrace.agents.code.compilation import CodePolicy
from headrace.agents.stores import execution_sql as sql
from headrace.agents.stores.executions import PostgresExecutions
from headrace.agents.stores.memory import MemoryStore
from headrace.agents.threads import DaemonThreads
from headrace.clock import Clock
from headrace.errors import BackendError, DatabaseUnavailable
from tests.simulation.history import PLANNED, Beginning, History
from tests.simulation.simulated_redis import IdleLoop

SHARD = "shard-0"
NODE: ContextVar["Node | None"] = ContextVar("NODE", default=None)
_STATEMENTS = {text: name for name, text in vars(sql).items() if name.isupper() and isinstance(text, str)}
_SHORT = {
    "INSERT INTO headrace_nodes": "JOIN",
    "UPDATE headrace_nodes": "BEAT",
    "SELECT count(*)": "LIVING",
    "DELETE FROM headrace_nodes WHERE lease_until": "BURY",
    "DELETE FROM headrace_nodes WHERE node": "LEAVE",
    "SELECT version, CASE": "STATE",
}
_LIFE = re.compile(r"-[0-9a-f]{12}\b")
_BODY = "from tests.simulation import simulated_nodes\nasync def Agent(input, context):\n    "
SOURCES = {
    "plain": _BODY + "return await simulated_nodes.work(input, context)",
    "again": _BODY + "return await simulated_nodes.work(input, context)",
    "counter": _BODY + "return await simulated_nodes.count(input, context)",
    "threaded": (
        "from tests.simulation import simulated_nodes\nclass Agent:\n    def execute(self, input, context):\n"
        "        return simulated_nodes.work_in_thread(input, context)"
    ),
}


class NodesLoop(IdleLoop):
    """Knows whose callbacks it runs."""

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> asyncio.Handle:
        node = NODE.get() if context is None else context.get(NODE)
        if node is None:
            return super().call_soon(callback, *args, context=context)
        step = _Callback(node, callback, args)
        step.handle = super().call_soon(step, context=context)
        return step.handle

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> asyncio.TimerHandle:
        node = NODE.get() if context is None else context.get(NODE)
        if node is None:
            return super().call_at(when, callback, *args, context=context)
        step = _Callback(node, callback, args)
        step.handle = timer = super().call_at(when, step, context=context)
        return timer

    def again(self, step: "_Callback", context: Context) -> None:
        """Run a callback now that its time had come for while its node was frozen."""
        super().call_soon(step, context=context)


class _Callback:
    """Of a node: runs while that does, and waits while it is frozen."""

    __slots__ = ("args", "callback", "handle", "node")

    def __init__(self, node: "Node", callback: Any, args: Any) -> None:
        self.node, self.callback, self.args = node, callback, args
        self.handle: asyncio.Handle

    def __call__(self) -> None:
        if self.handle.cancelled():
            return
        if self.node.is_frozen:
            self.node.stash.append((self, copy_context()))
        else:
            self.callback(*self.args)


class Call:
    """A call of a node's to the database, on its way there, being carried out, or on its way back."""

    __slots__ = ("answer", "error", "is_done", "is_orphan", "kind", "label", "node", "not_before", "result", "work")

    def __init__(self, node: "Node", kind: str, label: str, work: Callable[[], Any]) -> None:
        self.node, self.kind, self.work = node, kind, work
        self.label = f"{node} {kind} {label}"
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.is_done = self.is_orphan = False
        self.not_before = 0.0
        self.result: Any = None
        self.error: Exception | None = None

    def carry_out(self) -> None:
        self.is_done = True
        try:
            self.result = self.work()
        except BackendError as error:
            self.error = error

    def fail(self, error: Exception) -> None:
        self.is_orphan = True
        if not self.answer.done():
            self.answer.set_exception(error)

    def deliver(self) -> None:
        if self.error is not None:
            self.fail(self.error)
        elif not self.answer.done():
            self.answer.set_result(self.result)


class Link:
    """The database as one node sees it: `Database` and its only shard's `Node` in one."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        self.nodes = {SHARD: self}

    def locate(self, tenant: str) -> Any:
        return SimpleNamespace(shard=SHARD)

    async def fetch(self, statement: str, parameters: Any = (), *, read_only: bool = False) -> list[Any]:
        return await self._call(statement, parameters)

    async def execute(self, statement: str, *parameters: Any, key: str | None = None) -> int:
        parameters = parameters if key is not None else parameters[0]
        touched = await self._call(statement, parameters)
        return touched if isinstance(touched, int) else len(touched)

    async def fetch_one(self, statement: str, *parameters: Any, key: str, read_only: bool) -> Any:
        rows = await self._call(statement, parameters)
        return rows[0] if rows else None

    async def _call(self, statement: str, parameters: Any) -> Any:
        kind = _STATEMENTS.get(statement) or next(
            name for start, name in _SHORT.items() if statement.startswith(start)
        )
        shard = self._node.cluster.shard
        return await self._node.call(kind, _label(parameters), lambda: shard.carry_out(statement, parameters))


def _label(parameters: Any) -> str:
    """What tells a statement from another of its kind."""
    first = str(parameters[0]) if parameters else ""
    if first.startswith("[{"):
        return " ".join(f"{one['execution_id']}/{one['attempt']}" for one in json.loads(first))
    return repeatable(" ".join(str(each) for each in parameters[:3]))


def repeatable(text: str) -> str:
    """Without what differs between two runs of a seed: what a node adds to its name for each of its lives."""
    return _LIFE.sub("", text)


class Store(PostgresExecutions):
    """Executions by the real code on a simulated shard. What is deployed comes from a place that all nodes share."""

    def __init__(self, node: "Node", config: AgentsConfig, *, clock: Clock) -> None:
        super().__init__(Link(node), config, writer=node.name, clock=clock)
        self._node = node

    async def open(self) -> None:
        self._open_journals()

    async def close(self) -> None:
        await self._close_journals()

    async def has_isolated(self) -> bool:
        return False

    async def deploy(self, deployment: Any) -> Any:
        return await self._node.cluster.agents.deploy(deployment)

    async def agent(self, tenant: str, agent_id: str) -> Any:
        return await self._node.call(
            "AGENT", agent_id, lambda: _now(self._node.cluster.agents.agent(tenant, agent_id))
        )

    async def version(self, tenant: str, agent_id: str, version: str, *, shared: Any = None) -> Any:
        agents = self._node.cluster.agents
        return await self._node.call("VERSION", agent_id, lambda: _now(agents.version(tenant, agent_id, version)))


def _now(work: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


@cache
def _code() -> CodeCache:
    """Compiled once for all runs."""
    return CodeCache(None, bytes_max=1 << 20, disk_bytes_max=1 << 20, policy=CodePolicy())


class Cluster(NamedTuple):
    """What all nodes share."""

    loop: NodesLoop
    clock: Clock
    config: AgentsConfig
    shard: Any
    agents: MemoryStore
    code: CodeCache
    history: History
    calls: list[Call]
    trace: list[str]

    @classmethod
    def of(cls, loop: NodesLoop, clock: Clock, config: AgentsConfig, shard: Any, trace: list[str]) -> "Cluster":
        """A new one on a shard."""
        return cls(loop, clock, config, shard, MemoryStore(clock=clock), _code(), History(), [], trace)


class Node:
    """One life of one process."""

    def __init__(self, name: str, cluster: Cluster, *, seed: int) -> None:
        self.name = name
        self.cluster = cluster
        self.is_frozen = self.is_dead = self.is_cut = False
        self.stash: list[tuple[_Callback, Context]] = []
        self.tasks: list[asyncio.Task[Any]] = []
        """What it was asked for. Nobody else holds that of a killed node, and it is not to be collected too early."""
        self.died: asyncio.Future[None] = cluster.loop.create_future()
        self.thread: tuple[float, Beginning] | None = None
        """What was begun in a thread, and for how long."""
        self.context = copy_context()
        self.context.run(NODE.set, self)
        config, clock = cluster.config, cluster.clock
        store = Store(self, config, clock=clock)
        self.host = self.context.run(
            AgentHost, config, store=store, clock=clock, writer=name, code_cache=cluster.code, observer=self
        )
        self.host._runs._rng = random.Random(seed)

    def __repr__(self) -> str:
        return self.name

    def on(self, event: Any) -> None:
        self.cluster.trace.append(repeatable(f"{self}: {event}"))

    def run(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Work of its own."""
        task = self.cluster.loop.create_task(work, context=self.context.copy())
        self.tasks.append(task)
        return task

    async def call(self, kind: str, label: str, work: Callable[[], Any]) -> Any:
        """What the database answers, if it does."""
        if self.is_dead:
            raise DatabaseUnavailable("The process was killed.")
        call = Call(self, kind, label, work)
        self.cluster.calls.append(call)
        return await call.answer

    def thaw(self) -> None:
        """Go on as if nothing had happened."""
        self.is_frozen = False
        stash, self.stash = self.stash, []
        for step, context in stash:
            self.cluster.loop.again(step, context)

    def kill(self) -> None:
        """Nothing of it runs any more."""
        self.is_dead = self.is_frozen = True
        if not self.died.done():
            self.died.set_result(None)

    async def stop(self) -> None:
        """Close it as `headrace up` does."""
        closing = self.run(self.host.__aexit__(None, None, None))
        await asyncio.wait({closing, self.died}, return_when=asyncio.FIRST_COMPLETED)
        if closing.done():
            closing.result()
        self.is_dead = True
        if not self.died.done():
            self.died.set_result(None)

    def owner_of(self, context: Any) -> str | None:
        run = self.host._runs.find((context.tenant, context.execution_id))
        return run.submission.owner if run is not None and run.submission is not None else None

    def left_over(self) -> list[str]:
        """What is still counted although nothing runs."""
        host = self.host
        accounts = host._admission._accounts
        counted = {
            "places": host._places.running,
            "threads": host._threads.busy,
            "tenants": {name: account.running for name, account in accounts.items() if account.running},
            "runs": host._runs.known(),
            "on record": list(host._runs._on_record),
            "claims": list(host._acceptance.claims.values()),
            "waiting": list(host._acceptance._waiting),
            "starting": host._queue.starting(),
            "turns": list(host._states._turns),
            "busy": [key for key, instance in host._states._awake.items() if instance.is_busy],
            "users": {key: loaded.users for key, loaded in host._shelf._loaded.items() if loaded.users},
        }
        return [f"{self} still counts {name}: {left}" for name, left in counted.items() if left]


# -- what agents do ---------------------------------------------------------------------------------------------------


def _begin(context: Any) -> Beginning:
    node = NODE.get()
    assert node is not None, "an agent runs on a node"
    owner, history, shard = node.owner_of(context), node.cluster.history, node.cluster.shard
    past = len(history.beginnings[context.execution_id])
    beginning = Beginning(
        id=context.execution_id,
        attempt=context.attempt,
        node=node,
        owner=owner,
        is_leased=shard.is_leased(owner),
        token=f"{context.execution_id}/{context.attempt}/{past}",
    )
    history.begin(context.agent_id, beginning, is_leased=shard.is_leased)
    node.cluster.trace.append(f"{node}: attempt {context.attempt} of {context.execution_id} begins")
    return beginning


def _end(beginning: Beginning, returned: Any = None) -> None:
    if not beginning.node.is_dead:
        beginning.ended, beginning.returned = True, returned
        beginning.node.cluster.trace.append(f"{beginning.node}: attempt {beginning.attempt} of {beginning.id} ends")


def _seconds(input: Any, attempt: int) -> float:
    return input["seconds"][(attempt - 1) % len(input["seconds"])]


async def work(input: Any, context: Any) -> Any:
    """Take as long as the input says, fail as often, and need a moment to stop."""
    beginning, returned = _begin(context), None
    try:
        await asyncio.sleep(_seconds(input, context.attempt))
        if context.attempt <= input["fails"]:
            raise ValueError(PLANNED)
        returned = beginning.token
    except asyncio.CancelledError:
        await asyncio.sleep(input["stops_s"])
        raise
    finally:
        _end(beginning, returned)
    return returned


async def count(input: Any, context: Any) -> Any:
    """Count up in the state of an instance."""
    beginning, returned = _begin(context), None
    try:
        number = context.state.get("n", 0)
        await asyncio.sleep(_seconds(input, context.attempt))
        context.state["n"] = number + 1
        returned = [beginning.token, number + 1]
    finally:
        _end(beginning, returned)
    return returned


def work_in_thread(input: Any, context: Any) -> Any:
    """As `work`, where no cancellation reaches it: now and then it goes on for long after its deadline."""
    beginning = _begin(context)
    beginning.node.thread = 4 * _seconds(input, context.attempt), beginning
    return beginning.token


def call_in_place(threads: DaemonThreads, function: Callable[[], Any], run: Any = DaemonThreads.run) -> Any:
    """Instead of `DaemonThreads.run`: a thread would bring its own time. What it returns comes when that is over."""
    node = NODE.get()
    if node is None:  # somebody else's, in another loop
        return run(threads, function)
    result, error = None, None
    try:
        result = function()
    except BaseException as raised:  # noqa: BLE001 - it goes to whoever awaits, as it does from a thread
        error = raised
    loop = node.cluster.loop
    done: asyncio.Future[Any] = loop.create_future()
    seconds, beginning = node.thread or (0.0, None)
    node.thread = None

    def settle() -> None:
        if beginning is not None:
            _end(beginning, beginning.token)
        threads._settle(done, result, error)

    loop.call_later(seconds, settle)
    return done
