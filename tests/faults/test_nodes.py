"""Several nodes on one Postgres: what one of them had is neither lost nor done twice when it dies or is frozen."""

import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import psutil
import psycopg
import pytest

from headrace.embedded import EmbeddedPostgres, started
from tests.agent_nodes import Node, end_lease, nodes, wait_for

ECHO = "async def Agent(input, context): return input"
# Appends a line for each run to a file, which is what a run did to the world; then waits until a file is there.
GATED = """
import asyncio, os, pathlib
class Agent:
    async def execute(self, input, context):
        with open(input["log"], "a") as log:
            log.write(f"{context.execution_id} {os.getpid()} {context.attempt} {context.version}\\n")
        while not os.path.exists(input["gate"]):
            await asyncio.sleep(0.2)
        return os.getpid()
"""


COUNT = """
        context.state["n"] = context.state.get("n", 0) + 1
        return context.state["n"]
"""


@pytest.fixture(scope="module")
def postgres(tmp_path_factory) -> Iterator[str]:
    """A Postgres for all tests here."""
    with started(EmbeddedPostgres(tmp_path_factory.mktemp("postgres"), name="shard-0")) as server:
        yield server.url


@pytest.fixture
def urls(postgres) -> tuple[str, ...]:
    """Its connection string, with nothing in its public schema."""
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return (postgres,)


@pytest.fixture
def gated(tmp_path):
    """The input of a gated agent: where it notes its runs, and what it waits for."""
    log, gate = tmp_path / "log", tmp_path / "gate"
    log.touch()

    def runs():
        whole, _, _ = log.read_text().rpartition("\n")  # what follows is being written
        return [line.split() for line in whole.splitlines()]

    return {"log": str(log), "gate": str(gate)}, gate, runs


def rows(url, what="status", where="true"):
    """How many executions there are of each kind."""
    with psycopg.connect(url) as connection:
        found = connection.execute(f"SELECT {what}, count(*) FROM headrace_executions WHERE {where} GROUP BY 1")
        return dict(found.fetchall())


def counted(url):
    """The number in the state of the only instance."""
    with psycopg.connect(url) as connection:
        ((number,),) = connection.execute("SELECT (value ->> 'n')::int FROM headrace_agent_states").fetchall()
    return number


def taken_over(told):
    """How many executions of dead nodes the living ones told of."""
    return sum(event["returned"] + event["ended"] for node in told for event in node.told("NodesLost"))


@pytest.mark.slow
@pytest.mark.parametrize("idempotent", [False, True])
def test_a_killed_nodes_work_is_taken_over(urls, gated, idempotent):
    """1,000 queued run exactly once elsewhere; 100 running are interrupted, or run again if that does no harm."""
    given, gate, runs = gated
    with nodes(urls, 3, executions_max=106, retry_first_s=0.1) as (doomed, *others):
        doomed.call("deploy", agent_id="a", source=GATED, version="1.0.0", idempotent=idempotent)
        for node in others:  # so that only the first one takes anything for now
            node.signal(signal.SIGSTOP)
        submitted = doomed.call("submit_many", agent_id="a", inputs=[given] * 1100, timeout=100)
        wait_for(lambda: rows(urls[0]).get("running") == 100 and len(runs()) == 100)
        first = {run[0] for run in runs()}

        doomed.kill()
        end_lease(urls[0], doomed)
        gate.touch()
        for node in others:
            node.signal(signal.SIGCONT)
        wait_for(lambda: not {"queued", "running"} & rows(urls[0]).keys())
        wait_for(lambda: taken_over(others) >= 100)

        counts = Counter(run[0] for run in runs())
        assert {one["id"] for one in submitted} == counts.keys()
        if idempotent:
            assert rows(urls[0]) == {"completed": 1100}
            assert {counts[id] for id in first} == {2}
        else:
            assert rows(urls[0]) == {"completed": 1000, "interrupted": 100}
            assert {counts[id] for id in first} == {1}
        assert {counts[id] for id in counts.keys() - first} == {1}
        assert taken_over(others) == 100


