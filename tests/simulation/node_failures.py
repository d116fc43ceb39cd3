"""One seeded life of several nodes on one queue, in which the database, the network and the nodes fail.

Each seed draws what may go wrong and how often: a statement may be late, fail before it took effect or after it, or
fail and take effect later all the same; a node may be cut off or frozen for longer than its lease, killed, or closed;
the database may be away for all of them. After that everything is well again, and the promises of `history` must hold.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

from headrace.agents import AgentsConfig, TenantConfig, TierConfig
from headrace.agents.threads import DaemonThreads
from headrace.errors import DatabaseUnavailable, HeadraceError, OutcomeUnknown
from tests.simulation import simulated_nodes
from tests.simulation.history import ATTEMPTS
from tests.simulation.simulated_nodes import NODE, SOURCES, Call, Cluster, Node, NodesLoop, repeatable
from tests.simulation.simulated_postgres import SimulatedPostgres
from tests.simulation.simulated_redis import Idleness, LoopClock, Step

TENANTS = ("t", "u")
CONFIG = AgentsConfig(
    timeout_s=15.0,
    executions_max=8,
    threads_max=2,
    queue_batch_max=2,
    queue_poll_s=2.0,
    drain_s=1.0,
    retry_first_s=0.5,
    retry_max_s=8.0,
    tiers=(TierConfig(name="small", executions_max=6),),
    tenants=(TenantConfig(name="u", tier="small"),),
)
LEASE_S = CONFIG.node_lease_s
ACTIVE_S = 60.0
"""How long clients ask and things fail."""
SETTLE_S = 400.0
"""A lease, a doubt about lost answers (90 s), three attempts with their pauses, and instances that take turns."""
LATE_MAX_S = 20.0
"""How long after its connection was lost a statement may still be carried out: its lock wait and its time are limited
to less than the `_SETTLED_S` that a node gives it."""
HELD_S = (0.5, 6.0)
"""How long one that is only slow takes at most, a little or a lot."""
SLUGGISH = ("TAKE", "BEGIN", "FINISH", "SUBMIT", "BEAT", "GIVE_BACK", "RETRY", "CANCEL", "AGENT", "WITHDRAW", "DISOWN")
SHARES = (0.0, 0.0, 0.02, 0.1, 0.3)
"""Of the calls of a kind that go wrong."""
BETWEEN_TAKING_AND_BEGINNING = {"TAKE": 0.1, "AGENT": 0.3, "GIVE_BACK": 0.4, "BEGIN": 0.3, "GIVE_BACK_UNKNOWN": 0.6}
"""The same, in runs in which what was taken seldom begins in one go."""


class Outcome(NamedTuple):
    """What a run was made of."""

    ends: Counter[str]
    """Executions by how they ended."""
    beginnings: int
    faults: Counter[str]
    violations: list[str]
    trace: list[str]


class Life:
    """One run. `shard_of(now, draw)` makes the shard; `faults=False` leaves everything well."""

    def __init__(self, seed: int, *, faults: bool = True, shard_of: Callable[..., Any] = SimulatedPostgres) -> None:
        self._rng = rng = random.Random(seed)
        self._seed = seed
        self._idleness = Idleness(rng, self._steps, kind=NodesLoop)
        self._loop: Any = self._idleness.loop
        clock = LoopClock(self._loop)
        self.shard = shard_of(lambda: round(clock.wall(), 6), rng.random)
        self._cluster = Cluster.of(self._loop, clock, CONFIG, self.shard, self._idleness.trace)
        self._history = self._cluster.history
        self._nodes: list[Node] = []
        self._ids: list[tuple[str, str, str, dict[str, Any], str | None]] = []
        self._is_down = False
        self._shares = {kind: rng.choice(SHARES) for kind in SLUGGISH} if faults else {}
        self._moods = rng.sample(["held", "lost", "late"], rng.randrange(1, 4))
        if faults and rng.random() < 0.4:
            self._shares |= BETWEEN_TAKING_AND_BEGINNING
            self._moods = ["held", "held", "lost", "late"]
        deeds = [self._cut, self._freeze, self._kill, self._close, self._go_down, self._balk]
        # Where no node loses its name, nothing heals what is stuck under it.
        self._deeds = rng.choices(deeds, k=rng.choice([0, 0, 1, 2, 3, 5])) if faults else []
        self._balks: set[str] = set()
        self._graves: list[Call] = []
        """What would have been answered to a killed node: its tasks are not to be collected before the end."""
        self._traps: dict[str, asyncio.Future[Node]] = {}
        self._lives = 0
        self.faults: Counter[str] = Counter()

    def run(self) -> Outcome:
        """The whole of it."""
        self._loop.set_exception_handler(self._on_error)
        try:
            with patch.object(DaemonThreads, "run", _run_in_place):
                self._loop.run_until_complete(self._live())
        finally:
            self._loop.close()
        history, rows = self._history, self.shard.executions.values()
        ends = Counter(row.status for row in rows)
        beginnings = sum(len(each) for each in history.beginnings.values())
        return Outcome(ends, beginnings, self.faults, history.violations, self._idleness.trace)

    async def _live(self) -> None:
        first = self._new_node()
        await self._open(first)
        for tenant in TENANTS:
            for agent_id, source in SOURCES.items():
                attempts = ATTEMPTS[agent_id]
                deployment = {"version": "1.0.0", "idempotent": attempts > 1, "attempts_max": attempts}
                await first.run(first.host.deploy(agent_id, source, tenant=tenant, **deployment))
        for _ in range(self._rng.randrange(3)):
            await self._open(self._new_node())
        async with asyncio.TaskGroup() as actors:
            for number in range(self._rng.randrange(2, 5)):
                actors.create_task(self._ask_for_things(random.Random(self._seed * 16 + number)))
            for number, deed in enumerate(self._deeds):
                actors.create_task(self._do(deed, random.Random(self._seed * 16 + 8 + number)))
        self._let_go()
        await self._settle()
        self._check()
        await self._end()

    # -- nodes --------------------------------------------------------------------------------------------------------

    def _new_node(self) -> Node:
        self._lives += 1
        node = Node(f"n{self._lives}", self._cluster, seed=self._seed * 16 + self._lives)
        self._nodes.append(node)
        return node

    async def _open(self, node: Node) -> None:
        opening = node.run(node.host.__aenter__())
        await asyncio.wait({opening, node.died}, return_when=asyncio.FIRST_COMPLETED)

    def _living(self) -> list[Node]:
        return [node for node in self._nodes if not node.is_dead]

    # -- what fails ---------------------------------------------------------------------------------------------------

    async def _do(self, deed: Callable[[random.Random], Any], rng: random.Random) -> None:
        await asyncio.sleep(rng.uniform(0, ACTIVE_S))
        self.faults[deed.__name__.lstrip("_")] += 1
        await deed(rng)

    async def _victim(self, rng: random.Random) -> Node:
        """Any node, or the next one for which a statement of some kind is carried out or answered, at that moment."""
        kind = rng.choice(SLUGGISH)
        if rng.random() < 0.6 and kind not in self._traps:
            self._traps[kind] = trap = self._loop.create_future()
            await asyncio.wait({trap}, timeout=2 * LEASE_S)
            if self._traps.pop(kind, None) is None and not trap.result().is_dead:
                return trap.result()
        return rng.choice(self._living())

    async def _cut(self, rng: random.Random) -> None:
        node = await self._victim(rng)
        self._say(f"{node} is cut off")
        node.is_cut = True
        await asyncio.sleep(rng.uniform(0.5, 2.5 * LEASE_S))
        node.is_cut = False
        self._say(f"{node} is heard again")

    async def _freeze(self, rng: random.Random) -> None:
        """One process, or the machine that all of them are on."""
        victim = await self._victim(rng)
        nodes = self._living() if rng.random() < 0.4 else [victim]
        self._say(f"{nodes} are frozen")
        for node in nodes:
            node.is_frozen = True
        await asyncio.sleep(rng.uniform(0.5, 2.5 * LEASE_S))
        for node in nodes:
            if not node.is_dead:
                node.thaw()
        self._say(f"{nodes} go on")

    async def _kill(self, rng: random.Random) -> None:
        node = await self._victim(rng)
        self._say(f"{node} is killed")
        node.kill()
        for call in [call for call in self._cluster.calls if call.node is node]:
            if call.is_done or rng.random() < 0.5:
                self._cluster.calls.remove(call)
                self._graves.append(call)
            else:
                self._delay(call, rng.uniform(0, LATE_MAX_S / 4))
                call.is_orphan = True
        await self._replace(rng)

    async def _close(self, rng: random.Random) -> None:
        node = rng.choice(self._living())
        if node.is_frozen:
            return
        self._say(f"{node} is closed")
        await node.stop()
        await self._replace(rng)

    async def _replace(self, rng: random.Random) -> None:
        if self._living():
            await asyncio.sleep(rng.uniform(0, 2 * LEASE_S))
        await self._open(self._new_node())

    async def _go_down(self, rng: random.Random) -> None:
        self._say("the database goes down")
        self._is_down = True
        for call in [call for call in self._cluster.calls if call.is_orphan]:
            self._cluster.calls.remove(call)
        await asyncio.sleep(rng.uniform(0.2, 2 * LEASE_S))
        self._is_down = False
        self._say("the database is back")

    async def _balk(self, rng: random.Random) -> None:
        kind = rng.choice(SLUGGISH)
        self._say(f"no {kind} is carried out any more")
        self._balks.add(kind)
        await asyncio.sleep(rng.uniform(1, 2 * LEASE_S))
        self._balks.discard(kind)
        self._say(f"{kind} is carried out again")

    def _let_go(self) -> None:
        self._say("everything is well again")
        self._shares = {}

    # -- what may happen next -----------------------------------------------------------------------------------------

    def _steps(self) -> list[Step]:
        now = self._loop.now
        possible = [call for call in self._cluster.calls if call.not_before <= now]
        return [partial(self._advance, call) for call in sorted(possible, key=lambda call: call.label)]

    def _advance(self, call: Call) -> str:
        if (trap := self._traps.pop(call.kind, None)) is not None:
            trap.set_result(call.node)
        mood = self._mood(call)
        if mood is not None:
            self.faults[mood] += 1
        if mood == "held":
            self._delay(call, self._rng.uniform(0, self._rng.choice(HELD_S)))
            return f"{self._time()} {call.label} is held"
        if mood == "late":
            call.fail(OutcomeUnknown("The connection broke."))
            self._delay(call, self._rng.uniform(0, self._rng.choice((*HELD_S, LATE_MAX_S))))
            return f"{self._time()} {call.label} fails, and is on its way"
        if call.is_done or call.is_orphan or mood == "lost":
            self._cluster.calls.remove(call)
        if mood == "lost":
            kind = OutcomeUnknown if call.is_done else DatabaseUnavailable
            call.fail(kind("The connection broke."))
            return f"{self._time()} {call.label} fails{' and was carried out' if call.is_done else ''}"
        if call.is_done:
            call.deliver()
            return f"{self._time()} {call.label} is answered"
        self._carry_out(call)
        rows = call.result if isinstance(call.result, list) else None
        answer = call.error or call.result if rows is None else [tuple(row)[:6] for row in rows]
        return repeatable(f"{self._time()} {call.label} is carried out: {answer!r:.150}")

    def _carry_out(self, call: Call) -> None:
        """What begins on record does so for a node that has its lease."""
        shard = self.shard
        queued = (
            {row.key for row in shard.executions.values() if row.status == "queued"} if call.kind == "BEGIN" else {}
        )
        call.carry_out()
        for key in queued:
            row = shard.executions[key]
            if row.status == "running" and not shard.is_leased(row.owner):
                self._history.violations.append(f"{key} was given to {call.node} to run, whose lease is over")

    def _mood(self, call: Call) -> str | None:
        if call.is_orphan:
            return None
        if call.kind in self._balks:
            return "lost"
        if self._is_down or call.node.is_cut:
            can_be_late = not (call.is_done or self._is_down) and "late" in self._moods
            return "late" if can_be_late and self._rng.random() < 0.1 else "lost"
        if self._rng.random() >= self._shares.get(call.kind, 0.0):
            return None
        mood = self._rng.choice(self._moods)
        return "lost" if mood == "late" and call.is_done else mood

    def _delay(self, call: Call, seconds: float) -> None:
        call.not_before = self._loop.now + seconds
        self._loop.call_at(call.not_before, lambda: None)

    # -- what clients do ----------------------------------------------------------------------------------------------

    async def _ask_for_things(self, rng: random.Random) -> None:
        submit, execute = partial(self._start, "submit"), partial(self._start, "execute")
        deeds = [*[submit] * 3, *[execute] * 3, *[self._cancel] * 2, self._look]
        end_at = self._loop.now + ACTIVE_S
        while True:
            await asyncio.sleep(rng.uniform(0, 5))
            if self._loop.now >= end_at:
                return
            living = self._living()
            if living:
                await rng.choice(deeds)(rng.choice(living), rng)

    def _wish(self, rng: random.Random) -> tuple[str, str, str, dict[str, Any], str | None]:
        """An execution id with all that it stands for: a new one, or one that was asked for before."""
        if self._ids and rng.random() < 0.3:
            return rng.choice(self._ids)
        agent_id = rng.choice(list(ATTEMPTS))
        seconds = [rng.choice([rng.uniform(0, 0.5), rng.uniform(0, 4), rng.uniform(0, 20)]) for _ in range(3)]
        value = {"seconds": seconds, "fails": rng.choice([0, 0, 0, 1]), "stops_s": rng.choice([0, 0.3, 2])}
        instance = rng.choice(["i", "j"]) if agent_id == "counter" else None
        wish = f"e{len(self._ids)}", agent_id, rng.choice(TENANTS), value, instance
        self._ids.append(wish)
        return wish

    async def _start(self, call: str, node: Node, rng: random.Random) -> None:
        id, agent_id, tenant, value, instance = self._wish(rng)
        ask = getattr(node.host, call)
        work = ask(agent_id, value, execution_id=id, tenant=tenant, instance=instance)
        answer = await self._asked(node, work, rng, f"{call} {id}")
        if answer is not None:
            self._history.promised.add(id)
            self._history.tell(answer)

    async def _cancel(self, node: Node, rng: random.Random) -> None:
        if self._ids:
            id, _, tenant, _, _ = rng.choice(self._ids[-4:])
            self._history.cancels.add(id)
            cancelled = await self._asked(node, node.host.cancel(id, tenant=tenant), rng, f"cancel {id}")
            if cancelled is not None:
                self._history.tell_cancel(cancelled)

    async def _look(self, node: Node, rng: random.Random) -> None:
        for id, agent_id, tenant, _, _ in self._ids[-6:]:
            work = node.host.execution(agent_id, id, tenant=tenant)
            found = await self._asked(node, work, rng, f"look at {id}")
            if found is not None:
                self._history.tell(found)

    async def _asked(self, node: Node, work: Any, rng: random.Random, what: str) -> Any:
        """What a node answers; None if it refuses, dies, or takes longer than the client waits."""
        if node.is_dead:
            work.close()
            return None
        asking = node.run(work)
        patience_s = rng.choice([1.0, 30.0, 60.0])
        await asyncio.wait({asking, node.died}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            self._say(f"{node}: nobody waits any more for {what}")
            asking.cancel()
            return None
        error = asking.exception() if not asking.cancelled() else None
        self._say(f"{node}: {what} -> {error!r}" if error else f"{node}: {what} was answered")
        if error is not None and not isinstance(error, HeadraceError):
            self._history.violations.append(f"{what} on {node} raised {error!r}")
        return None if asking.cancelled() or error else asking.result()

    # -- the end ------------------------------------------------------------------------------------------------------

    async def _settle(self) -> None:
        end_at = self._loop.now + SETTLE_S
        while self._loop.now < end_at:
            await asyncio.sleep(LEASE_S / 2)
            if self._has_settled():
                break
        await asyncio.sleep(LEASE_S / 2)

    def _has_settled(self) -> bool:
        rows = self.shard.executions.values()
        is_over = not any(row.status in {"queued", "running"} for row in rows)
        bodies = [one for each in self._history.beginnings.values() for one in each]
        return is_over and not any(one.goes_on for one in bodies)

    def _check(self) -> None:
        history, shard = self._history, self.shard
        for row in shard.executions.values():
            history.check_record(row)
        history.check_promises({row.execution_id for row in shard.executions.values()})
        counted = Counter(
            (row.tenant, row.agent_id, row.instance)
            for row in shard.executions.values()
            if row.status == "completed" and row.instance is not None
        )
        states = {key: version for key, (version, _) in shard.states.items()}
        if counted != states:
            history.violations.append(f"completed by instance: {dict(counted)}, versions of their states: {states}")
        for node in self._living():
            history.violations += node.left_over()

    async def _end(self) -> None:
        for node in self._living():
            await node.stop()
        self._cluster.calls.clear()
        for node in self._nodes:
            node.is_dead = True
            node.thaw()
        while left := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=1)
        for node in self._nodes:
            await node.run(node.host._shelf.close())

    def _on_error(self, _: Any, context: dict[str, Any]) -> None:
        node = NODE.get()
        if node is None or not node.is_dead:
            what = context.get("task") or context.get("future")
            self._history.violations.append(f"{context['message']}: {context.get('exception')!r} {what!r:.300}")

    def _say(self, what: str) -> None:
        self._idleness.trace.append(f"{self._time()} {what}")

    def _time(self) -> str:
        return f"{self._loop.now - 1000:8.3f}"


def _run_in_place(threads: DaemonThreads, function: Callable[[], Any]) -> Any:
    return simulated_nodes.call_in_place(threads, function)


def report(seed: int, outcome: Outcome) -> str:
    """A failed run, for people."""
    return "\n".join([f"seed {seed}:", *outcome.violations, "events:", *(f"  {line}" for line in outcome.trace)])
