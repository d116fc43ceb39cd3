"""One contract for both stores: in memory and in Postgres."""

import asyncio

import msgspec
import pytest

from headrace.agents import AgentsConfig
from headrace.agents.definition import Source
from headrace.agents.execution import Execution, Progress
from headrace.agents.isolation import Limits
from headrace.agents.rollout import Tally
from headrace.agents.store import Change, Deployment, Kept, State, Submission, Totals
from headrace.agents.stores import execution_sql
from headrace.agents.stores.memory import MemoryStore
from headrace.agents.stores.postgres import PostgresStore
from headrace.clock import SystemClock
from headrace.errors import AgentNotFound, ExecutionNotFound, VersionConflict, VersionNotFound
from headrace.events import Silent
from tests.agent_nodes import until_the_day_lasts

CLOCK = SystemClock()


@pytest.fixture(params=["memory", "postgres"])
async def store(request, database):
    """A fresh store of each kind."""
    if request.param == "memory":
        store = MemoryStore(clock=CLOCK)
    else:
        store = PostgresStore(database, AgentsConfig(), writer="test/0", clock=CLOCK, observer=Silent())
    await store.open()
    yield store
    await store.close()


def deployment(
    agent_id="a", version="1.0.0", text="source", tenant="t", entrypoint="Agent", needs=(), canary=None, **more
):
    source = Source(
        agent_id=agent_id, version=version, text=text, entrypoint=entrypoint, timeout_s=2.5, dependencies=needs
    )
    return Deployment(
        deployment_id="d",
        tenant=tenant,
        agent_id=agent_id,
        name=agent_id.upper(),
        tags=("x", "y"),
        source=source,
        compile_ms=1.5,
        canary=canary,
        **more,
    )


def execution(id="e", status="completed", **fields):
    defaults = {"agent_id": "a", "version": "1.0.0", "tenant": "t", "started_at": 1_700_000_000.25}
    return Execution(id=id, status=status, **{**defaults, **fields})


async def test_a_deployed_version_is_in_service(store):
    """Agent and source come back as they were given."""
    agent = await store.deploy(deployment())
    assert await store.agent("t", "a") == agent
    assert (agent.name, agent.tags, agent.version) == ("A", ("x", "y"), "1.0.0")
    source = (await store.version("t", "a", "1.0.0")).source
    assert source == deployment().source
    assert agent.source_sha256 == source.sha256


async def test_a_tenant_sees_only_its_own(store):
    """The same id under another tenant is another agent."""
    await store.deploy(deployment(tenant="t"))
    assert await store.agent("u", "a") is None
    assert await store.agents("u", offset=0, limit=10) == ([], 0)
    with pytest.raises(VersionNotFound):
        await store.version("u", "a", "1.0.0")


@pytest.mark.parametrize("change", [{"text": "other"}, {"entrypoint": "Other"}])
async def test_a_version_stands_for_one_source_and_entrypoint(store, change):
    """What runs under a version never changes, and the version in service stays."""
    await store.deploy(deployment())
    await store.deploy(deployment())
    with pytest.raises(VersionConflict):
        await store.deploy(deployment(**change))
    assert (await store.version("t", "a", "1.0.0")).source.text == "source"


async def test_an_earlier_version_can_be_put_back(store):
    """Only one that exists."""
    await store.deploy(deployment(version="1.0.0"))
    await store.deploy(deployment(version="2.0.0", text="newer"))
    assert (await store.put_in_service("t", "a", "1.0.0")).version == "1.0.0"
    with pytest.raises(VersionNotFound):
        await store.put_in_service("t", "a", "3.0.0")
    with pytest.raises((AgentNotFound, VersionNotFound)):
        await store.put_in_service("t", "nobody", "1.0.0")


async def test_pages_are_in_the_order_of_ids(store):
    """Byte order, so that both stores and all collations agree; a page beyond the end is empty and knows the total."""
    for name in ("b", "B", "a", "a-1"):
        await store.deploy(deployment(name))
    page, total = await store.agents("t", offset=1, limit=2)
    assert ([agent.agent_id for agent, _ in page], total) == (["a", "a-1"], 4)
    assert await store.agents("t", offset=10, limit=2) == ([], 4)