def test_a_frozen_node_writes_nothing_over_the_new_owner(urls, gated):
    """When it thaws, its result is refused, it says so, and its caller is told what is on record."""
    given, gate, runs = gated
    with nodes(urls, 2, retry_first_s=0.1) as (frozen, other):
        frozen.call("deploy", agent_id="a", source=GATED, version="1.0.0", idempotent=True)
        call = frozen.ask("execute", agent_id="a", input=given, execution_id="one", timeout=100)
        wait_for(lambda: len(runs()) == 1)

        frozen.signal(signal.SIGSTOP)
        end_lease(urls[0], frozen)
        wait_for(lambda: len(runs()) == 2)
        gate.touch()
        result = wait_for(
            lambda: (found := other.call("execution", agent_id="a", execution_id="one"))["finished_at"] and found
        )
        frozen.signal(signal.SIGCONT)

        assert result["output_json"] is not None
        assert (result["attempt"], result["status"]) == (2, "completed")
        told = frozen.answer(call)
        assert (told["attempt"], told["output_json"]) == (2, result["output_json"])
        assert other.call("execution", agent_id="a", execution_id="one") == result
        wait_for(lambda: frozen.told("NodeFenced"))
        assert frozen.call("execute", agent_id="a", input=given, execution_id="two")["status"] == "completed"


def test_one_id_from_twenty_clients_on_three_nodes_is_one_execution(urls, gated):
    """At once, and again after the node that ran it was killed."""
    given, gate, runs = gated
    with nodes(urls, 3) as all_nodes:
        all_nodes[0].call("deploy", agent_id="a", source=GATED, version="1.0.0")
        calls = [
            (all_nodes[n % 3], all_nodes[n % 3].ask("execute", agent_id="a", input=given, execution_id="same"))
            for n in range(20)
        ]
        wait_for(runs)
        gate.touch()
        results = [node.answer(number) for node, number in calls]
        ran_in = int(runs()[0][1])
        killed = next(node for node in all_nodes if node.process.pid == ran_in)
        killed.kill()
        left = [node for node in all_nodes if node is not killed]
        later = [node.call("execute", agent_id="a", input=given, execution_id="same") for node in left]

        assert len(runs()) == 1
        assert {(result["status"], result["output_json"]) for result in [*results, *later]} == {
            ("completed", results[0]["output_json"])
        }


def test_an_update_under_load_fails_no_request(urls, gated):
    """What began on the old version ends on it, what comes later gets the new one, and nobody is refused."""
    given, gate, runs = gated
    with nodes(urls, 3) as all_nodes:
        all_nodes[0].call("deploy", agent_id="a", source=ECHO, version="1.0.0")
        all_nodes[0].call("deploy", agent_id="old", source=GATED, version="1.0.0")
        old = all_nodes[1].ask("execute", agent_id="old", input=given)
        wait_for(runs)
        stop = threading.Event()

        def load(node: Node):
            results = []
            while not stop.is_set():
                numbers = [node.ask("execute", agent_id="a", input=n) for n in range(20)]
                results += [node.answer(number) for number in numbers]
            return results

        with ThreadPoolExecutor(3) as pool:
            loads = [pool.submit(load, node) for node in all_nodes]
            for n in range(1, 11):
                all_nodes[n % 3].call("deploy", agent_id="a", source=ECHO + "\n" * n, version=f"1.0.{n}")
            all_nodes[2].call("deploy", agent_id="old", source=ECHO, version="2.0.0")
            broken = all_nodes[1].call(
                "deploy",
                agent_id="a",
                version="6.6.6",
                source="class Agent:\n def check(self): 1/0\n async def execute(s, i, c): 1",
            )
            all_nodes[0].call("rollback", agent_id="a", version="1.0.3")
            stop.set()
            results = [result for each in loads for result in each.result()]
        last = [node.call("execute", agent_id="a", input=0)["version"] for node in all_nodes]
        gate.touch()

        assert [result for result in results if result.get("status") != "completed"] == []
        assert broken["error"] == "agent-unhealthy"
        assert "6.6.6" not in {result["version"] for result in results}
        assert last == ["1.0.3"] * 3
        assert all_nodes[1].answer(old)["version"] == "1.0.0"
        assert all_nodes[1].call("execute", agent_id="old", input=1)["version"] == "2.0.0"


