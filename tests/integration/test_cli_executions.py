"""`headrace agents` for versions and executions, as a person and as a program use it."""

import json
import os
import subprocess
import sys

import pytest

from tests.running import wait_until

TALKER = """
import asyncio
async def Agent(input, context):
    for n in range(input.get("n", 0)):
        context.emit(f"line {n}")
        await asyncio.sleep(0.01)
    return context.version
"""
PARKED = """
import asyncio
async def Agent(input, context):
    await asyncio.Event().wait()
"""


@pytest.fixture
def agents(service):
    """`headrace agents` on the running service: its exit code, standard output and error."""

    def call(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "headrace", "agents", "--url", service.url, *arguments],
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, "COLUMNS": "200"},
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    return call


def deployed(agents, tmp_path, agent_id, source, *more):
    """Put a source into service from a file."""
    file = tmp_path / f"{agent_id}.py"
    file.write_text(source)
    code, printed, said = agents("deploy", str(file), "--id", agent_id, *more)
    assert code == 0, said
    return file, printed


def test_a_submitted_execution_is_found_followed_and_logged(agents, tmp_path):
    """Its id is all that submit prints, so that a script can keep it."""
    deployed(agents, tmp_path, "cli-talker", TALKER)
    code, printed, _ = agents("submit", "cli-talker", "--set", "n=5", "--execution-id", "cli-talk-1")
    assert (code, printed) == (0, "cli-talk-1\n")
    code, printed, _ = agents("events", "cli-talker", "cli-talk-1", "--json")
    frames = [json.loads(line) for line in printed.splitlines()]
    assert [frame["data"] for frame in frames[:-1]] == [f"line {n}" for n in range(5)]
    assert (frames[-1]["event"], frames[-1]["data"]["status"]) == ("end", "completed")
    code, printed, _ = agents("events", "cli-talker", "cli-talk-1", "--after", str(frames[2]["id"]))
    assert printed.splitlines()[:2] == ["line 3", "line 4"]
    assert "completed" in printed
    assert agents("logs", "cli-talker", "cli-talk-1")[1].splitlines() == [f"line {n}" for n in range(5)]
    code, printed, _ = agents("status", "cli-talker", "cli-talk-1", "--json")
    assert json.loads(printed)["output"] == "1.0.0"


def test_an_execution_is_cancelled(agents, service, tmp_path):
    """And says so."""
    deployed(agents, tmp_path, "cli-parked", PARKED)
    _, execution_id, _ = agents("submit", "cli-parked")
    path = f"/api/v1/agents/cli-parked/executions/{execution_id.strip()}"
    wait_until(lambda: service.call("GET", path)[1]["status"] == "running")
    code, printed, _ = agents("cancel", "cli-parked", execution_id.strip())
    assert code == 0
    assert execution_id.strip() in printed
    wait_until(lambda: service.call("GET", path)[1]["status"] == "cancelled")


def test_a_canary_is_tried_promoted_and_rolled_back(agents, tmp_path):
    """With one command each; versions lists how it went."""
    file, _ = deployed(agents, tmp_path, "cli-canary", TALKER)
    file.write_text(TALKER + "# 2")
    code, printed, _ = agents("canary", "cli-canary", "2.0.0", "--share", "25", "--file", str(file))
    assert (code, "on trial" in printed) == (0, True)

    def shows(version, share):
        shown = json.loads(agents("show", "cli-canary", "--json")[1])
        return (shown["version"], shown["canary"] and shown["canary"]["traffic_percentage"]) == (version, share)

    wait_until(lambda: shows("1.0.0", 25.0))  # any worker answers, and sees within a second what another one did
    wait_until(lambda: "2.0.0" in agents("show", "cli-canary")[1])
    assert "deployed" in agents("canary", "cli-canary", "--promote")[1]
    wait_until(lambda: shows("2.0.0", None))
    assert "1.0.0" in agents("rollback", "cli-canary")[1]
    agents("canary", "cli-canary", "2.0.0")
    assert "1.0.0" in agents("canary", "cli-canary", "--abort")[1]
    _, printed, _ = agents("versions", "cli-canary", "--json")
    history = [(each["version"], each["strategy"], each["status"]) for each in json.loads(printed)["deployments"]]
    assert history == [
        ("2.0.0", "canary", "rolled_back"),
        ("1.0.0", "rollback", "deployed"),
        ("2.0.0", "canary", "superseded"),
        ("1.0.0", "blue_green", "deployed"),
    ]
    assert "rolled_back" in agents("versions", "cli-canary")[1]
    assert agents("rollback", "cli-canary", "2.0.0")[0] == 0


def test_agents_are_listed_by_what_they_were_deployed_with(agents, tmp_path):
    """Tags and environment."""
    deployed(agents, tmp_path, "cli-tagged", TALKER, "--tag", "cli", "--environment", "staging", "--idempotent")
    assert "cli-tagged" in agents("list", "--environment", "staging", "--tag", "cli")[1]
    found = json.loads(agents("list", "--environment", "production", "--json")[1])
    assert "cli-tagged" not in [agent["agent_id"] for agent in found["agents"]]


def test_an_agent_is_taken_out_of_service(agents, tmp_path):
    """Only when somebody said yes."""
    deployed(agents, tmp_path, "cli-gone", TALKER)
    assert agents("undeploy", "cli-gone")[0] == 1
    assert agents("show", "cli-gone")[0] == 0
    assert "out of service" in agents("undeploy", "cli-gone", "--yes")[1]
    told = []

    def is_gone():
        code, _, said = agents("show", "cli-gone")
        told.append(said)
        return code == 1

    wait_until(is_gone)  # any worker answers, and sees within a second what another one did
    assert "No agent 'cli-gone'" in told[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("canary", "nobody", "--promote", "--abort"), "not both"),
        (("canary", "cli-talker"), "no version to try"),
        (("canary", "cli-talker", "--promote"), "no version on trial"),
        (("rollback", "cli-talker", "9.9.9"), "9.9.9"),
        (("events", "cli-talker", "none"), "no execution 'none'"),
        (("logs", "cli-talker", "none"), "no execution 'none'"),
        (("cancel", "cli-talker", "none"), "no execution 'none'"),
    ],
)
def test_what_cannot_be_done_is_told_with_its_fix(agents, tmp_path, arguments, said):
    """In one sentence, with exit code 1."""
    deployed(agents, tmp_path, "cli-talker", TALKER)
    code, _, told = agents(*arguments)
    assert code == 1
    assert said in told
    assert "Fix:" in told
    assert "Traceback" not in told