async def test_a_finished_execution_comes_back_whole(store):
    """Every field, and an output that no jsonb could hold."""
    finished = execution(
        output_json=b'{"a":"\\u0000","b":[1,2.5,null]}',
        progress=Progress(1, 2, "half"),
        queue_ms=1.5,
        run_ms=2.5,
        cpu_ms=0.5,
        memory_bytes=7,
        finished_at=1_700_000_001.5,
        input_sha256="x",
    )
    await store.finish(finished)
    found = await store.execution("t", "a", "e")
    assert found.output == finished.output
    assert msgspec.structs.replace(found, output_json=None) == msgspec.structs.replace(finished, output_json=None)


async def test_the_first_result_stays(store):
    """Finishing twice, as after a commit in doubt, neither changes the result nor counts again."""
    await store.finish(execution(output_json=b"1"))
    await store.finish(execution(status="failed", error="late"))
    assert (await store.execution("t", "a", "e")).output == 1
    assert await store.totals("t", "a") == Totals(completed=1)


def submission(id="e", *, claim="mine", owner=None, tenant="t", **fields):
    waits = owner is None
    record = execution(
        id, "queued" if waits else "running", attempt=0 if waits else 1, tenant=tenant, input_sha256="x"
    )
    return Submission(
        execution=record, claim=claim, owner=owner, input_json=b'{"n":"\\u0000"}', timeout_s=5.0, **fields
    )


async def taken(store, *, owner="n1", limit=10, free=None, threaded=False, tenant="t"):
    await store.join(store.shard_of(tenant), owner, lease_s=60)
    return await store.take(
        store.shard_of(tenant), owner=owner, threaded=threaded, limit=limit, free=free or {}, free_default=1000
    )


async def begun(store, one):
    """What the host does with what it took."""
    one.execution.status, one.execution.attempt = "running", one.execution.attempt + 1
    one.execution.started_at = round(CLOCK.wall(), 6)
    return await store.begin(one)


async def test_an_id_is_given_once(store):
    """The second claimant gets what the id stands for, while it runs and when it has ended."""
    assert await store.submit(submission(owner="n1")) is None
    held = await store.submit(submission(claim="yours", owner="n2"))
    assert held.status == "running"
    await store.finish(execution(output_json=b"1"), owner="n1")
    assert (await store.submit(submission(claim="yours", owner="n2"))).output == 1


async def test_a_submission_can_be_repeated_by_its_owner(store):
    """After a commit in doubt the same claim is recognised, and somebody else's is still refused."""
    for _ in range(2):
        assert await store.submit(submission(owner="n1")) is None
    assert await store.submit(submission(claim="yours", owner="n2")) is not None


async def test_of_submissions_at_once_with_one_id_one_is_taken(store):
    """Also when they travel in one batch."""
    results = await asyncio.gather(*(store.submit(submission(claim=str(n))) for n in range(20)))
    assert sum(result is None for result in results) == 1
    assert {result.status for result in results if result is not None} == {"queued"}


async def test_what_is_queued_is_taken_once_and_whole(store):
    """The one who takes it gets all that it needs; nobody else gets it."""
    await store.submit(submission(callback_url="https://x/", instance="i", asked_version="2.0.0", attempts_max=3))
    (one,) = await taken(store)
    assert await taken(store, owner="n2") == []
    assert (one.input_json, one.instance, one.asked_version, one.attempts_max) == (b'{"n":"\\u0000"}', "i", "2.0.0", 3)
    assert (one.owner, one.execution.attempt, one.callback_url, one.timeout_s) == ("n1", 0, "https://x/", 5.0)


