"""Hosts in one process on a real database: leases, lost answers, limits and trials that they share."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from headrace.agents import AgentHost, AgentsConfig, TenantConfig, TierConfig, acceptance, nodes
from headrace.agents.stores.postgres import PostgresStore
from headrace.clock import SystemClock
from headrace.errors import DatabaseUnavailable, IsolationUnavailable, RateLimited
from headrace.events import NodeFenced, NodesLost, Silent
from tests.agent_nodes import until_the_day_lasts

ECHO = "async def Agent(input, context): return input"
STUBBORN = """
import asyncio
gate, attempts, begun = asyncio.Event(), [], asyncio.Event()
async def Agent(input, context):
    attempts.append(context.attempt)
    begun.set()
    while not gate.is_set():
        try:
            await gate.wait()
        except asyncio.CancelledError:
            continue
    return context.attempt
"""
PROGRESSING = """
import asyncio
gate = asyncio.Event()
async def Agent(input, context):
    context.progress(1, 2)
    await gate.wait()
"""
CONFIG = {"node_lease_s": 36_000.0, "queue_poll_s": 0.05, "retry_first_s": 0.01, "cancel_grace_s": 0.1}


class Notes:
    def __init__(self):
        self.events = []

    def on(self, event):
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


@asynccontextmanager
async def hosts(database, count, *, observer=None, **config):
    """Several hosts that beat when they are told to and not before: their leases are far longer than a test."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                AgentHost(
                    AgentsConfig(**{**CONFIG, **config}),
                    database=database,
                    writer=f"w{n}",
                    observer=observer or Silent(),
                )
            )
            for n in range(count)
        ]


async def beat(*several):
    """One beat of each host on each shard."""
    for host in several:
        for shard in host._store.shards:
            await host._membership.beat(shard)


async def until(condition):
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.01)


def module_of(host):
    import sys

    return sys.modules[host._shelf.find(("default", "a", "1.0.0")).definition.module]


async def test_a_fenced_host_goes_on_under_another_name(database):
    """What it ran is given back, even to itself, but not before it has stopped there; one result is kept."""
    notes = Notes()
    async with hosts(database, 2, observer=notes) as (host, other):
        await host.deploy("a", STUBBORN, version="1.0.0", idempotent=True)
        await other._queue.close()  # so that the fenced one gets it back
        module = module_of(host)
        await host.submit("a", None, execution_id="e")
        await module.begun.wait()
        for node in database.nodes.values():
            await node.execute("UPDATE headrace_nodes SET lease_until = now() - interval '1 s' WHERE node LIKE 'w0%'")
        await beat(other)
        await beat(host, host)
        assert (await host.execution("a", "e")).status == "queued"
        module.gate.set()

        async def is_over():
            return (await host.execution("a", "e")).is_finished

        await until(is_over)
        ended = await host.execution("a", "e")
        assert (ended.status, ended.output, module.attempts) == ("completed", 2, [1, 2])
        await until(lambda: asyncio.sleep(0, host.running == 0))  # told only after it is on record
    assert len(notes.of(NodeFenced)) == len(database.nodes)
    assert sum(event.runs for event in notes.of(NodeFenced)) == 1
    assert sum(event.returned for event in notes.of(NodesLost)) == 1


async def test_a_beat_that_takes_longer_than_the_lease_does_not_end_its_own_node(database, monkeypatch):
    """It lives, and renews it with the next beat, unless another node has seen the lease end."""
    notes = Notes()
    async with hosts(database, 1, observer=notes) as (host,):
        renew = host._store.beat

        async def renew_in_vain(shard, node, **more):
            told = await renew(shard, node, **more)
            await database.nodes[shard].execute("UPDATE headrace_nodes SET lease_until = now() - interval '1 s'")
            return told

        monkeypatch.setattr(host._store, "beat", renew_in_vain)
        await beat(host)
        monkeypatch.setattr(host._store, "beat", renew)
        await beat(host)
    assert (notes.of(NodesLost), notes.of(NodeFenced)) == ([], [])


