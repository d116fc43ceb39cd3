"""One contract for both stores: in memory and in Postgres."""

import msgspec
import pytest

from headrace.agents import AgentsConfig
from headrace.agents.definition import Source
from headrace.agents.execution import Execution, Progress
from headrace.agents.postgres_store import PostgresStore
from headrace.agents.store import Deployment, MemoryStore, Totals
from headrace.clock import SystemClock
from headrace.errors import AgentNotFound, ExecutionNotFound, VersionConflict, VersionNotFound
from headrace.events import Silent

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


def deployment(agent_id="a", version="1.0.0", text="source", tenant="t", entrypoint="Agent"):
    source = Source(agent_id=agent_id, version=version, text=text, entrypoint=entrypoint, timeout_s=2.5)
    return Deployment(
        deployment_id="d",
        tenant=tenant,
        agent_id=agent_id,
        name=agent_id.upper(),
        tags=("x", "y"),
        source=source,
        compile_ms=1.5,
    )


def execution(id="e", status="completed", **fields):
    defaults = {"agent_id": "a", "version": "1.0.0", "tenant": "t", "started_at": 1_700_000_000.25}
    return Execution(id=id, status=status, **{**defaults, **fields})


async def test_a_deployed_version_is_in_service(store):
    """Agent and source come back as they were given."""
    agent = await store.deploy(deployment())
    assert await store.agent("t", "a") == agent
    assert (agent.name, agent.tags, agent.version) == ("A", ("x", "y"), "1.0.0")
    source = await store.source("t", "a", "1.0.0")
    assert source == deployment().source
    assert agent.source_sha256 == source.sha256


async def test_a_tenant_sees_only_its_own(store):
    """The same id under another tenant is another agent."""
    await store.deploy(deployment(tenant="t"))
    assert await store.agent("u", "a") is None
    assert await store.agents("u", offset=0, limit=10) == ([], 0)
    with pytest.raises(VersionNotFound):
        await store.source("u", "a", "1.0.0")


@pytest.mark.parametrize("change", [{"text": "other"}, {"entrypoint": "Other"}])
async def test_a_version_stands_for_one_source_and_entrypoint(store, change):
    """What runs under a version never changes, and the version in service stays."""
    await store.deploy(deployment())
    await store.deploy(deployment())
    with pytest.raises(VersionConflict):
        await store.deploy(deployment(**change))
    assert (await store.source("t", "a", "1.0.0")).text == "source"


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


async def test_a_claim_is_given_once(store):
    """The second claimant gets what the id stands for."""
    lease_until = CLOCK.wall() + 60
    assert await store.claim(execution(status="running"), claim="mine", lease_until=lease_until) is None
    held = await store.claim(execution(status="running"), claim="yours", lease_until=lease_until)
    assert held.status == "running"
    await store.finish(execution(output_json=b"1"))
    assert (await store.claim(execution(status="running"), claim="yours", lease_until=lease_until)).output == 1


async def test_a_claim_can_be_repeated_by_its_owner(store):
    """After a commit in doubt the same claim is recognised, and somebody else's is still refused."""
    lease_until = CLOCK.wall() + 60
    for _ in range(2):
        assert await store.claim(execution(status="running"), claim="mine", lease_until=lease_until) is None
    assert await store.claim(execution(status="running"), claim="yours", lease_until=lease_until) is not None


async def test_progress_is_kept_while_it_runs(store):
    """And a late report does not touch a finished execution."""
    await store.claim(execution(status="running"), claim="mine", lease_until=CLOCK.wall() + 60)
    await store.report(execution(status="running", progress=Progress(1, 2)))
    assert (await store.execution("t", "a", "e")).progress == Progress(1, 2)
    await store.finish(execution())
    await store.report(execution(status="running", progress=Progress(2, 2)))
    assert (await store.execution("t", "a", "e")).status == "completed"


async def test_an_execution_past_its_lease_is_interrupted(store):
    """Its process died; that is said, not hidden behind `running`."""
    await store.claim(execution(status="running"), claim="mine", lease_until=CLOCK.wall() - 1)
    found = await store.execution("t", "a", "e")
    assert found.status == "interrupted"


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