async def test_a_head_start_goes_first_and_age_counts(store):
    """Order is by the time of arrival, moved by the head start."""
    await store.submit(submission("low", head_start_s=-60))
    await store.submit(submission("normal"))
    await store.submit(submission("high", head_start_s=60))
    assert [one.key[1] for one in await taken(store, limit=2)] == ["high", "normal"]
    assert [one.key[1] for one in await taken(store, limit=2)] == ["low"]


async def test_a_backlog_does_not_starve_other_tenants(store):
    """Tenants take turns: whoever has one execution gets it run in the next batch, behind whatever backlog."""
    tenants = [name for name in map(str, range(100)) if store.shard_of(name) == store.shard_of("t")][:3]
    for n in range(30):
        await store.submit(submission(f"{n:02}", tenant="t"))
    for tenant in tenants:
        await store.submit(submission(tenant=tenant))
    first = await taken(store, limit=8)
    assert {one.key[0] for one in first} == {"t", *tenants}
    assert len(await taken(store, limit=8)) == 8


async def test_a_tenant_gets_no_more_than_its_places(store):
    """The rest of its queue waits."""
    for n in range(5):
        await store.submit(submission(str(n)))
    assert len(await taken(store, free={"t": 2})) == 2
    assert await taken(store, free={"t": 0}) == []


async def test_threads_are_asked_for_apart(store):
    """Whoever has no thread to offer is not given what needs one."""
    await store.submit(submission(threaded=True))
    assert await taken(store) == []
    assert len(await taken(store, threaded=True)) == 1


async def test_an_attempt_begins_once_and_only_for_its_owner(store):
    """A begin can be repeated after a lost answer; one of a former owner changes nothing."""
    await store.submit(submission())
    (one,) = await taken(store)
    assert await begun(store, one)
    assert await store.begin(one)
    stranger = msgspec.structs.replace(one, owner="n2")
    assert not await store.begin(stranger)


async def test_of_two_takings_by_one_owner_one_begins(store):
    """What was given back and taken again before the first taking began runs once."""
    await store.submit(submission())
    (first,) = await taken(store)
    await store.give_back(first, delay_s=0)
    (second,) = await taken(store)
    later = msgspec.structs.replace(second.execution, status="running", attempt=1, started_at=1_700_000_001.5)
    first = msgspec.structs.replace(first, execution=execution(status="running", attempt=1))
    assert await store.begin(first)
    assert not await store.begin(msgspec.structs.replace(second, execution=later))


async def test_what_a_living_node_has_just_taken_is_not_given_to_others(database):
    """A reaping that met a row of a dead node on its way to a living one leaves it there."""
    store = PostgresStore(database, AgentsConfig(), writer="test/0", clock=CLOCK, observer=Silent())
    await store.open()
    shard = store.shard_of("t")
    node = database.nodes[shard]
    await store.join(shard, "alive", lease_s=60)
    await store.submit(submission())
    await taken(store, owner="dead")
    await store.leave(shard, "dead")
    # Waits where the real one passes over, and so always meets what that meets when it comes a moment later.
    reaping = execution_sql.REAP.replace("SKIP LOCKED", "")
    async with database.transaction(key="t") as transaction:
        await transaction.execute("UPDATE headrace_executions SET owner = 'alive'")
        reaped = asyncio.create_task(node.fetch(reaping, ("interrupted", 1.0, 1.0, "test/0")))
        waits = "SELECT 1 FROM pg_locks WHERE NOT granted"
        while not (await node.fetch(waits, read_only=True) or reaped.done()):
            await asyncio.sleep(0)
        assert not reaped.done()
    assert list((await reaped)[0]) == [0, 0]
    assert await node.fetch("SELECT status, owner FROM headrace_executions") == [("queued", "alive")]
    await store.close()


