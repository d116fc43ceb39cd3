"""The HTTP API of a real service, as a client meets it."""

import asyncio
import base64
import http.client
import itertools
import json

import pytest

from headrace.config import ServerConfig
from tests.running import deploy_body, one_call, wait_until

BODY_BYTES_MAX = ServerConfig().body_bytes_max
ECHO = "async def Agent(input, context): return input"
SLOW = "import asyncio\nasync def Agent(input, context):\n    await asyncio.sleep(input)\n    return 'done'"


@pytest.fixture(scope="module", autouse=True)
def agents(service):
    """Two agents for all tests here."""
    service.deploy("echo", ECHO)
    service.deploy("slow", SLOW)


def raw(service, method, path, body=b"", headers=None):
    """A request as bytes: status, headers, body."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    try:
        connection.request(method, path, body, {"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def test_a_deployed_agent_is_listed_shown_and_has_a_status(service):
    """The four ways to look at an agent agree."""
    status, deployed = service.call("POST", "/api/v1/agents/deploy", deploy_body("shown", ECHO, "2.1.0"))
    assert (status, deployed["status"], deployed["version"]) == (201, "deployed", "2.1.0")
    _, listed = service.call("GET", "/api/v1/agents?limit=200")
    assert "shown" in [agent["agent_id"] for agent in listed["agents"]]
    assert service.call("GET", "/api/v1/agents/shown")[1]["version"] == "2.1.0"
    status, state = service.call("GET", deployed["status_url"])
    assert (status, state["status"], state["version"]) == (200, "active", "2.1.0")


def test_an_execution_answers_with_its_result_and_is_found_later(service):
    """The answer of execute is what the execution's own URL says."""
    status, execution = service.call("POST", "/api/v1/agents/echo/execute", {"input": {"x": [1, "\x00"]}})
    assert (status, execution["status"], execution["output"]) == (200, "completed", {"x": [1, "\x00"]})
    assert execution["run_ms"] >= 0
    assert service.call("GET", execution["status_url"]) == (200, execution)


def test_an_asynchronous_execution_is_accepted_then_completed(service):
    """202 with a URL to ask, which says completed in the end."""
    status, execution = service.call("POST", "/api/v1/agents/slow/execute", {"input": 0.05, "async": True})
    assert (status, execution["status"]) == (202, "queued")
    while execution["status"] in {"queued", "running"}:
        _, execution = service.call("GET", execution["status_url"])
    assert (execution["status"], execution["output"]) == ("completed", "done")


def test_an_execution_over_its_timeout_is_stopped(service):
    """It is an execution with status timeout, not an error of the API."""
    status, execution = service.call("POST", "/api/v1/agents/slow/execute", {"input": 30, "timeout": 0.1})
    assert (status, execution["status"]) == (200, "timeout")


