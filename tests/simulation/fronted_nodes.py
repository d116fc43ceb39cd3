"""Nodes on a real Postgres, in real time with short leases, whose calls of the store pass somebody who fails them.

What the simulation cannot show is shown here: statements of several nodes that run at the same time. A seed decides
what is tried; what comes of it is up to the machine as well, so a seed does not repeat a run.
"""

import asyncio
import random
from contextlib import AsyncExitStack
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import psycopg

from headrace.agents import AgentHost, AgentsConfig, nodes
from headrace.agents.stores.postgres import PostgresStore
from headrace.clock import SystemClock
from headrace.database import Database, DatabaseConfig, ShardConfig
from headrace.errors import DatabaseUnavailable, HeadraceError, OutcomeUnknown
from headrace.events import Silent
from tests.simulation.history import ATTEMPTS, History
from tests.simulation.simulated_nodes import NODE, SOURCES

CONFIG = AgentsConfig(
    node_lease_s=1.0,
    queue_poll_s=0.1,
    journal_retry_s=0.5,
    retry_first_s=0.05,
    retry_max_s=0.2,
    drain_s=0.5,
    queue_batch_max=4,
    timeout_s=5.0,
)
CALLS = {
    *("submit", "withdraw", "take", "begin", "give_back", "give_back_unknown", "disown", "retry", "finish", "cancel"),
    *("execution", "join", "beat", "reap"),
}
FAILED_SHARE = 0.05
ACTIVE_S = 5.0
PROMISED_MIN = 10
SETTLE_S = 60.0
"""Far more than a lease and a doubt, for machines that have much else to do."""
RUNNING = ("plain", "again", "counter")
_SEVER = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND usename IS NOT NULL"
_ROWS = """SELECT execution_id, status, output::text AS output, error, owner, attempt, agent_id, instance
FROM headrace_executions ORDER BY execution_id"""


class Front:
    """A store that is slow, fails before it does anything or after it, or cannot be reached."""

    def __init__(self, store: Any, rng: random.Random) -> None:
        self._store = store
        self._rng = rng
        self.is_cut = self.is_well = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in CALLS:
            return method

        async def call(*arguments: Any, **options: Any) -> Any:
            moods = ["slow", "before", "after"]
            mood = self._rng.choice(moods) if self._rng.random() < FAILED_SHARE and not self.is_well else None
            if mood == "slow":
                await asyncio.sleep(self._rng.uniform(0, 1))
            if self.is_cut or mood == "before":
                raise DatabaseUnavailable("The connection broke.")
            answer = await method(*arguments, **options)
            if self.is_cut or mood == "after":
                raise OutcomeUnknown("The connection broke.")
            return answer

        return call


class FrontedNode:
    """A host behind a front; what the agents look at is as in the simulation."""

    is_dead = False

    def __init__(self, name: str, database: Database, history: History, rng: random.Random) -> None:
        self._name = name
        # Whether a lease held at a moment is not to be known in real time.
        shard = SimpleNamespace(is_leased=lambda _: False)
        self.cluster = SimpleNamespace(history=history, shard=shard, trace=[])
        store = PostgresStore(database, CONFIG, writer=name, clock=SystemClock(), observer=Silent())
        self.front = Front(store, rng)
        self.context = copy_context()
        self.context.run(NODE.set, self)
        self.host = AgentHost(CONFIG, store=self.front, writer=name)

    def __repr__(self) -> str:
        return self._name

    def owner_of(self, _: Any) -> None:
        return None

    def run(self, work: Any) -> "asyncio.Task[Any]":
        return asyncio.get_running_loop().create_task(work, context=self.context.copy())