async def test_a_node_without_a_lease_takes_nothing_and_begins_nothing(database):
    """One whose lease is over gets nothing until it renews it; what it had does not begin once it was given up."""
    store = PostgresStore(database, AgentsConfig(), writer="test/0", clock=CLOCK, observer=Silent())
    await store.open()
    shard = store.shard_of("t")
    asked = {"owner": "n1", "threaded": False, "limit": 10, "free": {}, "free_default": 1000}
    await store.submit(submission())
    await store.join(shard, "n1", lease_s=-1)
    assert await store.take(shard, **asked) == []
    await store.beat(shard, "n1", lease_s=60, tenants=())
    (one,) = await store.take(shard, **asked)
    await store.leave(shard, "n1")
    assert not await begun(store, one)
    assert (await store.execution("t", "a", "e")).status == "queued"
    await store.close()


async def test_what_was_given_back_can_be_taken_again(store):
    """By anybody, with the attempts that it had."""
    await store.submit(submission())
    (one,) = await taken(store)
    await store.give_back(one, delay_s=0)
    (again,) = await taken(store, owner="n2")
    assert (again.owner, again.execution.attempt) == ("n2", 0)


async def test_a_retry_is_queued_and_the_former_attempt_writes_nothing(store):
    """Owner and attempt are a fence: what an earlier attempt still says is not believed."""
    await store.submit(submission(attempts_max=2))
    (one,) = await taken(store)
    await begun(store, one)
    assert await store.retry(one, error="once", delay_s=0)
    assert (await store.execution("t", "a", "e")).status == "queued"
    (again,) = await taken(store, owner="n2")
    await begun(store, again)
    late = await store.finish(execution(attempt=1, output_json=b"1"), owner="n1")
    assert (late.status, late.output) == ("running", None)
    kept = await store.finish(execution(attempt=2, output_json=b"2"), owner="n2")
    assert (kept.output, (await store.execution("t", "a", "e")).output) == (2, 2)


async def test_a_queued_execution_is_cancelled_at_once(store):
    """Taken or not: its beginning is refused. To cancel again changes nothing."""
    await store.submit(submission())
    (one,) = await taken(store)
    for _ in range(2):
        assert (await store.cancel("t", "a", "e")).status == "cancelled"
    assert not await begun(store, one)
    assert await store.totals("t", "a") == Totals(failed=1)


async def test_a_running_execution_is_cancelling_until_its_owner_says_more(store):
    """The owner hears of it with its beat; a finished one stays what it is."""
    await store.join(store.shard_of("t"), "n1", lease_s=60)
    await store.submit(submission(owner="n1"))
    assert (await store.cancel("t", None, "e")).status == "cancelling"
    beat = await store.beat(store.shard_of("t"), "n1", lease_s=60, tenants=["t"])
    assert (beat.is_member, beat.living, beat.cancelled) == (True, 1, (("t", "e"),))
    await store.finish(execution(status="cancelled"), owner="n1")
    assert (await store.cancel("t", "a", "e")).status == "cancelled"


async def test_progress_is_kept_while_it_runs(store):
    """And a late report does not touch a finished execution."""
    one = submission(owner="n1")
    await store.submit(one)
    one.execution.progress = Progress(1, 2)
    await store.report(store.shard_of("t"), [one])
    assert (await store.execution("t", "a", "e")).progress == Progress(1, 2)
    await store.finish(execution(), owner="n1")
    await store.report(store.shard_of("t"), [one])
    found = await store.execution("t", "a", "e")
    assert (found.status, found.progress) == ("completed", None)


async def test_the_ledger_knows_what_was_used_today_and_what_waits(store):
    """Executions are counted in the statement that records them."""
    await until_the_day_lasts()
    await store.finish(execution("done"))
    await store.submit(submission("waits"))
    await store.submit(submission("waits too", threaded=True))
    shard = store.shard_of("t")
    await store.join(shard, "n1", lease_s=60)
    beat = await store.beat(shard, "n1", lease_s=60, tenants=["t", "u"] if shard == store.shard_of("u") else ["t"])
    assert (beat.ledgers["t"].used_today, beat.ledgers["t"].queued) == (1, 2)