def test_twenty_clients_with_one_execution_id_get_one_execution(service):
    """Over all workers, at the same time and afterwards."""

    async def together():
        body = {"input": 0.2, "execution_id": "twenty"}
        return await asyncio.gather(
            *(one_call(service.port, "POST", "/api/v1/agents/slow/execute", body) for _ in range(20))
        )

    answers = asyncio.run(together())
    answers.append(service.call("POST", "/api/v1/agents/slow/execute", {"input": 0.2, "execution_id": "twenty"}))
    assert {status for status, _ in answers} == {200}
    assert len({answer["finished_at"] for _, answer in answers}) == 1
    status, problem = service.call("POST", "/api/v1/agents/slow/execute", {"input": 0.3, "execution_id": "twenty"})
    assert (status, problem["code"]) == (409, "execution-conflict")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class Agent\n  pass", "does not compile at line 1"),
        ("x = 1", "has no 'Agent'"),
        ("raise RuntimeError('early')", "RuntimeError: early"),
        ("#" * (1 << 20) + "#", "at most 1,048,576"),
    ],
)
def test_source_that_cannot_serve_is_refused(service, source, said):
    """The problem names what is wrong, and nothing is deployed."""
    status, problem = service.call("POST", "/api/v1/agents/deploy", deploy_body("broken", source))
    assert (status, problem["code"]) == (422, "agent-invalid")
    assert said in problem["detail"]
    assert service.call("GET", "/api/v1/agents/broken")[0] == 404


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/api/v1/agents/echo/execute", b"{not json", "no valid JSON"),
        ("/api/v1/agents/echo/execute", b'{"inptu": 1}', "inptu"),
        ("/api/v1/agents/echo/execute", b'{"timeout": -1}', "timeout"),
        ("/api/v1/agents/echo/execute", b'{"timeout": 1e9}', "at most 600"),
        ("/api/v1/agents/echo/execute", b'{"execution_id": "a b"}', "execution_id"),
        ("/api/v1/agents/echo/execute", b'{"priority": "urgent"}', "priority"),
        ("/api/v1/agents/deploy", b"{}", "agent_metadata"),
        ("/api/v1/agents/echo/execute", b'{"input": ' + b"[" * 100_000, "JSON"),
    ],
)
def test_a_request_of_another_shape_is_refused(service, path, body, said):
    """A problem+json that names the field or the rule."""
    status, headers, answer = raw(service, "POST", path, body)
    problem = json.loads(answer)
    assert (status, headers["content-type"]) == (422, "application/problem+json")
    assert said in problem["detail"]
    assert problem["fix"]


def test_source_that_is_not_base64_is_refused(service):
    """The field is named."""
    body = deploy_body("x", "")
    body["agent_code"]["source_code"] = "§§§"
    status, problem = service.call("POST", "/api/v1/agents/deploy", body)
    assert (status, problem["code"]) == (422, "request-invalid")
    assert "base64" in problem["detail"]


@pytest.mark.parametrize("bad_id", ["../x", "a b", "", "x" * 129, "deploy", "nl\n", "é"])
def test_an_agent_id_has_a_shape(service, bad_id):
    """It stands in URLs, keys and metrics."""
    status, problem = service.call("POST", "/api/v1/agents/deploy", deploy_body(bad_id, ECHO))
    assert (status, problem["code"]) == (422, "request-invalid")


@pytest.mark.parametrize(("field", "value"), [("name", "a\x00b"), ("name", "two\nlines"), ("tags", ["nl\n"])])
def test_a_name_is_one_line(service, field, value):
    """Postgres keeps no NUL, and lists show one line for each agent."""
    body = deploy_body("named", ECHO)
    body["agent_metadata"][field] = value
    status, problem = service.call("POST", "/api/v1/agents/deploy", body)
    assert (status, problem["code"]) == (422, "request-invalid")
    assert field in problem["detail"]


def test_a_name_may_be_in_any_script(service):
    """Only control characters are refused."""
    body = deploy_body("named-well", ECHO)
    body["agent_metadata"].update(name="Mühlgraben 水路", tags=["é", ""])
    assert service.call("POST", "/api/v1/agents/deploy", body)[0] == 201
    assert service.call("GET", "/api/v1/agents/named-well")[1]["name"] == "Mühlgraben 水路"


@pytest.mark.parametrize("version", ["1.0.0\n", "1.0", "1.0.0-", "\u0661.\u0660.\u0660", "v1.0.0"])
def test_a_version_has_a_shape(service, version):
    """Three numbers of ASCII digits, and perhaps a suffix."""
    status, problem = service.call("POST", "/api/v1/agents/deploy", deploy_body("shaped", ECHO, version))
    assert (status, problem["code"]) == (422, "request-invalid")


@pytest.mark.parametrize("execution_id", ["nl\n", "", "a/b"])
def test_an_execution_id_has_a_shape(service, execution_id):
    """It stands in a URL."""
    body = {"input": 1, "execution_id": execution_id}
    status, problem = service.call("POST", "/api/v1/agents/echo/execute", body)
    assert (status, problem["code"]) == (422, "request-invalid")


