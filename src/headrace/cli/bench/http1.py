"""As much HTTP/1.1 as a client that counts microseconds needs: one endpoint, one request head, one answer at a time.

Source: RFC 9112. No TLS, no pipelining, no trailers kept.
"""

from dataclasses import dataclass
from urllib.parse import urlsplit

from headrace.errors import BenchFailed, ConfigError

HEAD_BYTES_MAX = 64 * 1024
CHUNK_LINE_BYTES_MAX = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a server listens."""

    host: str
    """Name or address, without brackets."""
    port: int
    """TCP port."""

    @classmethod
    def parse(cls, url: str) -> "Endpoint":
        """Read `http://host:port`; ConfigError for anything that is not exactly that."""
        parts = urlsplit(url)
        fix = "Give the server as `http://host:port`; TLS is the business of whatever stands in front of it."
        try:
            port = parts.port or 80
        except ValueError as error:
            raise ConfigError(f"The URL {url!r} has an unusable port: {error}.", fix=fix) from None
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError(f"The URL {url!r} is not plain HTTP with a host.", fix=fix)
        if parts.path not in {"", "/"} or parts.query or parts.fragment or parts.username:
            raise ConfigError(f"The URL {url!r} has more than a host and a port.", fix=fix)
        return cls(host=parts.hostname, port=port)

    @property
    def authority(self) -> str:
        """`host:port` as the Host header wants it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def request_bytes(endpoint: Endpoint, method: str, path: str, *, body: bytes | None, headers: dict[str, str]) -> bytes:
    """The request as it goes onto the wire; a body is sent as JSON with its length."""
    lines = [f"{method} {path} HTTP/1.1", f"host: {endpoint.authority}", "user-agent: headrace-bench"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body is not None:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


class ResponseParser:
    """Reads one answer after the other from a connection that has at most one request in flight.

    The usual answer comes whole in one read and has the very head of the one before it, since a server's Date changes
    once a second: then its meaning is known and nothing is parsed.
    """

    __slots__ = (
        "_body",
        "_buffer",
        "_chunked",
        "_head",
        "_in_body",
        "_keep_body",
        "_length",
        "_remaining",
        "keep_alive",
        "status",
    )

    def __init__(self, *, keep_body: bool = False) -> None:
        self._keep_body = keep_body
        self.reset()

    def reset(self) -> None:
        """Forget a half-read answer: the connection is a new one."""
        self.status = 0
        """Status code of the latest answer."""
        self.keep_alive = True
        """Whether the connection may carry another request after the latest answer."""
        self._buffer = b""
        self._body: list[bytes] = []
        self._in_body = False
        self._head = b""
        self._length = 0
        self._chunked = False
        self._remaining = 0

    @property
    def body(self) -> bytes:
        """Body of the latest complete answer; empty unless it was asked for."""
        return b"".join(self._body)

    def feed(self, data: bytes) -> bool:
        """Take what was read; True when the answer is complete. BenchFailed when it is not HTTP/1.1."""
        if not self._in_body:
            if self._buffer:
                data = self._buffer + data
                self._buffer = b""
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > HEAD_BYTES_MAX:
                    raise BenchFailed(f"An answer's head is larger than {HEAD_BYTES_MAX} bytes.")
                self._buffer = data
                return False
            head = data[:end]
            if head != self._head:
                self._read_head(head.lower())
                self._head = head
            if self._length == len(data) - end - 4 and self.status >= 200 and not self._keep_body:
                return True
            data = data[end + 4 :]
            if self.status < 200:
                return self.feed(data) if data else False
            self._in_body = True
            self._remaining = self._length
            self._body.clear()
        return self._read_chunks(data) if self._chunked else self._read_plain(data)

    def finish(self) -> bool:
        """The server closed the connection; True when that is how this answer says that it is complete."""
        complete = self._in_body and not self._chunked and self._remaining < 0
        self._in_body = False
        return complete

    def _read_head(self, head: bytes) -> None:
        """What the lower-cased head means; `_length` of -1 is a body without one: chunked, or up to the end."""
        if not head.startswith(b"http/1."):
            raise BenchFailed(f"An answer is not HTTP/1.1: it begins with {head[:60]!r}.")
        at = head.find(b"\r\ncontent-length:")
        end = head.find(b"\r\n", at + 17)
        try:
            self.status = int(head[9:12])
            self._length = int(head[at + 17 : end if end >= 0 else len(head)]) if at >= 0 else -1
        except ValueError as error:
            raise BenchFailed(f"An answer's head is not HTTP/1.1: {error}.") from None
        self._chunked = b"\r\ntransfer-encoding: chunked" in head
        if self.status < 200 or self.status in {204, 304}:
            self._length, self._chunked = 0, False
        elif self._chunked:
            self._length = -1
        delimited = self._length >= 0 or self._chunked
        persistent = head[7:8] == b"1" or b"\r\nconnection: keep-alive" in head
        self.keep_alive = delimited and persistent and b"\r\nconnection: close" not in head

    def _read_plain(self, data: bytes) -> bool:
        if self._keep_body and data:
            self._body.append(data)
        if self._remaining < 0:
            return False
        self._remaining -= len(data)
        if self._remaining < 0:
            raise BenchFailed(f"An answer is {-self._remaining} bytes longer than its Content-Length.")
        self._in_body = self._remaining > 0
        return not self._in_body

    def _read_chunks(self, data: bytes) -> bool:
        """`_remaining` counts the current chunk with its final CRLF; below 0: a chunk-size line comes next."""
        data = self._buffer + data
        while True:
            if self._remaining > 0:
                take = min(self._remaining, len(data))
                if self._keep_body and self._remaining > 2:
                    self._body.append(data[: min(take, self._remaining - 2)])
                self._remaining -= take
                data = data[take:]
                if self._remaining > 0:
                    self._buffer = b""
                    return False
            end = data.find(b"\r\n")
            if end < 0:
                if len(data) > CHUNK_LINE_BYTES_MAX:
                    raise BenchFailed(f"A chunk's size line is longer than {CHUNK_LINE_BYTES_MAX} bytes.")
                self._buffer = data
                return False
            size = self._chunk_size(data[:end])
            if size == 0:
                return self._finish_chunks(data, end)
            self._remaining = size + 2
            data = data[end + 2 :]

    def _finish_chunks(self, data: bytes, end: int) -> bool:
        """After the last chunk: an empty line, or trailers up to one."""
        if data.find(b"\r\n\r\n", end) < 0:
            if len(data) > HEAD_BYTES_MAX:
                raise BenchFailed(f"An answer's trailers are larger than {HEAD_BYTES_MAX} bytes.")
            self._buffer = data
            return False
        self._buffer = b""
        self._in_body = False
        return True

    @staticmethod
    def _chunk_size(line: bytes) -> int:
        try:
            return int(line.partition(b";")[0], 16)
        except ValueError:
            raise BenchFailed(f"A chunk's size line is not a hexadecimal number: {line[:40]!r}.") from None