async def test_old_executions_are_forgotten_in_bounded_steps(store):
    """With their events; what is younger or under way stays."""
    for n in range(3):
        await store.finish(execution(str(n), finished_at=CLOCK.wall() - 100))
    await store.finish(execution("young", finished_at=CLOCK.wall()))
    await store.submit(submission("waits"))
    shard = store.shard_of("t")
    assert [await store.forget(shard, older_than_s=50, limit=2) for _ in range(3)] == [2, 1, 0]
    assert (await store.execution("t", "a", "young")).status == "completed"
    assert (await store.execution("t", "a", "waits")).status == "queued"


async def test_a_trial_is_kept_beside_the_version_in_service(store):
    """Until it is promoted or ended; only once, and only the trial that is meant."""
    await store.deploy(deployment())
    agent = await store.deploy(deployment(version="2.0.0", text="newer", canary=0.25))
    assert (agent.version, agent.canary.version, agent.canary.share) == ("1.0.0", "2.0.0", 0.25)
    assert await store.end_trial("t", "a", promote=False, trial="another") is None
    promoted, canary = await store.end_trial("t", "a", promote=True, trial="d")
    assert (promoted.version, promoted.canary, canary) == ("2.0.0", None, agent.canary)
    assert await store.end_trial("t", "a", promote=False) is None
    assert await store.agent("t", "a") == promoted


async def test_a_trial_needs_an_agent_in_service(store):
    """There is nothing that it could be compared with."""
    with pytest.raises(AgentNotFound):
        await store.deploy(deployment(canary=0.5))
    with pytest.raises(VersionNotFound):
        await store.version("t", "a", "1.0.0")


async def test_aliases_stand_for_versions_that_exist(store):
    """They survive a deployment, move, and go."""
    await store.deploy(deployment())
    await store.name_version("t", "a", "good", "1.0.0")
    agent = await store.deploy(deployment(version="2.0.0", text="newer"))
    assert agent.aliases == {"good": "1.0.0"}
    assert (await store.name_version("t", "a", "good", "2.0.0")).aliases == {"good": "2.0.0"}
    with pytest.raises(VersionNotFound):
        await store.name_version("t", "a", "best", "9.0.0")
    assert (await store.name_version("t", "a", "good", None)).aliases == {}


async def test_an_undeployed_agent_leaves_its_versions_and_cancels_what_waits(store):
    """Deploying a version again puts it back; under that name it still stands for the same source."""
    await store.deploy(deployment())
    await store.submit(submission())
    assert await store.undeploy("t", "a") == 1
    assert await store.agent("t", "a") is None
    assert (await store.execution("t", "a", "e")).status == "cancelled"
    with pytest.raises(VersionConflict):
        await store.deploy(deployment(text="another"))
    with pytest.raises(AgentNotFound):
        await store.undeploy("t", "a")


async def test_what_a_version_was_deployed_with_comes_back(store):
    """Idempotence, attempts, capabilities and dependencies."""
    await store.deploy(
        deployment(is_idempotent=True, attempts_max=4, capabilities=msgspec.Raw(b'{"name":"x"}'), needs=("requests",))
    )
    version = await store.version("t", "a", "1.0.0")
    assert (version.is_idempotent, version.attempts_max, bytes(version.capabilities)) == (True, 4, b'{"name":"x"}')
    assert version.source.dependencies == ("requests",)


async def test_counts_of_a_trial_are_shared_between_writers(store):
    """Each sees those of the others; writing twice counts once."""
    await store.deploy(deployment())
    mine, theirs = Tally(runs=3, failures=1), Tally(runs=2)
    for _ in range(2):
        await store.tally("t", "a", "d", {"2.0.0": mine}, writer="w1")
    if isinstance(store, MemoryStore):
        return
    assert (await store.tally("t", "a", "d", {"2.0.0": theirs}, writer="w2"))["2.0.0"] == mine
    assert (await store.tally("t", "a", "d", {}, writer="w3"))["2.0.0"].runs == 5