def test_a_version_stands_for_one_source(service):
    """Deploying another source under it is a conflict."""
    status, problem = service.call("POST", "/api/v1/agents/deploy", deploy_body("echo", ECHO + "\n"))
    assert (status, problem["code"]) == (409, "version-conflict")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/api/v1/agents/nobody", 404, "agent-not-found"),
        ("GET", "/api/v1/agents/nobody/status", 404, "agent-not-found"),
        ("POST", "/api/v1/agents/nobody/execute", 404, "agent-not-found"),
        ("GET", "/api/v1/agents/echo/executions/none", 404, "execution-not-found"),
        ("GET", "/nothing/here", 404, "path-not-found"),
        ("DELETE", "/api/v1/agents/echo/status", 405, "method-not-allowed"),
        ("GET", "/api/v1/agents?limit=1000", 422, "request-invalid"),
        ("GET", "/api/v1/agents?sort=up", 422, "request-invalid"),
    ],
)
def test_what_is_not_there_is_a_problem(service, method, path, status, code):
    """Every refusal is a problem+json with a stable code."""
    body = {"input": 1} if method == "POST" else None
    answered, problem = service.call(method, path, body)
    assert (answered, problem["code"]) == (status, code)


def test_a_body_over_the_limit_is_refused(service):
    """By its content-length before it is read, and by its size when it has none."""
    path = "/api/v1/agents/echo/execute"
    status, _, answer = raw(service, "POST", path, b"", {"content-length": str(1 << 30)})
    assert (status, json.loads(answer)["code"]) == (413, "body-too-large")
    chunks = itertools.repeat(b" " * (1 << 16), BODY_BYTES_MAX >> 16)
    status, _, answer = raw(service, "POST", path, itertools.chain(chunks, [b"{}"]))
    assert (status, json.loads(answer)["code"]) == (413, "body-too-large")


def test_a_body_in_chunks_up_to_the_limit_is_read(service):
    """The limit is exact: the same request with two bytes less is an execution."""
    chunks = itertools.repeat(b" " * (1 << 16), (BODY_BYTES_MAX >> 16) - 1)
    body = itertools.chain(chunks, [b" " * ((1 << 16) - 2), b"{}"])
    status, _, answer = raw(service, "POST", "/api/v1/agents/echo/execute", body)
    assert (status, json.loads(answer)["status"]) == (200, "completed")


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"content-type": "text/plain"}, 415, "not-json"),
        ({"content-type": ""}, 415, "not-json"),
        ({"origin": "http://evil.example"}, 403, "foreign-origin"),
        ({"origin": "null"}, 403, "foreign-origin"),
        ({"sec-fetch-site": "cross-site"}, 403, "foreign-origin"),
        ({"host": "evil.example"}, 421, "foreign-host"),
        (
            {"host": "evil.example", "origin": "http://evil.example", "sec-fetch-site": "same-origin"},
            421,
            "foreign-host",
        ),
    ],
)
def test_a_web_page_cannot_deploy_an_agent(service, headers, status, code):
    """What a browser would send for a page of somebody else is refused, and nothing is deployed."""
    body = json.dumps(deploy_body("drive-by", ECHO)).encode()
    answered, _, problem = raw(service, "POST", "/api/v1/agents/deploy", body, headers)
    assert (answered, json.loads(problem)["code"]) == (status, code)
    assert service.call("GET", "/api/v1/agents/drive-by")[0] == 404


def test_a_web_page_cannot_read_by_rebinding_its_name(service):
    """Under a name that is not this machine's own, nothing is told."""
    for path in ("/api/v1/agents", "/api/v1/system/health", "/api/v1/system/live", "/metrics"):
        status, _, problem = raw(service, "GET", path, headers={"host": "evil.example"})
        assert (status, json.loads(problem)["code"]) == (421, "foreign-host")


