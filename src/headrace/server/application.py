"""The service as one ASGI application: our API in front, somebody's own application behind it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.resources import files
from typing import Any

import msgspec
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace import __version__
from headrace.app import Rooms
from headrace.clock import SystemClock
from headrace.config import Config
from headrace.database.migrations import load_migrations, migrate
from headrace.errors import BackendError, BugError, HeadraceError, PathNotFound
from headrace.events import Observer
from headrace.server import reference
from headrace.server.agent_figures import AgentFigures
from headrace.server.agents_api import AgentsApi
from headrace.server.deployment_store import DeploymentStore, MemoryDeployments, PostgresDeployments
from headrace.server.deployments_api import DeploymentsApi
from headrace.server.event_stream import EventStreams
from headrace.server.exchange import Answer, Endpoint, Methods, Operation, problem_answer, reply_with
from headrace.server.executions_api import ExecutionsApi
from headrace.server.gate import Gate
from headrace.server.keys import POLICY, Keys
from headrace.server.keys_api import KeysApi
from headrace.server.live import Live
from headrace.server.openapi import document
from headrace.server.protocols import protocol_operations
from headrace.server.routes import Routes
from headrace.server.static import dashboard_app
from headrace.server.system_api import SystemApi


class Headrace:
    """A headrace service in an ASGI application of your own, or alone.

    ```python
    app = Headrace(load_config("headrace.toml")).asgi(my_app)   # then: uvicorn module:app
    ```

    Its rooms open at lifespan start-up and close at shutdown, together with those of the wrapped application.
    """

    def __init__(self, config: Config | None = None, *, observer: Observer | None = None, **placement: Any) -> None:
        config = config or Config()
        self.config = replace(config, cache=replace(config.cache, policies=(POLICY, *config.cache.policies)))
        self.rooms = rooms = Rooms(self.config, observer=observer, tier_of=self._tier_of, **placement)
        clock = SystemClock()
        self.keys = Keys(
            cache=rooms.cache,
            database=rooms.database,
            clock=clock,
            tiers=[tier.name for tier in config.agents.tiers],
        )
        self._deployments: DeploymentStore = (
            MemoryDeployments() if rooms.database is None else PostgresDeployments(rooms.database)
        )
        self._clock = clock
        self._live = Live(rooms.monitor.snapshot, clock=clock)
        self._streams = EventStreams()

    def _tier_of(self, tenant: str) -> str | None:
        return self.keys.tier_of(tenant)

    def operations(self) -> tuple[Operation, ...]:
        """Everything that the API can do."""
        rooms = self.rooms
        figures = AgentFigures(rooms.database)
        return (
            *ExecutionsApi(rooms.agents, self._streams).operations(),
            *AgentsApi(rooms.agents, figures, clock=self._clock).operations(),
            *DeploymentsApi(rooms.agents, self._deployments, figures, clock=self._clock).operations(),
            *KeysApi(self.keys).operations(),
            *SystemApi(rooms, version=__version__).operations(),
            *protocol_operations(rooms.agents, self._streams, self.config),
        )

    def asgi(self, app: ASGIApp | None = None) -> ASGIApp:
        """The whole service; what is not ours goes to `app`, or is a 404.

        Frameworks have a `/docs` and an `/openapi.json` of their own: with an `app`, ours are below `/headrace`.
        """
        operations = self.operations()
        described = document(
            operations, title="headrace", version=__version__, has_token=bool(self.config.server.token)
        )
        page = reference.page(described, up="../" if app else "")
        own = "/headrace" if app else ""
        guarded: dict[str, ASGIApp] = {
            "/api/v1/system/live": self._live,
            f"{own}/openapi.json": _Page(msgspec.json.encode(described), "application/json"),
            f"{own}/docs": _Page(page.encode(), "text/html", reference.POLICY),
        }
        routes = [Route(path, self._gate(endpoint)) for path, endpoint in guarded.items()]
        dashboard = dashboard_app()
        routes += [Route("/dashboard", dashboard), Route("/dashboard/{file:path}", dashboard)]
        pages = Router(routes, redirect_slashes=False, default=app or _nothing_here)
        return _Service(self, self.rooms.monitor.middleware(Routes(self._paths(operations), default=pages)), app)

    async def open(self) -> None:
        """Have every shard ready for what the API keeps itself, once the rooms are open."""
        database = self.rooms.database
        if database is not None:
            migrations = await asyncio.to_thread(load_migrations, files("headrace.server") / "migrations")
            await database.prepare(
                lambda node: migrate(node, migrations, clock=self._clock, observer=self.rooms.observer)
            )

    async def drain(self) -> None:
        """End the streams, which would otherwise keep a stopping server waiting."""
        await asyncio.gather(self._live.close(), self._streams.close())

    def _paths(self, operations: Sequence[Operation]) -> dict[str, ASGIApp]:
        by_path: dict[str, dict[str, ASGIApp]] = {}
        for operation in operations:
            by_path.setdefault(operation.path, {})[operation.method] = self._endpoint(operation)
        return {path: Methods(path, apps) for path, apps in by_path.items()}

    def _endpoint(self, operation: Operation) -> ASGIApp:
        server = self.config.server
        endpoint = Endpoint(
            operation,
            bytes_max=server.body_bytes_max,
            timeout_s=server.request_timeout_s,
            observer=self.rooms.observer,
        )
        if server.token and operation.is_public:
            return endpoint
        return Gate(
            endpoint,
            token=server.token,
            permission=operation.permission,
            keys=None if operation.is_public else self.keys,
            changes=operation.method != "GET",
        )

    def _gate(self, page: ASGIApp) -> ASGIApp:
        return Gate(page, token=self.config.server.token, permission="system:health", keys=self.keys)


class _Service:
    """Lifespan for the rooms and for the wrapped application; everything else goes through."""

    def __init__(self, headrace: Headrace, served: ASGIApp, wrapped: ASGIApp | None) -> None:
        self._headrace = headrace
        self._served = served
        self._wrapped = wrapped

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One scope."""
        if scope["type"] != "lifespan":
            return await self._served(scope, receive, send)
        await receive()
        try:
            async with self._headrace.rooms:
                await self._headrace.open()
                async with _lifespan_of(self._wrapped, scope):
                    await send({"type": "lifespan.startup.complete"})
                    await receive()
        except HeadraceError as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            raise
        await send({"type": "lifespan.shutdown.complete"})
        return None


