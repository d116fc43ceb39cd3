"""`headrace agents` and `headrace doctor` as a person uses them."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cli.client import Client
from headrace.cli.display import show_execution as _show
from headrace.database import Database
from headrace.errors import CallerError

EXAMPLES = Path(__file__).parents[2] / "examples"


def headrace(*arguments, environment=None):
    """A command: its exit code and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "headrace", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "COLUMNS": "120", **(environment or {})},
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def refusing_port():
    """A port where nobody listens, and that nobody else gets meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def agents(service):
    """`headrace agents` on the running service."""
    return lambda *arguments: headrace("agents", "--url", service.url, *arguments)


@pytest.mark.parametrize(
    ("agent", "key", "data", "said"),
    [
        ("log_analyst", "log", "access.log", "Busiest hour"),
        ("csv_profiler", "csv", "orders.csv", "Rows"),
        ("text_summariser", "text", "watermills.txt", "headrace"),
    ],
)
def test_the_readmes_commands_work(agents, agent, key, data, said):
    """Each sample is deployed, executed on its file, and prints a readable report."""
    code, printed = agents("deploy", str(EXAMPLES / "agents" / f"{agent}.py"))
    assert (code, "deployed" in printed) == (0, True), printed
    code, printed = agents("run", agent, "--file", f"{key}={EXAMPLES / 'data' / data}")
    assert code == 0, printed
    assert said.lower() in printed.lower()
    assert "completed in" in printed


def test_a_changed_source_gets_the_next_version(agents, tmp_path):
    """Unchanged source keeps its version."""
    source = tmp_path / "bumped.py"
    for text, version in (("1", "1.0.0"), ("1", "1.0.0"), ("2", "1.0.1")):
        source.write_text(f"async def Agent(input, context): return {text}")
        code, printed = agents("deploy", str(source))
        assert (code, version in printed) == (0, True), printed
    code, printed = agents("list")
    assert "1.0.1" in printed


def test_an_execution_is_printed_as_json_too(agents, tmp_path):
    """For programs: the execution as the API answers it."""
    source = tmp_path / "plain.py"
    source.write_text("async def Agent(input, context): return input")
    agents("deploy", str(source))
    code, printed = agents("run", "plain", "--json", "--input", '{"a": 1}', "--set", "b=[2]")
    assert code == 0
    assert json.loads(printed)["output"] == {"a": 1, "b": [2]}


def test_a_failed_execution_is_an_exit_code(agents, tmp_path):
    """With the agent's own error, and markup in it printed as it is."""
    source = tmp_path / "failing.py"
    source.write_text("async def Agent(input, context): raise ValueError('[red]no rows[/red]')")
    agents("deploy", str(source))
    code, printed = agents("run", "failing")
    assert code == 1
    assert "[red]no rows[/red]" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nobody"], "No agent 'nobody'"),
        (["run", "echo", "--file", "nokey"], "Write --file key=value"),
        (["run", "echo", "--file", "a=/absent"], "cannot be read"),
        (["run", "echo", "--set", "a=text"], "is no JSON"),
        (["run", "echo", "--input", "[1]", "--set", "a=1"], "has no keys"),
        (["run", "echo", "--input", "7", "--file", f"a={__file__}"], "has no keys"),
        (["status", "nobody"], "No agent 'nobody'"),
    ],
)
def test_a_mistake_is_told_with_its_fix(agents, arguments, said):
    """Exit code 1, one sentence, one fix, no traceback."""
    code, printed = agents(*arguments)
    assert code == 1
    assert said in printed
    assert "Fix:" in printed
    assert "Traceback" not in printed


def test_a_service_that_is_not_there_is_told(refusing_port):
    """With the command that starts one."""
    code, printed = headrace("agents", "--url", f"http://127.0.0.1:{refusing_port}", "list")
    assert code == 1
    assert "headrace up" in printed


def test_doctor_tells_what_is_there_and_in_force():
    """Servers, libraries and settings, for people and for programs."""
    code, printed = headrace("doctor", environment={"HEADRACE_SERVER_PORT": "9123"})
    assert code == 0, printed
    for word in ("embedded Postgres", "embedded Redis", "hot modules", "server.port", "9123"):
        assert word in printed
    code, printed = headrace("doctor", "--json")
    assert {"findings", "settings"} == set(json.loads(printed))


def test_doctor_asks_the_configured_servers(service, refusing_port):
    """One that does not answer is missing, and that is the exit code."""
    environment = {"HEADRACE_CACHE_REMOTE_URL": f"redis://127.0.0.1:{refusing_port}/0"}
    code, printed = headrace("doctor", environment=environment)
    assert code == 1
    assert "is away" in printed


@pytest.mark.parametrize(
    "output",
    [
        {"title": "t", "summary": "text"},
        {"title": "t", "summary": [["a"]]},
        {"title": "t", "summary": [[["a"], 1]]},
        {"title": "t", "tables": {"a": 1}},
        {"title": "t", "tables": ["a"]},
        {"title": "t", "tables": [{"columns": ["a", "b"], "rows": [[1, 2], [1]]}]},
        {"title": "t", "tables": [{"columns": ["a"], "rows": [[1, 2]]}]},
        {"title": "t", "tables": [{"columns": 5, "rows": []}]},
    ],
)
def test_an_output_that_only_resembles_a_report_is_printed_as_json(output, capsys):
    """An agent may answer what it likes; the title is a key like any other then."""
    times = {"status": "completed", "run_ms": 1.0, "cpu_ms": 1.0, "error": None}
    _show({**times, "agent_id": "a", "version": "1.0.0", "execution_id": "e", "output": output})
    printed = capsys.readouterr().out
    assert json.loads(printed[: printed.rindex("}") + 1]) == output


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "ftp://x", "http://", "http://[", "127.0.0.1:port"])
def test_a_url_that_leads_nowhere_is_told(url):
    """With the form of one that does."""
    with pytest.raises(CallerError, match="is no URL of a service"):
        Client(url)


def test_doctor_tells_where_a_dead_shard_was_looked_for(tmp_path):
    """Its address, for the operator who asks, and nothing else of its dsn."""
    shards = f'[{{name = "a", dsn = "host={tmp_path} user=someone password = hunter2"}}]'
    code, printed = headrace("doctor", "--json", environment={"HEADRACE_DATABASE_SHARDS": shards})
    findings = json.JSONDecoder().raw_decode(printed[printed.index("{") :])[0]["findings"]
    found = {finding["name"]: finding for finding in findings}
    assert (code, found["a"]["state"]) == (1, "missing")
    assert f"does not answer: no connection within 2 s. ({tmp_path}:5432/)" in found["a"]["detail"]
    assert "hunter2" not in printed
    assert "someone" not in printed


async def test_doctor_compares_the_shard_map_and_writes_none(database, database_config):
    """Looking at a new shard does not make it one of this configuration; looking at an old one tells a difference."""
    first = database_config.shards[0]
    only = {
        "HEADRACE_DATABASE_SHARDS": f'[{{name = "{first.name}", dsn = "{first.dsn}"}}]',
        "HEADRACE_DATABASE_ACQUIRE_TIMEOUT_S": f"{database_config.acquire_timeout_s}",
    }
    code, printed = await asyncio.to_thread(headrace, "doctor", "--json", environment=only)
    assert code == 0, printed
    assert not (await database.nodes[first.name].fetch("SELECT to_regclass('headrace_shard_map') IS NOT NULL"))[0][0]
    async with Database(database_config):
        pass
    code, printed = await asyncio.to_thread(headrace, "doctor", "--json", environment=only)
    assert code == 1
    assert "keeps a map of 4096 slots" in printed
