"""The cache as a dependency of a real FastAPI application."""

from contextlib import asynccontextmanager
from typing import Annotated

import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed")

from fastapi import Depends, FastAPI, WebSocket
from fastapi.testclient import TestClient

from headrace.cache import Cache, RemoteConfig
from headrace.cache.integrations.fastapi import cache_dependency, lifespan
from headrace.errors import NotOpen

OpenCache = Annotated[Cache, Depends(cache_dependency)]


def application(**options: object) -> FastAPI:
    app = FastAPI(**options)
    loads: list[int] = []

    @app.get("/double/{number}")
    async def double(number: int, cache: OpenCache) -> dict[str, int]:
        def load() -> int:
            loads.append(number)
            return 2 * number

        return {"value": await cache.get_or_load(f"double:{number}", load, type=int), "loads": len(loads)}

    @app.websocket("/get")
    async def get(socket: WebSocket, cache: OpenCache) -> None:
        await socket.accept()
        await socket.send_json(await cache.get(await socket.receive_text()))
        await socket.close()

    return app


def test_handlers_and_sockets_get_the_open_cache(server):
    """It opens with the application, serves requests and web sockets, and closes with it."""
    cache = Cache(remote=RemoteConfig(url=server.url, timeout=20, connect_timeout=20))
    with TestClient(application(lifespan=lifespan(cache))) as client:
        assert [client.get("/double/4").json() for _ in range(2)] == [{"value": 8, "loads": 1}] * 2
        with client.websocket_connect("/get") as socket:
            socket.send_text("double:4")
            assert socket.receive_json() == 8
        assert cache.statistics().remote_available
    assert not cache.statistics().remote_available


def test_an_applications_own_lifespan_runs_inside():
    """It finds the cache open, and what it yields stays in the state."""
    cache = Cache()
    steps = []

    @asynccontextmanager
    async def own(app: FastAPI):
        await cache.set("k", 1)
        yield {"own": "state"}
        steps.append(await cache.get("k"))

    app = application(lifespan=lifespan(cache, own))
    with TestClient(app) as client:
        assert client.get("/double/1").json()["value"] == 2
        assert client.app_state["own"] == "state"
    assert steps == [1]


def test_without_a_cache_the_error_says_what_to_write():
    """A handler that asks for a cache of an application without one is told how to give it."""
    with TestClient(application()) as client, pytest.raises(NotOpen, match=r"lifespan\(cache\)"):
        client.get("/double/1")


def test_a_test_can_replace_the_cache():
    """An override is used instead, and needs no lifespan."""
    app = application()
    other = Cache()
    app.dependency_overrides[cache_dependency] = lambda: other
    with pytest.raises(NotOpen, match="not open"):
        TestClient(app).get("/double/1")