@asynccontextmanager
async def _lifespan_of(app: ASGIApp | None, scope: Scope) -> AsyncIterator[None]:
    """The wrapped application's own start-up and shutdown; one that knows no lifespan is left alone."""
    if app is None:
        yield
        return
    to_app: asyncio.Queue[Message] = asyncio.Queue(maxsize=2)
    from_app: asyncio.Queue[Message] = asyncio.Queue(maxsize=2)
    running = asyncio.get_running_loop().create_task(_run(app, scope, to_app.get, from_app.put))
    try:
        if await _step("startup", running, to_app, from_app):
            yield
            await _step("shutdown", running, to_app, from_app)
        else:
            yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _run(app: ASGIApp, scope: Scope, receive: Callable[[], Any], send: Callable[[Message], Any]) -> None:
    await app(scope, receive, send)


async def _step(
    name: str, running: asyncio.Task[None], to_app: "asyncio.Queue[Message]", from_app: "asyncio.Queue[Message]"
) -> bool:
    """Send one lifespan message and wait for its answer; False if the application does not take part."""
    await to_app.put({"type": f"lifespan.{name}"})
    reply = asyncio.get_running_loop().create_task(from_app.get())
    await asyncio.wait({reply, running}, return_when=asyncio.FIRST_COMPLETED)
    if not reply.done():
        reply.cancel()
        return False
    message = reply.result()
    if message["type"] == f"lifespan.{name}.failed":
        raise BackendError(
            f"The wrapped application failed at {name}: {message.get('message') or 'it gave no reason'}.",
            fix="See its own traceback above.",
        )
    return True


class _Page:
    """A document that does not change while the server runs."""

    def __init__(self, body: bytes, media_type: str, policy: str = "default-src 'none'") -> None:
        headers = (
            (b"content-type", f"{media_type}; charset=utf-8".encode()),
            (b"content-security-policy", policy.encode()),
        )
        self._answer = Answer(body, 200, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await reply_with(send, self._answer)


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await reply_with(send, problem_answer(PathNotFound(f"Nothing is served at {scope['path']}.")))
    elif scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1000})
    else:
        raise BugError(f"A scope of type {scope['type']!r} reached the end of the router.")
