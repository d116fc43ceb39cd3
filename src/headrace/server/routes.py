"""Finds the operation of a path: a tree of segments, so it takes as long as the path is deep, however many there are.

A router that tries patterns in turn costs every request the patterns before its own; here there are thirty, and one of
them is asked tens of thousands of times a second. A literal segment goes before a parameter, as OpenAPI wants it
(3.1, "Path Templating Matching").
"""

from collections.abc import Awaitable, Mapping
from functools import lru_cache

from starlette.types import ASGIApp, Receive, Scope, Send

_PATHS_MAX = 512
"""Paths whose places are remembered: those that are asked for over and over."""
_REMEMBERED_MAX = 256
"""Characters of such a path."""


class _Place:
    """Where a prefix of paths ends."""

    __slots__ = ("app", "literals", "names", "parameter")

    def __init__(self) -> None:
        self.literals: dict[str, _Place] = {}
        self.parameter: _Place | None = None
        self.app: ASGIApp | None = None
        self.names: tuple[str, ...] = ()


class Routes:
    """Applications by path template; what matches none goes to `default`."""

    def __init__(self, apps: Mapping[str, ASGIApp], *, default: ASGIApp) -> None:
        self._root = _Place()
        self._find = lru_cache(_PATHS_MAX)(self._search)
        self._default = default
        for template, app in apps.items():
            self._add(template, app)

    # Not a coroutine function: it returns what the application returns, which saves a coroutine for each request.
    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Hand the request to whoever its path belongs to."""
        if scope["type"] == "http":
            path = scope["path"] if not scope.get("root_path") else _below_root(scope)
            place, values = self._find(path) if len(path) <= _REMEMBERED_MAX else self._search(path)
            if place is not None and place.app is not None:
                scope["path_params"] = dict(zip(place.names, values, strict=True))
                return place.app(scope, receive, send)
        return self._default(scope, receive, send)

    def _add(self, template: str, app: ASGIApp) -> None:
        place, names = self._root, []
        for segment in template.split("/"):
            if segment.startswith("{"):
                names.append(segment[1:-1])
                if place.parameter is None:
                    place.parameter = _Place()
                place = place.parameter
            else:
                place = place.literals.setdefault(segment, _Place())
        place.app, place.names = app, tuple(names)

    def _search(self, path: str) -> tuple[_Place | None, list[str]]:
        place: _Place | None = self._root
        values: list[str] = []
        for segment in path.split("/"):
            if place is None:
                break
            known = place.literals.get(segment)
            if known is not None:
                place = known
            elif place.parameter is not None and segment:
                place = place.parameter
                values.append(segment)
            else:
                place = None
        return place, values


def _below_root(scope: Scope) -> str:
    """The path below the one that the application is mounted at (ASGI's `root_path`)."""
    root, path = scope["root_path"], scope["path"]
    if not path.startswith(root):
        return str(path)
    below = path[len(root) :]
    return below if below.startswith("/") or not below else str(path)
