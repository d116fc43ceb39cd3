"""The dashboard's files: a fixed set, read once from the package, served with a policy that lets nothing else run.

There is no path arithmetic on a file system here: a request names one of the files that the package holds, or gets
404.
"""

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.errors import HeadraceError, InvalidRequest, MethodNotAllowed, PathNotFound
from headrace.server.exchange import Header, problem_answer

_INDEX = "/dashboard"
_ASSETS = "/dashboard/assets/"

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}

_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
)

_SECURITY_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    body: bytes
    media_type: bytes
    etag: bytes

    @classmethod
    def read(cls, source: Traversable) -> "_File":
        body = source.read_bytes()
        suffix = source.name[source.name.rindex(".") :]
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        return cls(body=body, media_type=_MEDIA_TYPES[suffix].encode(), etag=etag.encode())


class _Dashboard:
    def __init__(self, index: _File, assets: dict[str, _File]) -> None:
        self._index = index
        self._assets = assets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise InvalidRequest(f"The dashboard speaks http, not {scope['type']}.")
        path: str = scope["path"]
        file = self._find(path)
        if scope["method"] not in ("GET", "HEAD"):
            error = MethodNotAllowed(f"{path} does not take {scope['method']}.")
            await _refuse(scope, send, error, (b"allow", b"GET, HEAD"))
        elif file is not None:
            await _send_file(scope, send, file)
        elif path.endswith(f"{_INDEX}/"):
            # One canonical address, because relative links mean something else below a trailing slash.
            headers = [(b"location", b"../dashboard"), *_SECURITY_HEADERS]
            await _answer(scope, send, 308, headers, b"")
        else:
            await _refuse(scope, send, PathNotFound(f"The dashboard has no file {path}.", fix="Open /dashboard."))

    def _find(self, path: str) -> _File | None:
        if path.endswith(_INDEX):
            return self._index
        _, _, name = path.rpartition(_ASSETS)
        return self._assets.get(name)


def _read_below(folder: Traversable, prefix: str) -> list[tuple[str, _File]]:
    found: list[tuple[str, _File]] = []
    for source in folder.iterdir():
        if source.is_dir():
            found += _read_below(source, f"{prefix}{source.name}/")
        elif source.name.endswith(tuple(_MEDIA_TYPES)):
            found.append((prefix + source.name, _File.read(source)))
    return found


async def _send_file(scope: Scope, send: Send, file: _File) -> None:
    headers = [(b"etag", file.etag), (b"cache-control", b"no-cache"), *_SECURITY_HEADERS]
    if _names(scope, file.etag):
        await _answer(scope, send, 304, headers, b"")
    else:
        await _answer(scope, send, 200, [(b"content-type", file.media_type), *headers], file.body)


def _names(scope: Scope, etag: bytes) -> bool:
    """Whether If-None-Match lists the tag, by weak comparison (RFC 9110, 13.1.2)."""
    lines = [value for name, value in scope["headers"] if name == b"if-none-match"]
    tags = [tag.strip().removeprefix(b"W/") for line in lines for tag in line.split(b",")]
    return etag in tags or b"*" in tags


async def _refuse(scope: Scope, send: Send, error: HeadraceError, *more: Header) -> None:
    refusal = problem_answer(error, *_SECURITY_HEADERS, *more)
    await _answer(scope, send, refusal.status, list(refusal.headers), refusal.body)


async def _answer(scope: Scope, send: Send, status: int, headers: list[Header], body: bytes) -> None:
    if status != 304:
        headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


# Read on import, like the code itself: an application may be put together inside a running loop, which must not wait
# for a disk.
_ROOT = files("headrace").joinpath("server", "dashboard")
_DASHBOARD = _Dashboard(_File.read(_ROOT / "index.html"), dict(_read_below(_ROOT / "assets", "")))


def dashboard_app() -> ASGIApp:
    """An ASGI app that serves `/dashboard` and `/dashboard/assets/<file>`, below any prefix, and 404 otherwise.

    File names do not change between releases, so every answer must be revalidated (`no-cache`) and a strong ETag makes
    that cost one 304. All links in the page are relative: it works behind a proxy that adds a path.
    """
    return _DASHBOARD
