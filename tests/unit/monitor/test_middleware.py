"""Observing ASGI applications: what is counted, when, and under which label."""

import asyncio
import mimetypes
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from headrace.monitor.catalogue import HTTP_DURATION, HTTP_REQUESTS, OTHER
from headrace.monitor.counters import Counters
from headrace.monitor.middleware import Observed, Requests, route_of
from headrace.testing import FakeClock


class Server:
    """Plays the ASGI server for one observed application, on a clock that the application moves."""

    def __init__(self, app, *, endpoints_max=200):
        self.clock = FakeClock()
        self.counters = Counters.open(None)
        self.requests = Requests(self.counters, self.clock, endpoints_max=endpoints_max)
        self.app = Observed(app, self.requests)
        self.sent = []

    async def get(self, path="/", *, method="GET", **scope):
        received = asyncio.Queue()  # the client stays: after the request, nothing comes
        received.put_nowait({"type": "http.request", "body": b"", "more_body": False})

        async def send(message):
            self.sent.append(message["type"])

        await self.app(
            {"type": "http", "method": method, "path": path, "headers": [], "query_string": b"", **scope},
            received.get,
            send,
        )

    @property
    def answered(self):
        """(method, route, status) -> how many, of those that occurred."""
        return {
            (series.label("method"), series.label("route"), series.label("status")): count
            for series, count in self.counters.fold().counters.items()
            if series.name == HTTP_REQUESTS and count
        }

    @property
    def seconds(self):
        """route -> all its durations together."""
        return {
            series.label("route"): distribution.sum_s
            for series, distribution in self.counters.fold().histograms.items()
            if series.name == HTTP_DURATION
        }


@pytest.fixture
def serve():
    servers = []

    def serve(app, **options):
        servers.append(Server(app, **options))
        return servers[-1]

    yield serve
    for server in servers:
        server.counters.close()


def start(status=200, headers=()):
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(more=False):
    return {"type": "http.response.body", "body": b"x", "more_body": more}


def scripted(*steps):
    """An application that sends messages, lets seconds go by, and raises, in this order."""

    async def app(scope, receive, send):
        scope["headrace.route"] = "/scripted"
        for step in steps:
            if isinstance(step, dict):
                await send(step)
            elif isinstance(step, float):
                app.server.clock.advance(step)
            else:
                raise step

    return app


@pytest.fixture
def play(serve):
    async def play(*steps):
        app = scripted(*steps)
        app.server = serve(app)
        await app.server.get()
        return app.server

    return play


@pytest.mark.parametrize(("status", "label"), [(200, "2xx"), (304, "3xx"), (404, "4xx"), (503, "5xx"), (999, "5xx")])
async def test_an_answer_is_counted_by_its_class(play, status, label):
    """One request, one count; a status that does not exist is the server's fault."""
    server = await play(start(status), body())

    assert server.answered == {("GET", "/scripted", label): 1}


async def test_the_clock_stops_at_the_last_part_of_the_answer(play):
    """What the application does afterwards, such as background tasks, is not latency."""
    server = await play(0.25, start(), 0.25, body(more=True), 0.5, body(), 60.0)

    assert server.seconds == {"/scripted": 1.0}
    assert server.sent == ["http.response.start", "http.response.body", "http.response.body"]


async def test_a_file_sent_by_the_server_ends_the_answer(play):
    """The pathsend extension replaces the body."""
    server = await play(start(), 0.5, {"type": "http.response.pathsend", "path": "/etc/hosts"}, 9.0)

    assert server.answered == {("GET", "/scripted", "2xx"): 1}
    assert server.seconds == {"/scripted": 0.5}


async def test_a_stream_of_events_is_counted_at_its_first_event(play):
    """How long a client listens is not how long the server took."""
    events = [(b"Content-Type", b"text/event-stream; charset=utf-8")]

    server = await play(start(headers=events), 0.125, body(more=True), 600.0, body(more=True), 600.0, body())

    assert server.seconds == {"/scripted": 0.125}
    assert server.answered == {("GET", "/scripted", "2xx"): 1}


async def test_a_stream_of_anything_else_is_counted_at_its_end(play):
    """A download takes as long as it takes."""
    server = await play(start(headers=[(b"content-type", b"text/csv")]), 1.0, body(more=True), 2.0, body())

    assert server.seconds == {"/scripted": 3.0}


@pytest.mark.parametrize("steps", [(), (start(200),), (start(200), body(more=True))])
async def test_an_exception_is_a_server_error(serve, steps):
    """Before or within the answer, whatever status was promised; the exception goes on to the server."""
    app = scripted(*steps, 0.5, RuntimeError("broken"))
    app.server = serve(app)

    with pytest.raises(RuntimeError, match="broken"):
        await app.server.get()

    assert app.server.answered == {("GET", "/scripted", "5xx"): 1}
    assert app.server.seconds == {"/scripted": 0.5}
    assert app.server.requests.in_flight == 0


async def test_an_exception_after_the_answer_is_not_counted_again(serve):
    """A background task that fails does not turn an answered request into two."""
    app = scripted(start(), body(), RuntimeError("late"))
    app.server = serve(app)

    with pytest.raises(RuntimeError, match="late"):
        await app.server.get()

    assert app.server.answered == {("GET", "/scripted", "2xx"): 1}


@pytest.mark.parametrize("steps", [(), (start(200),), (start(200), body(more=True))])
async def test_an_unfinished_answer_is_a_server_error(play, steps):
    """An application that returns without an end is cut off by the server."""
    assert (await play(*steps)).answered == {("GET", "/scripted", "5xx"): 1}