async def test_what_may_not_begin_and_is_ours_all_the_same_is_tried_again(database, monkeypatch):
    """Taken twice, it can be refused to both takings: it goes back to the queue, and nobody waits for ever."""
    async with hosts(database, 1) as (host,):
        await host.deploy("a", ECHO, version="1.0.0")
        begin, refused = host._store.begin, []

        async def refuse_once(submission):
            if refused:
                return await begin(submission)
            refused.append(submission)
            return False

        monkeypatch.setattr(host._store, "begin", refuse_once)
        await host.submit("a", 7, execution_id="e")

        async def is_over():
            return (await host.execution("a", "e")).is_finished

        await until(is_over)
        ended = await host.execution("a", "e")
        assert (ended.status, ended.output, ended.attempt) == ("completed", 7, 1)


async def test_progress_whose_writing_failed_is_written_again(database, monkeypatch):
    """Also when the agent says nothing new meanwhile."""
    async with hosts(database, 1) as (host,):
        await host.deploy("a", PROGRESSING, version="1.0.0")
        report, refused = host._store.report, []

        async def refuse_once(shard, submissions):
            if refused:
                return await report(shard, submissions)
            refused.append(submissions)
            raise DatabaseUnavailable("the connection broke")

        monkeypatch.setattr(host._store, "report", refuse_once)
        await host.submit("a", None, execution_id="e")

        async def is_told():
            return (await host.execution("a", "e")).progress is not None

        await until(is_told)
        module_of(host).gate.set()
    assert refused


async def test_what_was_taken_in_an_answer_that_was_lost_goes_back(database):
    """However late the taking was carried out: it is given up with what else is unknown here."""
    async with hosts(database, 1) as (host,):
        await host.deploy("a", ECHO, version="1.0.0")
        shard = host._store.shard_of("default")
        await host._queue.close()
        await host.submit("a", 7, execution_id="e")
        asked = {"threaded": False, "limit": 1, "free": {}, "free_default": 1}
        host._membership.doubt(shard)
        await host._store.take(shard, owner=host._membership.owner(shard), **asked)
        await beat(host)
        (again,) = await host._store.take(shard, owner=host._membership.owner(shard), **asked)
        assert again.key == ("default", "e")


@pytest.mark.parametrize("lost", ["begin", "submit"])
async def test_an_execution_whose_beginning_nobody_answered_for_is_found(database, monkeypatch, lost):
    """The row says that it runs, and nobody runs it: it is given up, not left running for ever."""

    class Store(PostgresStore):
        async def begin(self, submission):
            agreed = await super().begin(submission)
            if lost == "begin":
                raise DatabaseUnavailable("the answer was lost")
            return agreed

        async def submit(self, submission):
            held = await super().submit(submission)
            if lost == "submit" and submission.owner is not None:
                raise DatabaseUnavailable("the answer was lost")
            return held

    monkeypatch.setattr(nodes, "_SETTLED_S", 0.1)
    config = AgentsConfig(**CONFIG)
    store = Store(database, config, writer="w", clock=SystemClock(), observer=Silent())
    async with AgentHost(config, store=store) as host:
        await host.deploy("a", ECHO, version="1.0.0")
        if lost == "begin":
            await host.submit("a", 1, execution_id="e")
        else:
            with pytest.raises(DatabaseUnavailable):
                await host.execute("a", 1, execution_id="e")

        async def is_over():
            await beat(host)
            return (await host.execution("a", "e")).is_finished

        await until(is_over)
        assert (await host.execution("a", "e")).status == "interrupted"
        await until(lambda: asyncio.sleep(0, host.running == 0))


async def test_nodes_that_live_share_a_tenants_limit(database):
    """Each gets its part once it has heard of the others, and a part more when one leaves."""
    tier = TierConfig(name="small", executions_max=6)
    config = {"tiers": (tier,), "tenants": (TenantConfig(name="t", tier="small"),)}
    async with hosts(database, 2, **config) as (first, second):
        async with hosts(database, 1, **config):
            await beat(first, second)
            assert [host._admission.share("t") for host in (first, second)] == [2, 2]
        await beat(first, second)
        assert [host._admission.share("t") for host in (first, second)] == [3, 3]


