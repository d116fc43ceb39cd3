"""A small HTTP client for our own API: standard library, JSON in and out, problems as errors."""

import http.client
import json
from typing import Any
from urllib.parse import SplitResult, urlsplit

from headrace.errors import BackendError, CallerError

_TIMEOUT_S = 120.0


class Client:
    """Calls to one running service."""

    def __init__(self, url: str, *, token: str | None = None) -> None:
        parts = _parts(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._url = f"{parts.scheme}://{parts.netloc}"
        self._connection = kind(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return self._call("GET", path)

    def post(self, path: str, body: Any) -> Any:
        """The JSON answer to a JSON body."""
        return self._call("POST", path, json.dumps(body).encode())

    def _call(self, method: str, path: str, body: bytes | None = None) -> Any:
        headers = {**self._headers, **({"Content-Type": "application/json"} if body else {})}
        try:
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise BackendError(
                f"{self._url} does not answer: {error}.", fix="Start it with `headrace up`, or name it with --url."
            ) from error
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
            kind = CallerError if response.status < 500 else BackendError
            raise kind(value.get("detail", text.decode(errors="replace")), fix=value.get("fix"))
        return value


def _parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        is_usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        raise CallerError(f"{url!r} is no URL of a service.", fix="Write http://host:port.")
    return parts