class FrontedLife:
    """One run of three nodes."""

    def __init__(self, seed: int, url: str) -> None:
        self._rng = random.Random(seed)
        self._url = url
        self._history = History()
        self._nodes: list[FrontedNode] = []
        self._asked: list[tuple[str, str, dict[str, Any], str | None]] = []

    async def run(self) -> tuple[list[Any], list[str]]:
        """The rows at the end, and what is wrong."""
        config = DatabaseConfig(shards=(ShardConfig(name="shard-0", dsn=self._url),), connections_max=4)
        async with AsyncExitStack() as stack:
            stack.enter_context(patch.object(nodes, "_SETTLED_S", 1.0))
            for number in range(3):
                database = await stack.enter_async_context(Database(config))
                if not number:
                    await database.nodes["shard-0"].execute("DROP SCHEMA public CASCADE")
                    await database.nodes["shard-0"].execute("CREATE SCHEMA public")
                node = FrontedNode(f"n{number}", database, self._history, random.Random(self._rng.random()))
                await node.run(node.host.__aenter__())
                stack.push_async_callback(lambda node=node: node.run(node.host.__aexit__(None, None, None)))
                self._nodes.append(node)
            await self._deploy()
            async with asyncio.TaskGroup() as actors:
                for _ in range(5):
                    actors.create_task(self._ask_for_things())
                actors.create_task(self._cut())
                actors.create_task(self._sever())
            for node in self._nodes:
                node.front.is_well = True
            rows = await self._settled()
        for row in rows:
            self._history.check_record(row)
        self._history.check_promises({row.execution_id for row in rows})
        return rows, self._history.violations

    async def _deploy(self) -> None:
        node = self._nodes[0]
        node.front.is_well = True
        for agent_id in RUNNING:
            attempts = ATTEMPTS[agent_id]
            options = {"version": "1.0.0", "idempotent": attempts > 1, "attempts_max": attempts}
            await node.run(node.host.deploy(agent_id, SOURCES[agent_id], **options))
        node.front.is_well = False

    async def _ask_for_things(self) -> None:
        rng, loop = random.Random(self._rng.random()), asyncio.get_running_loop()
        end_at = loop.time() + ACTIVE_S
        # A machine may be so slow that little is promised in that time; then for as long as it takes.
        while loop.time() < end_at or len(self._history.promised) <= PROMISED_MIN:
            await asyncio.sleep(rng.uniform(0, 0.3))
            node, deed = rng.choice(self._nodes), rng.choice(["submit", "submit", "execute", "cancel", "execution"])
            if deed in {"submit", "execute"}:
                await self._ask(node, deed, rng)
            elif self._asked:
                id, agent_id, *_ = rng.choice(self._asked[-8:])
                await self._ask_about(node, deed, id, agent_id)

    def _wish(self, rng: random.Random) -> tuple[str, str, dict[str, Any], str | None]:
        if self._asked and rng.random() < 0.2:
            return rng.choice(self._asked)
        agent_id = rng.choice(RUNNING)
        value = {"seconds": [rng.uniform(0, 0.3), rng.uniform(0, 2)], "fails": rng.choice([0, 0, 1]), "stops_s": 0.1}
        wish = f"e{len(self._asked)}", agent_id, value, rng.choice("ij") if agent_id == "counter" else None
        self._asked.append(wish)
        return wish

    async def _ask(self, node: FrontedNode, deed: str, rng: random.Random) -> None:
        id, agent_id, value, instance = self._wish(rng)
        work = getattr(node.host, deed)(agent_id, value, execution_id=id, instance=instance)
        try:
            answer = await node.run(work)
        except HeadraceError:
            return
        self._history.promised.add(id)
        self._history.tell(answer)

    async def _ask_about(self, node: FrontedNode, deed: str, id: str, agent_id: str) -> None:
        try:
            if deed == "cancel":
                self._history.cancels.add(id)
                self._history.tell_cancel(await node.run(node.host.cancel(id)))
            else:
                self._history.tell(await node.run(node.host.execution(agent_id, id)))
        except HeadraceError:
            return

    async def _cut(self) -> None:
        for _ in range(2):
            await asyncio.sleep(self._rng.uniform(0, 1))
            node = self._rng.choice(self._nodes)
            node.front.is_cut = True
            await asyncio.sleep(self._rng.uniform(0.5, 2.5 * CONFIG.node_lease_s))
            node.front.is_cut = False

    async def _sever(self) -> None:
        """End all connections, whatever they are at."""
        for _ in range(3):
            await asyncio.sleep(self._rng.uniform(0, ACTIVE_S / 3))
            async with await psycopg.AsyncConnection.connect(self._url, autocommit=True) as connection:
                await connection.execute(_SEVER)

    async def _settled(self) -> list[Any]:
        async with await psycopg.AsyncConnection.connect(
            self._url, autocommit=True, row_factory=psycopg.rows.namedtuple_row
        ) as connection:
            end_at = asyncio.get_running_loop().time() + SETTLE_S
            while True:
                rows = await (await connection.execute(_ROWS)).fetchall()
                is_over = not any(row.status in {"queued", "running"} for row in rows)
                if is_over or asyncio.get_running_loop().time() > end_at:
                    return rows
                await asyncio.sleep(0.1)