def test_a_bad_canary_ends_by_itself_on_every_node(urls):
    """Each node sees a third of it; together they know enough, and one of them ends it once."""
    bad = "async def Agent(input, context): raise ValueError('new')"
    with nodes(urls, 3, node_lease_s=5.0) as all_nodes:  # counts are exchanged as often as leases are renewed
        all_nodes[0].call("deploy", agent_id="a", source=ECHO, version="1.0.0")
        all_nodes[1].call("deploy", agent_id="a", source=bad, version="2.0.0", canary=0.2)

        def ended():
            for node in all_nodes:
                for number in [node.ask("execute", agent_id="a", input=1) for _ in range(20)]:
                    node.answer(number)
            return [event for node in all_nodes for event in node.told("CanaryAborted")]

        told = wait_for(ended)
        after = [
            node.call("execute", agent_id="a", input=1, execution_id=f"after {n}")
            for n, node in enumerate(all_nodes * 20)
        ]

        assert [(event["version"], event["by_itself"]) for event in told] == [("2.0.0", True)]
        assert {one["version"] for one in after} == {"1.0.0"}


def test_cancelling_reaches_the_node_that_runs_it(urls, gated):
    """It is cancelling until the work has stopped there, and cancelled then; a queued one is cancelled at once."""
    given, _, runs = gated
    with nodes(urls, 2, executions_max=20) as (first, second):
        first.call("deploy", agent_id="a", source=GATED, version="1.0.0")
        second.signal(signal.SIGSTOP)
        running = first.call("submit", agent_id="a", input=given)
        wait_for(runs)
        second.signal(signal.SIGCONT)
        assert second.call("cancel", execution_id=running["id"])["status"] in {"cancelling", "cancelled"}
        ended = wait_for(
            lambda: (one := second.call("execution", agent_id="a", execution_id=running["id"]))["finished_at"] and one
        )
        assert ended["status"] == "cancelled"


def test_events_can_be_read_where_it_does_not_run(urls, tmp_path):
    """In order, from any id on, until the end."""
    talks = "async def Agent(input, context):\n    for n in range(input): context.emit(n)\n"
    with nodes(urls, 2) as (first, second):
        first.call("deploy", agent_id="a", source=talks, version="1.0.0")
        submitted = first.call("submit", agent_id="a", input=100)
        everything = second.call("events", execution_id=submitted["id"])
        rest = first.call("events", execution_id=submitted["id"], after=90)
    assert [event["id"] for event in everything] == list(range(1, 101))
    assert [event["id"] for event in rest] == list(range(91, 101))


def test_of_two_changes_of_a_state_at_once_one_is_made_again(urls, gated):
    """Two nodes begin from the same state: the later one to end is refused, and tried again on what the other made."""
    given, gate, runs = gated
    counts = GATED.replace("return os.getpid()", COUNT.strip())
    with nodes(urls, 2, retry_first_s=0.05) as both:
        both[0].call("deploy", agent_id="a", source=counts, version="1.0.0", idempotent=True)
        calls = [(node, node.ask("execute", agent_id="a", input=given, instance="one", timeout=90)) for node in both]
        wait_for(lambda: len(runs()) == 2)
        gate.touch()
        ended = [node.answer(number) for node, number in calls]

        assert sorted((one["status"], one["attempt"]) for one in ended) == [("completed", 1), ("completed", 2)]
        assert rows(urls[0], "output::text") == {"1": 1, "2": 1}
        assert counted(urls[0]) == 2