async def test_events_are_kept_in_order_and_bounded(store):
    """Of each execution the newest; writing one again changes nothing."""
    shard = store.shard_of("t")
    events = [Kept("t", "e", n, f'"{n}"'.encode()) for n in range(1, 7)]
    await store.keep_events(shard, events[:4], events_max=3)
    await store.keep_events(shard, events[3:], events_max=3)
    assert [event.id for event in await store.events("t", "e", after=0, limit=10)] == [4, 5, 6]
    assert await store.events("t", "e", after=4, limit=1) == [events[4]]


async def test_a_state_is_changed_by_one_at_a_time(store):
    """Whoever saw an older version is refused."""
    key = ("t", "a", "i")
    assert await store.state(*key, known=0) is None
    assert await store.finish(execution("1"), change=Change("i", State(1, b"{}"))) is not None
    assert await store.finish(execution("2"), change=Change("i", State(1, b'{"lost":1}'))) is None
    assert await store.finish(execution("3"), change=Change("i", State(2, b'{"n":2}'))) is not None
    assert await store.state(*key, known=2) is None
    assert await store.state(*key, known=1) == State(2, b'{"n":2}')
    assert await store.finish(execution("4"), change=Change("never seen", State(5, b"{}"))) is None
    for refused in ("2", "4"):
        with pytest.raises(ExecutionNotFound):
            await store.execution("t", "a", refused)


async def test_a_state_is_kept_with_its_result_or_not_at_all(store):
    """Whoever lost an execution changes nothing of the state, and what was said twice is done once."""
    await store.submit(submission(attempts_max=2))
    (one,) = await taken(store)
    await begun(store, one)
    change = Change("i", State(1, b'{"n":1}'))
    late = await store.finish(execution(attempt=1, output_json=b"1"), owner="somebody else", change=change)
    assert (late.status, await store.state("t", "a", "i", known=0)) == ("running", None)
    for _ in range(2):
        kept = await store.finish(execution(attempt=1, output_json=b"1"), owner="n1", change=change)
        assert (kept.status, kept.output) == ("completed", 1)
    assert await store.state("t", "a", "i", known=0) == State(1, b'{"n":1}')
    assert await store.totals("t", "a") == Totals(1, 0, 0)


async def test_states_are_kept_in_groups(store):
    """Some overtaken, some not, and some without a state: each gets its own answer."""
    await store.finish(execution("first"), change=Change("i3", State(1, b"{}")))
    answers = await asyncio.gather(
        *(
            store.finish(execution(str(n)), change=Change(f"i{n}", State(1, b'{"n":1}')) if n % 2 else None)
            for n in range(8)
        )
    )
    assert [answer is None for answer in answers] == [n == 3 for n in range(8)]
    assert await store.state("t", "a", "i3", known=0) == State(1, b"{}")
    assert await store.state("t", "a", "i5", known=0) == State(1, b'{"n":1}')
    assert await store.totals("t", "a") == Totals(8, 0, 0)


async def test_a_callback_is_due_when_its_execution_has_ended(store):
    """One process gets it for a while; then it is done, or due again."""
    shard = store.shard_of("t")
    await store.submit(submission(owner="n1", callback_url="https://x/"))
    assert await store.due_callbacks(shard, limit=5, within_s=60, free={}, free_default=5) == []
    await store.finish(execution(output_json=b"1"), owner="n1")
    (first,) = await store.due_callbacks(shard, limit=5, within_s=60, free={}, free_default=5)
    assert (first.url, first.attempt, first.execution.output) == ("https://x/", 1, 1)
    assert await store.due_callbacks(shard, limit=5, within_s=60, free={}, free_default=5) == []
    await store.callback_done(first, again_in_s=0)
    (second,) = await store.due_callbacks(shard, limit=5, within_s=60, free={}, free_default=5)
    assert second.attempt == 2
    await store.callback_done(second, again_in_s=None)
    assert await store.due_callbacks(shard, limit=5, within_s=60, free={}, free_default=5) == []


async def test_an_execution_belongs_to_its_agent(store):
    """Another agent's path does not find it."""
    await store.finish(execution())
    with pytest.raises(ExecutionNotFound):
        await store.execution("t", "b", "e")


