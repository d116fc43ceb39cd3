"""API keys of a service with two workers, over HTTP and by the command."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.running import deploy_body, running, wait_until

TOKEN = "a token of more than sixteen characters"
ECHO = "async def Agent(input, context): return context.tenant"
HELD = """
import asyncio
from pathlib import Path

async def Agent(input, context):
    Path(input, context.execution_id).touch()
    while not Path(input, "end").exists():
        await asyncio.sleep(0.05)
"""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A service that wants a token or a key."""
    directory = tmp_path_factory.mktemp("guarded")
    with running(directory, "--workers", "2", environment={"HEADRACE_SERVER_TOKEN": TOKEN}) as service:
        yield service


def call(service, key, method, path, body=None):
    """Status and JSON of a request with a key."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{service.url}{path}", data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def command(service, *arguments, token=TOKEN):
    """A command with a token: its code and output."""
    done = subprocess.run(
        [sys.executable, "-m", "headrace", arguments[0], "--url", service.url, "--token", token, *arguments[1:]],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.returncode, done.stdout.strip(), done.stderr


def made(service, tenant, *more):
    """The text of a new key."""
    code, key, said = command(service, "keys", "create", tenant, *more)
    assert (code, key[:3]) == (0, "hr_"), said
    return key


def test_a_key_serves_its_tenant_on_every_worker(guarded):
    """Deploy with one tenant's key, and neither the other's nor the operator's sees it."""
    one, two = made(guarded, "one"), made(guarded, "two", "--tier", "professional")
    for key, expected in ((one, "one"), (two, "two")):
        assert call(guarded, key, "POST", "/api/v1/agents/deploy", deploy_body("who", ECHO))[0] == 201
        for _ in range(8):
            status, execution = call(guarded, key, "POST", "/api/v1/agents/who/execute", {})
            assert (status, execution["output"]) == (200, expected)
    assert call(guarded, one, "GET", execution["status_url"])[0] == 404
    assert call(guarded, TOKEN, "GET", "/api/v1/agents/who")[0] == 404


def test_a_revoked_key_is_refused_by_every_worker(guarded):
    """At once where the word arrives, and within seconds anywhere."""
    key = made(guarded, "short")
    for _ in range(8):
        assert call(guarded, key, "GET", "/api/v1/agents")[0] == 200
    code, said, _ = command(guarded, "keys", "revoke", key)
    assert (code, "revoked" in said) == (0, True)
    wait_until(lambda: all(call(guarded, key, "GET", "/api/v1/agents")[0] == 401 for _ in range(8)))


def test_a_key_may_do_what_it_was_given(guarded):
    """The command says which permission is lacking."""
    key = made(guarded, "reader", "--permission", "agent:monitor")
    assert command(guarded, "agents", "list", token=key)[0] == 0
    code, _, said = command(guarded, "agents", "undeploy", "who", "--yes", token=key)
    assert code == 1
    assert "agent:delete" in said
    code, _, said = command(guarded, "keys", "list", token=key)
    assert (code, "key:manage" in said) == (1, True)


def test_keys_are_listed_without_their_secrets(guarded):
    """By tenant, as a table and as JSON."""
    key = made(guarded, "listed", "--name", "for the tests", "--days", "1")
    code, printed, _ = command(guarded, "keys", "list", "--tenant", "listed", "--json")
    (found,) = json.loads(printed)["keys"]
    assert (code, found["name"], found["tenant"]) == (0, "for the tests", "listed")
    assert found["expires_at"] - found["created_at"] == pytest.approx(86_400)
    assert key.startswith(f"{found['prefix']}_")
    assert key.split("_", 2)[2] not in printed
    assert "listed" in command(guarded, "keys", "list")[1]


def test_the_hash_of_a_key_is_all_that_the_database_has(guarded):
    """Nothing in any table or log contains its secret."""
    key = made(guarded, "hashed")
    secret = key.split("_", 2)[2]
    assert call(guarded, key, "GET", "/api/v1/agents")[0] == 200
    assert secret not in guarded.log.read_text()
    _, listed = call(guarded, TOKEN, "GET", "/api/v1/keys?tenant=hashed")
    assert secret not in json.dumps(listed)


@pytest.mark.parametrize(("tier", "are_refused"), [("developer", True), ("enterprise", False)])
def test_the_tier_of_a_key_bounds_what_runs_at_once(guarded, tmp_path, tier, are_refused):
    """Forty executions of a developer are more than ten; of an enterprise they are not more than five hundred."""
    key = made(guarded, f"of-{tier}", "--tier", tier)
    assert call(guarded, key, "POST", "/api/v1/agents/deploy", deploy_body("held", HELD))[0] == 201
    body = {"input": str(tmp_path)}
    with ThreadPoolExecutor(40) as threads:
        calls = [threads.submit(call, guarded, key, "POST", "/api/v1/agents/held/execute", body) for _ in range(40)]
        try:
            # None ends before each of them has begun or was refused: they are at once however slowly they come.
            wait_until(lambda: len(list(tmp_path.iterdir())) + sum(each.done() for each in calls) >= 40)
        finally:
            Path(tmp_path, "end").touch()
        answers = [each.result() for each in calls]
    assert {status for status, _ in answers} <= {200, 429, 503}
    assert any(status != 200 for status, _ in answers) == are_refused