def test_a_state_that_several_nodes_change_is_never_lost(urls):
    """Each increment that completed is counted, whichever node ran it and however often it collided."""
    with nodes(urls, 3, retry_first_s=0.05, retry_max_s=1.0, attempts_max=10) as all_nodes:
        all_nodes[0].call(
            "deploy",
            agent_id="a",
            source="async def Agent(input, context):\n" + COUNT.replace("        ", "    "),
            version="1.0.0",
            idempotent=True,
            attempts_max=10,
        )
        calls = [
            (node, node.ask("execute", agent_id="a", input=None, instance="one", timeout=50))
            for _ in range(10)
            for node in all_nodes
        ]
        results = [node.answer(number) for node, number in calls]
        wait_for(lambda: not {"queued", "running"} & rows(urls[0]).keys())
        completed = rows(urls[0], "output::text", "status = 'completed'")
        told = [result["output_json"] for result in results if result.get("status") == "completed"]

        assert len(set(told)) == len(told)
        assert set(completed.values()) == {1}
        assert counted(urls[0]) == len(completed)


def test_many_submissions_go_through_all_nodes(urls, gated):
    """Submitted on one node, run by all of them, each once: what one has no place for, the others find."""
    given, gate, runs = gated
    with nodes(urls, 3, executions_max=20) as all_nodes:
        all_nodes[0].call("deploy", agent_id="a", source=GATED, version="1.0.0")
        for _ in range(6):
            all_nodes[0].call("submit_many", agent_id="a", inputs=[given] * 500, timeout=100)
        wait_for(lambda: len(rows(urls[0], "owner", "status = 'running'")) == 3)
        gate.touch()
        wait_for(lambda: rows(urls[0]) == {"completed": 3000})
        by_node = rows(urls[0], "output::text")
    assert by_node.keys() == {str(node.process.pid) for node in all_nodes}
    assert sum(by_node.values()) == len(runs()) == 3000


@pytest.mark.slow
def test_a_database_that_dies_loses_no_acknowledged_submission(tmp_path):
    """Killed while three nodes take, begin and finish: each ends once; of those that were under way some may be
    interrupted, because nobody knows, and none runs twice."""
    log = tmp_path / "log"
    log.touch()
    notes = (
        "async def Agent(input, context):\n"
        "    with open(input, 'a') as log:\n"
        "        log.write(context.execution_id + '\\n')\n"
    )
    server = EmbeddedPostgres(tmp_path / "postgres", name="shard-0")
    with ExitStack() as servers:
        servers.enter_context(started(server))
        # With short leases, so that all of them are over when it is back.
        with nodes((server.url,), 3, journal_retry_s=5.0, node_lease_s=5.0) as all_nodes:
            all_nodes[0].call("deploy", agent_id="a", source=notes, version="1.0.0")
            acknowledged = [
                each["id"]
                for _ in range(4)
                for each in all_nodes[0].call("submit_many", agent_id="a", inputs=[str(log)] * 250)
            ]
            wait_for(lambda: len(log.read_text().splitlines()) > 50)
            pid = int((server.directory / "data" / "postmaster.pid").read_text().split()[0])
            postmaster = psutil.Process(pid)
            postmaster.suspend()  # or it would go on to make children that are not among those to be killed
            family = [postmaster, *postmaster.children(recursive=True)]
            for process in family:
                with suppress(psutil.NoSuchProcess):  # it goes with its parent
                    process.kill()
            psutil.wait_procs(family, timeout=30)
            servers.close()
            with started(EmbeddedPostgres(tmp_path / "postgres", name="shard-0")) as again:
                wait_for(lambda: not {"queued", "running"} & rows(again.url).keys())
                ended = rows(again.url, "execution_id || ' ' || status")
                for node in all_nodes:
                    node.stop()

    assert {one.split()[0] for one in ended} == set(acknowledged)
    assert {one.split()[1] for one in ended} <= {"completed", "interrupted"}
    runs = Counter(log.read_text().split())
    assert set(runs.values()) == {1}
    assert {one.split()[0] for one in ended if one.endswith("completed")} <= runs.keys()