async def test_totals_count_every_ending_once(store):
    """Completed, failed and timed out are told apart; cancelled and interrupted count as failed."""
    for index, status in enumerate(["completed", "completed", "failed", "timeout", "cancelled"]):
        await store.finish(execution(id=str(index), status=status))
    assert await store.totals("t", "a") == Totals(completed=2, failed=2, timeout=1)


async def test_a_version_keeps_where_it_runs_and_what_it_needs(store):
    """Isolation, limits and dependencies come back, in whatever process asks; without limits, none."""
    assert not await store.has_isolated()
    limits = Limits(memory_bytes=64 << 20, cpu_s=1.5)
    await store.deploy(deployment(isolation="process", limits=limits, needs=("httpx>=0.28", "lxml")))
    await store.deploy(deployment(agent_id="b"))
    isolated, trusted = await store.version("t", "a", "1.0.0"), await store.version("t", "b", "1.0.0")
    assert (isolated.isolation, isolated.limits) == ("process", limits)
    assert isolated.source.dependencies == ("httpx>=0.28", "lxml")
    assert (trusted.isolation, trusted.limits) == ("trusted", None)
    assert await store.has_isolated()


@pytest.mark.parametrize("change", [{"isolation": "trusted"}, {"limits": Limits(files=8)}, {"limits": None}])
async def test_a_version_stands_for_one_isolation_and_its_limits(store, change):
    """A version that is isolated cannot be made a trusted one."""
    given = {"isolation": "process", "limits": Limits(files=9)}
    await store.deploy(deployment(**given))
    await store.deploy(deployment(**given))
    with pytest.raises(VersionConflict, match="another source, isolation or limits"):
        await store.deploy(deployment(**{**given, **change}))
    assert (await store.version("t", "a", "1.0.0")).limits == Limits(files=9)


async def test_a_source_that_is_shared_is_not_read_again(database):
    """The record is asked for it only when it is nowhere else."""
    store = PostgresStore(database, AgentsConfig(), writer="test/0", clock=CLOCK, observer=Silent())
    await store.open()
    await store.deploy(deployment())
    asked = []

    async def shared(sha256):
        asked.append(sha256)
        return "from the cache" if len(asked) == 1 else None

    texts = [(await store.version("t", "a", "1.0.0", shared=shared)).source.text for _ in range(2)]
    await store.close()
    assert texts == ["from the cache", "source"]
    assert asked == [deployment().source.sha256] * 2


async def test_what_did_not_begin_can_be_withdrawn(store):
    """By its owner and unless somebody has cancelled it meanwhile; then its id is free."""
    mine = submission(owner="n1")
    assert await store.submit(mine) is None
    assert not await store.withdraw(submission(claim="another", owner="n1"))
    assert await store.withdraw(mine)
    assert not await store.withdraw(mine)
    assert await store.submit(mine) is None
    await store.cancel("t", "a", mine.execution.id)
    assert not await store.withdraw(mine)
    assert (await store.execution("t", "a", mine.execution.id)).status == "cancelling"


async def test_due_callbacks_are_a_share_of_each_tenant(store):
    """However many are due to one, and the oldest first; who has no place left gets none."""
    shard = store.shard_of("t")
    other = next(name for name in map(str, range(1000)) if store.shard_of(name) == shard)
    for tenant, id in [*(("t", str(n)) for n in range(4)), (other, "x")]:
        await store.submit(submission(id, owner="n1", tenant=tenant, callback_url="https://x/"))
        await store.finish(execution(id, tenant=tenant), owner="n1")
    due = await store.due_callbacks(shard, limit=5, within_s=60, free={}, free_default=2)
    assert sorted((each.execution.tenant, each.execution.id) for each in due) == [(other, "x"), ("t", "0"), ("t", "1")]
    assert await store.due_callbacks(shard, limit=5, within_s=60, free={"t": 0}, free_default=2) == []
    assert len(await store.due_callbacks(shard, limit=1, within_s=60, free={}, free_default=2)) == 1