@pytest.mark.parametrize("bad_id", ["nl%0A", "%00", "x" * 1100, "a%20b", "-", "%C3%A9"])
def test_an_id_in_a_path_that_cannot_be_is_not_there(service, bad_id):
    """404 in plain words, wherever the id stands."""
    for method, path in (
        ("GET", f"/api/v1/agents/{bad_id}"),
        ("GET", f"/api/v1/agents/{bad_id}/status"),
        ("POST", f"/api/v1/agents/{bad_id}/execute"),
        ("GET", f"/api/v1/agents/{bad_id}/executions/x"),
    ):
        status, problem = service.call(method, path, {} if method == "POST" else None)
        assert (status, problem["code"]) == (404, "agent-not-found")
        assert len(problem["detail"]) < 200
    status, problem = service.call("GET", f"/api/v1/agents/echo/executions/{bad_id}")
    assert (status, problem["code"]) == (404, "execution-not-found")


def test_pages_add_up(service):
    """limit and page walk through all agents."""
    for index in range(5):
        service.deploy(f"page-{index}", ECHO)
    _, everything = service.call("GET", "/api/v1/agents?limit=200")
    found = []
    for page in range(1, 100):
        _, part = service.call("GET", f"/api/v1/agents?limit=3&page={page}")
        found += [agent["agent_id"] for agent in part["agents"]]
        if not part["agents"]:
            break
    assert found == [agent["agent_id"] for agent in everything["agents"]]
    assert len(found) == everything["total"]


def test_health_names_every_part_and_worker(service):
    """All parts are up and both workers are known."""

    def told():
        status, health = service.call("GET", "/api/v1/system/health")
        parts = [(part["name"], part["status"]) for part in health["components"]]
        return status, health["status"], parts, len(health["workers"])

    parts = [("redis", "up"), ("shard-0", "up"), ("shard-1", "up")]
    wait_until(lambda: told() == (200, "ok", parts, 2))


def test_metrics_count_over_all_workers(service):
    """Whichever worker answers, the counts are those of the whole service."""
    for _ in range(10):
        service.call("GET", "/api/v1/agents/echo/status")
    series = 'headrace_http_requests_total{method="GET",route="/api/v1/agents/{agent_id}/status",status="2xx"}'

    def counted():
        _, headers, text = raw(service, "GET", "/metrics")
        assert headers["content-type"].startswith("text/plain")
        lines = [line for line in text.decode().splitlines() if line.startswith(series)]
        assert len(lines) <= 1
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    # A worker that finds the counters' file locked when it begins to count is seen by others with its next tick.
    wait_until(lambda: counted() >= 10)


def test_the_openapi_document_describes_every_operation(service):
    """Every path has its method, its answers, and schemas that exist."""
    _, document = service.call("GET", "/openapi.json")
    assert document["openapi"] == "3.1.0"
    assert set(document["paths"]) >= {
        "/api/v1/agents/deploy",
        "/api/v1/agents",
        "/api/v1/agents/{agent_id}",
        "/api/v1/agents/{agent_id}/status",
        "/api/v1/agents/{agent_id}/execute",
        "/api/v1/agents/{agent_id}/executions/{execution_id}",
        "/api/v1/system/health",
        "/metrics",
    }
    references = {word for word in json.dumps(document).split('"') if word.startswith("#/components/schemas/")}
    assert {name.rsplit("/", 1)[1] for name in references} <= set(document["components"]["schemas"])


def test_the_reference_page_names_every_operation(service):
    """And runs no script."""
    _, headers, page = raw(service, "GET", "/docs")
    assert b"executeAgent" in page
    assert "script-src" not in headers["content-security-policy"]
    assert headers["content-security-policy"].startswith("default-src 'none'")


def test_head_answers_as_get_without_a_body(service):
    """As HTTP wants it."""
    status, headers, body = raw(service, "HEAD", "/api/v1/agents/echo/status")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) > 0


def test_source_comes_as_base64_of_utf8(service):
    """Names and strings beyond ASCII survive."""
    service.deploy("mühle".encode().hex(), "async def Agent(input, context): return 'Mühlgraben'")
    _, execution = service.call("POST", f"/api/v1/agents/{'mühle'.encode().hex()}/execute", {})
    assert execution["output"] == "Mühlgraben"
    assert base64.b64decode(deploy_body("a", "é")["agent_code"]["source_code"]).decode() == "é"