async def test_a_cancelled_request_is_not_the_servers_error(serve):
    """The client left, or the server is stopping: counted with what clients cause."""
    entered = asyncio.Event()

    async def app(scope, receive, send):
        entered.set()
        await asyncio.Event().wait()

    server = serve(app)
    task = asyncio.get_running_loop().create_task(server.get())
    await entered.wait()
    assert server.requests.in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert server.answered == {("GET", OTHER, "4xx"): 1}
    assert server.requests.in_flight == 0


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
async def test_other_traffic_passes_through(serve, kind):
    """WebSockets and lifespan reach the application with the server's own channels."""
    seen = []

    async def app(scope, receive, send):
        seen.append((scope["type"], receive, send))

    server = serve(app)
    receive, send = object(), object()
    await server.app({"type": kind}, receive, send)

    assert seen == [(kind, receive, send)]
    assert server.answered == {}


async def test_methods_are_those_of_http(serve):
    """An invented method does not make a series."""
    app = scripted(start(), body())
    app.server = serve(app)
    for method in ("GET", "QUERY", "BREW", "FROB"):
        await app.server.get(method=method)

    assert app.server.answered == {
        ("GET", "/scripted", "2xx"): 1,
        ("QUERY", "/scripted", "2xx"): 1,
        (OTHER, "/scripted", "2xx"): 2,
    }


async def test_endpoints_past_the_limit_share_one(serve):
    """With room for three, ten routes make three and the rest, and no request is lost."""

    async def app(scope, receive, send):
        scope["headrace.route"] = scope["path"]
        await send(start())
        await send(body())

    server = serve(app, endpoints_max=3)
    for number in range(10):
        for _ in range(2):
            await server.get(f"/{number}")

    assert server.answered == {("GET", route, "2xx"): n for route, n in (("/0", 2), ("/1", 2), ("/2", 2), (OTHER, 14))}


async def hello(request):
    return PlainTextResponse("hello", background=BackgroundTask(str))


async def broken(request):
    raise RuntimeError("broken")


async def stream(request):
    async def parts():
        yield "a"
        yield "b"

    return StreamingResponse(parts())


@pytest.fixture
def starlette(tmp_path, serve):
    (tmp_path / "page.html").write_text("page")
    mimetypes.init()  # reads files at its first use
    inner = Starlette(routes=[Route("/things/{thing:int}", hello)])
    return serve(
        Starlette(
            routes=[
                Route("/", hello),
                Route("/users/{user}/posts/{post}", hello),
                Route("/broken", broken),
                Route("/stream", stream),
                Route("/posted", hello, methods=["POST"]),
                Mount("/tenants/{tenant}", app=inner),
                Mount("/static", app=StaticFiles(directory=tmp_path)),
            ]
        )
    )


@pytest.mark.parametrize(
    ("path", "route", "status"),
    [
        ("/", "/", "2xx"),
        ("/users/7/posts/7", "/users/{user}/posts/{post}", "2xx"),
        ("/stream", "/stream", "2xx"),
        ("/posted", "/posted", "4xx"),
        ("/tenants/things/things/3", "/tenants/{tenant}/things/{thing:int}", "2xx"),
        ("/tenants/acme/nothing", "/tenants/{tenant}/*", "4xx"),
        ("/static/page.html", "/static/*", "2xx"),
        ("/static/missing-4711.html", "/static/*", "4xx"),
        ("/wp-login.php", OTHER, "4xx"),
    ],
)
async def test_routes_of_starlette_are_labelled_by_their_template(starlette, path, route, status):
    """Whatever stands in the path, the label is one that the application declared."""
    await starlette.get(path)

    assert starlette.answered == {("GET", route, status): 1}


async def test_an_exception_in_starlette_is_counted_once(starlette):
    """Starlette answers with 500 and raises as well; that is one request."""
    with pytest.raises(RuntimeError, match="broken"):
        await starlette.get("/broken")

    assert starlette.answered == {("GET", "/broken", "5xx"): 1}


ENDPOINT = {"endpoint": hello}


@pytest.mark.parametrize(
    ("scope", "route"),
    [
        ({"path": "/a/b"}, OTHER),
        ({"path": "/health", **ENDPOINT, "path_params": {}}, "/health"),
        ({"path": "/a/7/b/8", "path_params": {"x": 7, "y": "8"}}, "/a/{x}/b/{y}"),
        ({"path": "/a/7/b/7", "path_params": {"x": 7, "y": 7}}, "/a/{x}/b/{y}"),
        ({"path": "/files/a/b/c.txt", "path_params": {"path": "a/b/c.txt"}}, "/files/{path}"),
        ({"path": "/a/007", "path_params": {"x": 7}}, OTHER),
        ({"path": "/a/77", "path_params": {"x": 7}}, OTHER),
        ({"path": "/x/9", "path_template": "/x/{y}"}, "/x/{y}"),
        ({"path": "/old/9/x", "root_path": "/old/9", "app_root_path": "", "path_params": {}, **ENDPOINT}, OTHER),
        ({"path": "/api/a", "root_path": "/api", "route": SimpleNamespace(path="/a", endpoint=hello)}, "/a"),
        (
            {
                "path": "/m/9/a",
                "root_path": "/m/9",
                "app_root_path": "",
                "path_params": {"n": 8},
                "route": SimpleNamespace(path="/a", endpoint=hello),
            },
            OTHER,
        ),
        ({"path": "/a", "route": object()}, OTHER),
    ],
)
def test_a_route_is_found_in_what_the_framework_left(scope, route):
    """Templates, parameters put back into the path, or nothing that would make the labels unbounded."""
    assert route_of({"type": "http", **scope}) == route
