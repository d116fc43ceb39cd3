"""The service as one ASGI application: its doors, whatever is in front of it and behind it."""

from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from headrace.config import Config, ServerConfig
from headrace.database import DatabaseConfig, ShardConfig
from headrace.server import Headrace
from tests.running import deploy_body

TOKEN = "a token of more than sixteen characters"
GUARDED = [
    "/api/v1/agents",
    "/api/v1/agents/echo",
    "/api/v1/agents/echo/status",
    "/api/v1/system/history",
    "/api/v1/system/live",
    "/metrics",
]
OUR_DOCS = ["/docs", "/openapi.json"]
OPEN = ["/api/v1/system/health", "/dashboard"]


@asynccontextmanager
async def calling(application, headrace, *, root_path=""):
    """A client of the application while the service's rooms are open."""
    transport = httpx.ASGITransport(application, root_path=root_path)
    async with headrace.rooms, httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


def with_token():
    """A service that wants a token."""
    return Headrace(Config(server=ServerConfig(token=TOKEN)))


def own_application():
    """Somebody's application, with paths that look like ours."""

    async def mine(request):
        return PlainTextResponse(f"mine: {request.url.path}")

    paths = ["/docs", "/openapi.json", "/docs-of-mine", "/api/v1/users", "/metrics-of-mine", "/"]
    return Starlette(routes=[Route(path, mine) for path in paths])


async def statuses(client, paths, headers=None):
    """What each path is answered with."""
    return {path: (await client.get(path, headers=headers)).status_code for path in paths}


async def test_every_way_in_wants_the_token():
    """But the health check and the dashboard's page, which holds no data."""
    headrace = with_token()
    async with calling(headrace.asgi(), headrace) as client:
        assert set((await statuses(client, GUARDED + OUR_DOCS)).values()) == {401}
        assert set((await statuses(client, OPEN)).values()) == {200}
        known = {"authorization": f"Bearer {TOKEN}"}
        assert set((await statuses(client, ["/api/v1/agents", "/metrics", *OUR_DOCS], known)).values()) == {200}
        assert (await client.post("/api/v1/agents/deploy", json={})).status_code == 401


async def test_the_document_says_what_wants_the_token():
    """Everything by default, and the health check not."""
    headrace = with_token()
    async with calling(headrace.asgi(), headrace) as client:
        answer = await client.get("/openapi.json", headers={"authorization": f"Bearer {TOKEN}"})
    document = answer.json()
    assert document["security"] == [{"token": []}]
    operations = [each for methods in document["paths"].values() for each in methods.values()]
    assert [each["operationId"] for each in operations if each.get("security") == []] == ["health"]


async def test_below_a_mount_the_token_is_wanted_too():
    """Wherever the service hangs in somebody's application."""
    headrace = with_token()
    outer = Starlette(routes=[Mount("/ops", headrace.asgi())])
    async with calling(outer, headrace) as client:
        found = await statuses(client, [f"/ops{path}" for path in GUARDED + OUR_DOCS])
        assert set(found.values()) == {401}
        assert (await client.post("/ops/api/v1/agents/deploy", json={})).status_code == 401
        assert set((await statuses(client, [f"/ops{path}" for path in OPEN])).values()) == {200}


async def test_below_a_root_path_the_token_is_wanted_too():
    """As with `uvicorn --root-path /ops`."""
    headrace = with_token()
    async with calling(headrace.asgi(), headrace, root_path="/ops") as client:
        found = await statuses(client, [f"/ops{path}" for path in GUARDED + OUR_DOCS])
        assert set(found.values()) == {401}


@pytest.mark.parametrize("token", [None, TOKEN])
async def test_a_wrapped_application_keeps_its_paths(token):
    """Its own pages answer, without our token; our reference is below /headrace."""
    headrace = Headrace(Config(server=ServerConfig(token=token)))
    async with calling(headrace.asgi(own_application()), headrace) as client:
        for path in ("/docs", "/openapi.json", "/docs-of-mine", "/api/v1/users", "/metrics-of-mine", "/"):
            assert (await client.get(path)).text == f"mine: {path}"
        known = {"authorization": f"Bearer {TOKEN}"}
        page = await client.get("/headrace/docs", headers=known)
        assert "executeAgent" in page.text
        assert (await client.get("/headrace/openapi.json", headers=known)).json()["openapi"] == "3.1.0"
        if token:
            found = await statuses(client, ["/headrace/docs", "/headrace/openapi.json", "/metrics"])
            assert set(found.values()) == {401}