async def test_a_daily_quota_counts_over_all_nodes(database):
    """What one recorded, the other knows after a beat."""
    await until_the_day_lasts()
    tier = TierConfig(name="small", executions_max=100, executions_per_day=10)
    config = {"tiers": (tier,), "tenants": (TenantConfig(name="t", tier="small"),)}
    async with hosts(database, 2, **config) as (first, second):
        await first.deploy("a", ECHO, version="1.0.0", tenant="t")
        for n in range(8):
            await first.execute("a", n, tenant="t")
        await second.execute("a", 0, tenant="t")
        await beat(second)
        await second.execute("a", 1, tenant="t")
        with pytest.raises(RateLimited, match="of today"):
            await second.execute("a", 2, tenant="t")


async def test_a_queue_is_bounded_over_all_nodes(database):
    """Another node's submissions count after a beat."""
    async with hosts(database, 2, queued_max=5) as (first, second):
        await first.deploy("a", ECHO, version="1.0.0")
        for host in (first, second):
            await host._queue.close()
        for n in range(4):
            await first.submit("a", n)
        await second.submit("a", 4)
        await beat(second)
        with pytest.raises(Exception, match="are queued already"):
            await second.submit("a", 5)


async def test_a_host_that_is_closed_leaves_at_once(database):
    """Nobody waits for the end of its lease, and its queue is taken by others."""
    async with hosts(database, 1) as (stays,):
        async with hosts(database, 1) as (leaves,):
            await leaves.deploy("a", ECHO, version="1.0.0")
            await stays._queue.close()
            await leaves._queue.close()
            await leaves.submit("a", 1, execution_id="e")
        rows = await database.fetch_everywhere("SELECT node FROM headrace_nodes")
        assert len(rows) == len(database.nodes)
        await stays._queue.open()

        async def is_over():
            return (await stays.execution("a", "e")).is_finished

        await until(is_over)
        assert (await stays.execution("a", "e")).output == 1


async def test_old_executions_are_forgotten_by_a_host(database, monkeypatch):
    """Their ids are free again."""
    monkeypatch.setattr("headrace.agents.nodes._FORGET_S", 0.02)
    async with hosts(database, 1, executions_kept_s=0.001) as (host,):
        await host.deploy("a", ECHO, version="1.0.0")
        await host.execute("a", 1, execution_id="e")

        async def is_forgotten():
            return await database.fetch_everywhere("SELECT 1 FROM headrace_executions") == []

        await until(is_forgotten)
        assert (await host.execute("a", 2, execution_id="e")).output == 2


async def test_what_a_node_cannot_isolate_is_left_to_one_that_can(database, monkeypatch):
    """It is queued again, and runs where it may."""
    monkeypatch.setattr(acceptance, "_UNFIT_FIRST_S", 0.01)
    async with hosts(database, 2) as (able, lacking):
        await able.deploy("a", ECHO, version="1.0.0")
        await beat(able, lacking)
        await able._queue.close()
        refusals = []

        async def refuse(*asked):
            refusals.append(asked)
            raise IsolationUnavailable("This machine has no Landlock.")

        lacking._versions.choose = refuse
        await able.submit("a", 1, execution_id="e")
        lacking._queue.wake(able._store.shard_of("default"), threaded=False)
        await until(lambda: asyncio.sleep(0, len(refusals) > 1))
        assert (await able.execution("a", "e")).status == "queued"
        await lacking._queue.close()  # or it could be quicker than the other each time
        await able._queue.open()

        async def is_over():
            return (await able.execution("a", "e")).is_finished

        await until(is_over)
        assert (await able.execution("a", "e")).output == 1


@pytest.mark.parametrize("alone", [True, False])
async def test_what_nobody_can_isolate_fails_with_the_reason(database, monkeypatch, alone):
    """At once when there is no other node, else when the others had their time."""
    monkeypatch.setattr(acceptance, "_UNFIT_FIRST_S", 0.01)
    monkeypatch.setattr(acceptance, "_OTHERS_S", 0.1)
    async with hosts(database, 1 if alone else 2) as several:
        await several[0].deploy("a", ECHO, version="1.0.0")
        await beat(*several)
        for host in several:
            await host._queue.close()
        await several[0].submit("a", 1, execution_id="e")

        async def refuse(*asked):
            raise IsolationUnavailable("This machine has no Landlock.")

        for host in several:
            host._versions.choose = refuse
            await host._queue.open()

        async def is_over():
            return (await several[0].execution("a", "e")).is_finished

        await until(is_over)
        ended = await several[0].execution("a", "e")
        assert (ended.status, ended.error) == ("failed", "This machine has no Landlock.")
