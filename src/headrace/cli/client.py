"""A small HTTP client for our own API: standard library, JSON in and out, problems as errors."""

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from headrace.errors import BackendError, CallerError

_TIMEOUT_S = 120.0
_RECONNECTS_MAX = 10


@dataclass(frozen=True, slots=True)
class Frame:
    """A server-sent event."""

    event: str
    id: str
    data: Any


class Client:
    """Calls to one running service."""

    def __init__(self, url: str, *, token: str | None = None) -> None:
        self._parts = _parts(url)
        self._url = f"{self._parts.scheme}://{self._parts.netloc}"
        self._connection = self._connect()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return self._call("GET", path)

    def post(self, path: str, body: Any) -> Any:
        """The JSON answer to a JSON body."""
        return self._call("POST", path, json.dumps(body).encode())

    def put(self, path: str, body: Any) -> Any:
        """The JSON answer to a JSON body."""
        return self._call("PUT", path, json.dumps(body).encode())

    def delete(self, path: str) -> Any:
        """The JSON answer."""
        return self._call("DELETE", path)

    def events(self, path: str, *, after: str = "") -> Iterator[Frame]:
        """The events of a stream until its end; a connection that breaks is made again, after the last one."""
        for _ in range(_RECONNECTS_MAX):
            for frame in self._events_once(path, after):
                yield frame
                if frame.event in {"end", "problem"}:
                    return
                after = frame.id or after
        raise BackendError(f"{self._url}{path} ended {_RECONNECTS_MAX} times before its end.")

    def _events_once(self, path: str, after: str) -> Iterator[Frame]:
        headers = {**self._headers, **({"Last-Event-ID": after} if after else {})}
        with closing(self._connect()) as connection:
            try:
                connection.request("GET", path, headers=headers)
                response = connection.getresponse()
                if response.status >= 400:
                    raise _problem(response.status, response.read())
                lines: list[str] = []
                for line in response:
                    if text := line.decode().rstrip("\r\n"):
                        lines.append(text)
                    elif frame := _frame(lines):
                        lines = []
                        yield frame
                    else:
                        lines = []
            except (OSError, http.client.HTTPException) as error:
                raise self._silent(error) from error

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        return kind(self._parts.hostname or "", self._parts.port, timeout=_TIMEOUT_S)

    def _call(self, method: str, path: str, body: bytes | None = None) -> Any:
        headers = {**self._headers, **({"Content-Type": "application/json"} if body else {})}
        try:
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._silent(error) from error
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            # Everything that we are asked for answers with an object, problems too.
            raise BackendError(
                f"{self._url}{path} answered {response.status} without a JSON object.",
                fix="Is this a headrace service?",
            )
        if response.status >= 400:
            raise _problem(response.status, text)
        return value

    def _silent(self, error: Exception) -> BackendError:
        return BackendError(
            f"{self._url} does not answer: {error}.", fix="Start it with `headrace up`, or name it with --url."
        )


def _problem(status: int, text: bytes) -> CallerError | BackendError:
    kind = CallerError if status < 500 else BackendError
    try:
        value = json.loads(text)
    except ValueError:
        value = {}
    return kind(value.get("detail", text.decode(errors="replace")), fix=value.get("fix"))


def _frame(lines: list[str]) -> Frame | None:
    """A frame of its lines; None for a comment or a hint to the browser."""
    fields = dict(line.split(": ", 1) for line in lines if ": " in line and not line.startswith(":"))
    if "data" not in fields:
        return None
    return Frame(fields.get("event", "message"), fields.get("id", ""), json.loads(fields["data"]))


def _parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        is_usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        raise CallerError(f"{url!r} is no URL of a service.", fix="Write http://host:port.")
    return parts
