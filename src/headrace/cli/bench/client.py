"""A client for the calls around the load: deploying, asking for health, timing one request at a time."""

import asyncio
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import msgspec

from headrace.cli.bench.http1 import Endpoint, ResponseParser, request_bytes
from headrace.clock import Clock
from headrace.errors import BenchFailed

ANSWER_BYTES_MAX = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A complete answer."""

    status: int
    """HTTP status code."""
    body: bytes
    """As sent."""
    seconds: float
    """From the first byte of the request to the last of the answer, on a connection that was open already."""

    def json(self) -> Any:
        """The body, decoded; BenchFailed when it is not JSON."""
        try:
            return msgspec.json.decode(self.body)
        except msgspec.DecodeError as error:
            raise BenchFailed(f"The server answered {self.body[:200]!r}, which is not JSON: {error}.") from None


class Client:
    """One keep-alive connection: `async with Client(url, ...) as client`."""

    def __init__(self, url: str, *, clock: Clock, token: str | None = None, timeout_s: float = 30.0) -> None:
        self._endpoint = Endpoint.parse(url)
        self._clock = clock
        self._headers = authorization(token)
        self._timeout_s = timeout_s
        self._parser = ResponseParser(keep_body=True)

    async def __aenter__(self) -> Self:
        """Connect; BenchFailed when nobody listens."""
        host, port = self._endpoint.host, self._endpoint.port
        try:
            async with asyncio.timeout(self._timeout_s):
                self._reader, self._writer = await asyncio.open_connection(host, port)
        except (OSError, TimeoutError) as error:
            raise BenchFailed(f"No connection to {self._endpoint.authority}: {str(error) or 'timed out'}.") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Disconnect."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            return  # the other side was faster

    async def request(self, method: str, path: str, payload: object = None, *, expect: int = 200) -> Answer:
        """Send one request, `payload` as JSON, and read its answer; BenchFailed when the status is not `expect`."""
        body = None if payload is None else msgspec.json.encode(payload)
        request = request_bytes(self._endpoint, method, path, body=body, headers=self._headers)
        start = self._clock.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                self._writer.write(request)
                await self._read_answer()
        except TimeoutError:
            raise BenchFailed(f"{method} {path} was not answered within {self._timeout_s:.0f} s.") from None
        except OSError as error:
            raise BenchFailed(f"{method} {path} failed: {error}.") from error
        seconds = self._clock.monotonic() - start
        answer = Answer(status=self._parser.status, body=self._parser.body, seconds=seconds)
        if answer.status != expect:
            raise BenchFailed(
                f"{method} {path} was answered with {answer.status} instead of {expect}: {answer.body[:500]!r}."
            )
        return answer

    async def _read_answer(self) -> None:
        received = 0
        while True:
            data = await self._reader.read(65536)
            if not data:
                if self._parser.finish():
                    return
                raise ConnectionResetError("the server closed the connection before the end of its answer")
            received += len(data)
            if received > ANSWER_BYTES_MAX:
                raise BenchFailed(f"An answer is larger than {ANSWER_BYTES_MAX} bytes.")
            if self._parser.feed(data):
                return


def authorization(token: str | None) -> dict[str, str]:
    """The header that a server with a token asks for."""
    return {} if token is None else {"authorization": f"Bearer {token}"}
