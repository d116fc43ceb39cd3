"""Paths lead to applications."""

import pytest

from headrace.server.routes import Routes

TEMPLATES = ["/a", "/a/deploy", "/a/{x}", "/a/{x}/do", "/a/{x}/e/{y}", "/m"]


def app_named(name):
    """An application that says who it is and with which parameters."""

    async def app(scope, receive, send):
        send((name, scope.get("path_params")))

    return app


@pytest.fixture
def routes():
    """The routes of all templates."""
    return Routes({template: app_named(template) for template in TEMPLATES}, default=app_named("default"))


async def asked(routes, path, root_path="", kind="http"):
    """Who answers."""
    answers = []
    await routes({"type": kind, "path": path, "root_path": root_path}, None, answers.append)
    return answers[0]


@pytest.mark.parametrize(
    ("path", "found", "params"),
    [
        ("/a", "/a", {}),
        ("/a/deploy", "/a/deploy", {}),
        ("/a/1", "/a/{x}", {"x": "1"}),
        ("/a/1/do", "/a/{x}/do", {"x": "1"}),
        ("/a/1/e/2", "/a/{x}/e/{y}", {"x": "1", "y": "2"}),
        ("/a/{x}/do", "/a/{x}/do", {"x": "{x}"}),
        ("/m", "/m", {}),
    ],
)
async def test_a_path_finds_its_template(routes, path, found, params):
    """A literal goes before a parameter, and a parameter is one segment."""
    assert await asked(routes, path) == (found, params)


@pytest.mark.parametrize("path", ["", "/", "/a/", "/a//do", "/a/1/", "/a/1/e", "/b", "/a/1/e/2/3", "a", "/A"])
async def test_any_other_path_goes_on(routes, path):
    """An empty segment is no parameter, and a slash at the end is another path."""
    assert (await asked(routes, path))[0] == "default"


async def test_below_a_mount_the_mount_is_left_out(routes):
    """As ASGI has it: `path` is the whole, `root_path` its beginning."""
    assert await asked(routes, "/ops/a/1", "/ops") == ("/a/{x}", {"x": "1"})
    assert (await asked(routes, "/opsa/1", "/ops"))[0] == "default"
    assert await asked(routes, "/a/1", "/ops") == ("/a/{x}", {"x": "1"})


async def test_what_is_no_request_goes_on(routes):
    """A WebSocket finds none of ours."""
    assert (await asked(routes, "/a", kind="websocket"))[0] == "default"