@pytest.mark.parametrize(("wrapped", "address"), [(None, "/docs"), (own_application(), "/headrace/docs")])
async def test_the_reference_links_to_what_is_there(wrapped, address):
    """Beside another application and below a prefix, too."""
    headrace = Headrace()
    outer = Starlette(routes=[Mount("/ops", headrace.asgi(wrapped))])
    async with calling(outer, headrace) as client:
        page = await client.get(f"/ops{address}")
        links = [part.split(">")[0] for part in page.text.split("<a href=")[1:]]
        assert len(links) == 3
        for link in links:
            answer = await client.get(page.url.join(link))
            assert (answer.status_code, answer.text.startswith("mine")) == (200, False)


@pytest.mark.parametrize(
    ("redis", "shards", "expected"),
    [
        (None, {}, (200, "ok")),
        (True, {"a": True, "b": True}, (200, "ok")),
        (False, {"a": True, "b": True}, (200, "degraded")),
        (True, {"a": False, "b": True}, (200, "degraded")),
        (True, {"a": False, "b": False}, (503, "down")),
        (None, {"a": False}, (503, "down")),
        (False, {}, (200, "degraded")),
    ],
)
async def test_health_says_whether_anything_can_be_served(monkeypatch, redis, shards, expected):
    """Without the cache and without some shards it can; without any shard it cannot."""
    databases = tuple(ShardConfig(name=name, dsn="host=127.0.0.1 port=1 dbname=x") for name in shards)
    headrace = Headrace(Config(database=DatabaseConfig(shards=databases)))
    application = headrace.asgi()
    rooms = headrace.rooms
    monkeypatch.setattr(rooms.cache, "statistics", lambda: Told(remote_available=redis))
    if shards:
        nodes = {name: Told(available=available) for name, available in shards.items()}
        monkeypatch.setattr(rooms.database, "statistics", lambda: Told(shards=nodes))
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.get("/api/v1/system/health")
    health = answer.json()
    assert (answer.status_code, health["status"]) == expected
    said = {part["name"]: part["status"] == "up" for part in health["components"]}
    assert said == {**({} if redis is None else {"redis": redis}), **shards}


async def test_health_is_down_when_no_shard_answers():
    """With the real database room and nobody at the shards' addresses."""
    shards = tuple(ShardConfig(name=name, dsn="host=127.0.0.1 port=1 dbname=x") for name in ("a", "b"))
    headrace = Headrace(Config(database=DatabaseConfig(shards=shards, acquire_timeout_s=0.1)))
    async with calling(headrace.asgi(), headrace) as client:
        answer = await client.get("/api/v1/system/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "down")
    assert [part["status"] for part in answer.json()["components"]] == ["down", "down"]


class Told:
    """Statistics as this test wants them."""

    def __init__(self, **values):
        self.__dict__.update(values)


async def test_below_a_mount_the_urls_that_it_hands_out_lead_back_to_it():
    """A client that follows them gets there without knowing where the service hangs."""
    headrace = Headrace(Config())
    outer = Starlette(routes=[Mount("/ops", headrace.asgi())])
    async with calling(outer, headrace) as client:
        deployed = await client.post(
            "/ops/api/v1/agents/deploy",
            json=deploy_body("echo", "async def Agent(input, context): return input"),
        )
        assert (await client.get(deployed.headers["location"])).json()["agent_id"] == "echo"
        assert (await client.get(deployed.json()["status_url"])).status_code == 200
        executed = await client.post(deployed.json()["execute_url"], json={"input": 7})
        assert (await client.get(executed.json()["status_url"])).json()["output"] == 7
