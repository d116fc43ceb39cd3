"""A small HTTP client for our own API: standard library, JSON in and out, problems as errors."""

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

from headrace.errors import BackendError, CallerError

_TIMEOUT_S = 120.0


class Client:
    """Calls to one running service."""

    def __init__(self, url: str, *, token: str | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise CallerError(f"{url!r} is no URL of a service.", fix="Write http://host:port.")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._url = f"{parts.scheme}://{parts.netloc}"
        self._connection = kind(parts.hostname, parts.port, timeout=_TIMEOUT_S)
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
        except ValueError as error:
            raise BackendError(
                f"{self._url}{path} answered {response.status} without JSON.", fix="Is this a headrace service?"
            ) from error
        if response.status >= 400:
            kind = CallerError if response.status < 500 else BackendError
            raise kind(value.get("detail", text.decode(errors="replace")), fix=value.get("fix"))
        return value
