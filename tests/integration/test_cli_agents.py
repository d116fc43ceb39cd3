"""`headrace agents` and `headrace doctor` as a person uses them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def headrace(*arguments, environment=None):
    """A command: its exit code and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "headrace", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "120", **(environment or {})},
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


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


def test_a_service_that_is_not_there_is_told(unused_tcp_port):
    """With the command that starts one."""
    code, printed = headrace("agents", "--url", f"http://127.0.0.1:{unused_tcp_port}", "list")
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


def test_doctor_asks_the_configured_servers(service, unused_tcp_port):
    """One that does not answer is missing, and that is the exit code."""
    environment = {"HEADRACE_CACHE_REMOTE_URL": f"redis://127.0.0.1:{unused_tcp_port}/0"}
    code, printed = headrace("doctor", environment=environment)
    assert code == 1
    assert "is away" in printed
