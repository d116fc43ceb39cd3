"""A shared cache tier that fails on demand, for the tests of those who depend on one.

A front stands before a real Redis and passes everything on until it is told otherwise. It reads just enough of the
protocol to know commands by name. An error is not made up on the way back, where it would have to find its place among
the replies of a pipeline: the refused command is replaced by a script that answers with that error, so that the server
itself puts it in the right place.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from headrace.clock import Clock
from headrace.errors import CacheUnavailable, CallerError, ConfigError
from headrace.testing.faults import Connection, Passage, TcpProxy

if TYPE_CHECKING:
    from headrace.cache.portal import Portal

T = TypeVar("T")

WAIT_MAX_S = 10.0
"""How long the server may take for what is asked of it behind the client's back."""

_GROWS: Final = frozenset(
    {"APPEND", "EVAL", "EVALSHA", "GETSET", "INCR", "INCRBY", "MSET", "PSETEX", "SET", "SETEX", "SETNX", "SETRANGE"}
)
_WRITES: Final = _GROWS | {"DEL", "DELEX", "DELIFEQ", "EXPIRE", "FLUSHALL", "FLUSHDB", "GETDEL", "PEXPIRE", "UNLINK"}
_GREETING: Final = frozenset({"AUTH", "CLIENT", "HELLO", "SELECT"})
"""What a server that answers anything at all answers; spared unless it is named."""
_ERRORS: Final[dict[str, tuple[str, frozenset[str]]]] = {
    "BUSY": ("Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.", frozenset()),
    "LOADING": ("Redis is loading the dataset in memory", frozenset()),
    "MASTERDOWN": ("Link with MASTER is down and replica-serve-stale-data is set to 'no'.", frozenset()),
    "MISCONF": ("Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.", _WRITES),
    "NOAUTH": ("Authentication required.", frozenset()),
    "NOPERM": ("this user has no permissions to run this command", frozenset()),
    "OOM": ("command not allowed when used memory > 'maxmemory'.", _GROWS),
    "READONLY": ("You can't write against a read only replica.", _WRITES),
}
_REFUSE: Final = b"return redis.error_reply(ARGV[1])"


class ChaosRemote:
    """A Redis that is slow, silent, gone, emptied, torn or full when it is told to be, and well when it is not.

        async with ChaosRemote("redis://127.0.0.1:6379/0") as chaos:
            async with Cache(remote=RemoteConfig(url=chaos.url)) as cache:
                chaos.gone()
                assert await load_page(cache) == "the page"
                chaos.heal()

    In a plain test `with` does the same, for a `SyncCache` or any other client. What is told holds for connections
    that are there and those that come, until `heal`; several things may hold at once. The Redis behind is real and
    keeps what it has; its user must be allowed EVAL for `refuse`. `url` is `redis://` or `unix://`. With `async with`,
    all methods belong to that event loop.
    """

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"redis", "unix"}:
            raise ConfigError(
                f"ChaosRemote stands before a URL of redis:// or unix://, and this one is {parts.scheme[:20]!r}.",
                fix="Test against one plain Redis: a cluster's nodes and a TLS connection cannot be looked into.",
            )
        self._parts = parts
        self._clock = clock
        self._front: _Front | None = None
        self._portal: Portal | None = None
        """The way to the event loop, when this was entered without one."""
        self._leave: Callable[[], None] = lambda: None
        self._flushes: set[asyncio.Task[None]] = set()
        self._failed: BaseException | None = None

    # -- life ---------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop()

    def __enter__(self) -> Self:
        from headrace.cache.portal import PORTAL  # the pytest plugin imports this module and must not load the cache

        loop = PORTAL.hold()
        self._leave = lambda: PORTAL.release(loop, wait=True)
        try:
            PORTAL.run(self._start(), wait_max_s=WAIT_MAX_S)
        except BaseException:
            self._leave()
            raise
        self._portal = PORTAL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._portal is not None
        try:
            self._portal.run(self._stop(), wait_max_s=WAIT_MAX_S)
        finally:
            self._portal = None
            self._leave()

    async def _start(self) -> None:
        parts = self._parts
        upstream = unquote(parts.path) if parts.scheme == "unix" else f"{parts.hostname}:{parts.port or 6379}"
        self._front = _Front(upstream, clock=self._clock)
        await self._front.start()

    async def _stop(self) -> None:
        if self._flushes:
            await asyncio.wait(self._flushes)
        await self._its_front.stop()
        self._front = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    @property
    def _its_front(self) -> "_Front":
        if self._front is None:
            raise CallerError("This ChaosRemote is not open.", fix="Use it inside `with` or `async with`.")
        return self._front

    @property
    def url(self) -> str:
        """Where the cache under test connects to, with the user and database of the server's own URL."""
        parts = self._parts
        user = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
        path, query = parts.path, parts.query
        if parts.scheme == "unix":
            options = dict(parse_qsl(parts.query))
            path, query = f"/{options.pop('db', '0')}", urlencode(options)
        return f"redis://{user}{self._its_front.address}{path}{f'?{query}' if query else ''}"

    @property
    def commands(self) -> "Counter[str]":
        """How many commands have come so far, by name: `commands["GET"]`."""
        return Counter(self._its_front.commands)

    @property
    def refused(self) -> int:
        """How many of them were refused."""
        return self._its_front.refused

    # -- faults -------------------------------------------------------------------------------------------------------

    def slow(self, seconds: float) -> None:
        """Everything takes so long, each way."""
        self._do(lambda front: front.delay(seconds))

    def silent(self) -> None:
        """Nothing passes any more and nobody is told; connections stay open. What is held up arrives after `heal`."""
        self._do(lambda front: front.deaf())

    def gone(self) -> None:
        """Connections are reset, and so is every new one."""
        self._do(lambda front: front.go())

    def cut(self) -> None:
        """Connections are reset; new ones are welcome."""
        self._do(lambda front: front.cut())

    def tear(self, *, after_bytes: int = 1) -> None:
        """Connections are reset in the middle of a reply: when this many more bytes have reached the client."""
        if after_bytes < 1:
            raise CallerError(f"tear(after_bytes={after_bytes}): it must be at least 1; `cut` resets at once.")
        self._do(lambda front: front.cut(after_bytes=after_bytes))

    def lose_tracking(self) -> None:
        """Whoever is told of changes (CLIENT TRACKING) is cut off and refused; all other calls are answered."""
        self._do(lambda front: front.lose_tracking())

    def refuse(self, *commands: str, error: str = "OOM", times: int | None = None) -> None:
        """Answer commands with an error instead of carrying them out.

        `commands` are names, such as "GET" or "CLIENT TRACKING"; without any, it is those that the server itself would
        refuse: what writes for OOM, READONLY and MISCONF, else everything after a connection is set up. `error` is one
        of these, BUSY, LOADING, MASTERDOWN, NOAUTH or NOPERM, which get the server's own words, or a whole error
        message. `times`: how many are refused; None: all until `heal`.
        """
        words, usual = _ERRORS.get(error, (None, frozenset[str]()))
        text = error if words is None else f"{error} {words}"
        if not text or not text.isprintable():
            raise CallerError(f"refuse(error={error!r}): an error is one line of text.")
        if times is not None and times < 1:
            raise CallerError(f"refuse(times={times}): it must be at least 1, or None for all.")
        refusal = _Refusal(frozenset(name.upper() for name in commands) or usual, text.encode(), times)
        self._do(lambda front: front.refusals.append(refusal))

    def flush(self) -> None:
        """Empty the whole server, as FLUSHALL or a restart without a disk does. No later call gets there before it.

        If the server cannot be emptied, CacheUnavailable is raised: here by `with`, at its end by `async with`.
        """
        front = self._its_front
        if self._portal is not None:
            self._portal.run(self._flush(front), wait_max_s=WAIT_MAX_S)
            return
        flush = asyncio.get_running_loop().create_task(self._flush(front))
        front.to_server.hold(flush)
        self._flushes.add(flush)
        flush.add_done_callback(self._settle)

    def heal(self) -> None:
        """All is well, and what was held up arrives; connections that were reset stay so."""
        self._do(lambda front: front.heal())

    def _do(self, change: Callable[["_Front"], T]) -> T:
        """Carry out a change where the front lives."""
        front = self._its_front
        if self._portal is None:
            return change(front)

        async def there() -> T:
            return change(front)

        return self._portal.run(there(), wait_max_s=WAIT_MAX_S)

    def _settle(self, flush: "asyncio.Task[None]") -> None:
        self._its_front.to_server.let_go(flush)
        self._flushes.discard(flush)
        if not flush.cancelled():
            self._failed = self._failed or flush.exception()

    async def _flush(self, front: "_Front") -> None:
        user, password = (unquote(part or "") for part in (self._parts.username, self._parts.password))
        commands = [("AUTH", *((user,) if user else ()), password)] if password else []
        try:
            async with asyncio.timeout(WAIT_MAX_S / 2):
                reader, writer = await front.connect()
                try:
                    for command in [*commands, ("FLUSHALL",)]:
                        writer.write(_packed(*(part.encode() for part in command)))
                        reply = await reader.readline()
                        if not reply.startswith(b"+OK"):
                            raise CacheUnavailable(
                                f"The server could not be flushed: {reply.decode(errors='replace').strip()!r}."
                            )
                finally:
                    writer.close()
        except (OSError, TimeoutError) as error:
            raise CacheUnavailable(f"The server could not be flushed: {error!r}.") from error


@dataclass(slots=True)
class _Refusal:
    """Commands that are answered with an error. No names: all but the greeting."""

    commands: frozenset[str]
    error: bytes
    left: int | None

    def covers(self, name: str, full_name: str) -> bool:
        if not self.commands:
            return name not in _GREETING
        return name in self.commands or full_name in self.commands


class _Front(TcpProxy):
    """A proxy that knows commands."""

    def __init__(self, upstream: str, *, clock: Clock | None) -> None:
        super().__init__(upstream, clock=clock)
        self.refusals: list[_Refusal] = []
        self.commands: Counter[str] = Counter()
        self.refused = 0
        self._is_gone = False
        self._tracking: set[Connection] = set()

    def go(self) -> None:
        self._is_gone = True
        self.cut()

    def lose_tracking(self) -> None:
        self.refusals.append(_Refusal(frozenset({"CLIENT TRACKING"}), b"ERR the tracking channel was lost", None))
        for connection in self._tracking & self._connections:
            connection.cut()
        self._tracking.clear()

    def heal(self) -> None:
        """As of a proxy, and nothing is refused any more."""
        super().heal()
        self._is_gone = False
        self.refusals.clear()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the server, past all faults."""
        return await super()._connect()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._is_gone:
            raise ConnectionRefusedError
        return await super()._connect()

    def _requests(self, connection: Connection) -> Passage:
        frames = _Frames()
        return lambda data: (b"".join(self._admit(connection, *frame) for frame in frames.feed(data)), False)

    def _admit(self, connection: Connection, words: list[bytes], frame: bytes) -> bytes:
        """What the server gets for a command."""
        name, *more = (word.decode(errors="replace").upper() for word in words[:2])
        full_name = " ".join([name, *more])
        self.commands[name] += 1
        refusal = next((each for each in self.refusals if each.covers(name, full_name)), None)
        if refusal is None:
            if full_name == "CLIENT TRACKING":
                self._tracking.add(connection)
            return frame
        self.refused += 1
        if refusal.left is not None:
            refusal.left -= 1
            if not refusal.left:
                self.refusals.remove(refusal)
        return _packed(b"EVAL", _REFUSE, b"0", refusal.error)


class _Frames:
    """Cuts a stream of requests into commands: arrays of strings, as every client sends them."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[tuple[list[bytes], bytes]]:
        """The words and the bytes of each command that is complete now."""
        buffer, start = self._buffer + data, 0
        commands = []
        while (found := _command(buffer, start)) is not None:
            words, end = found
            if words:
                commands.append((words, buffer[start:end]))
            start = end
        self._buffer = buffer[start:]
        return commands


def _command(buffer: bytes, start: int) -> tuple[list[bytes], int] | None:
    """The words of the command that begins at `start`, and where it ends; None: it is not complete."""
    line = _line(buffer, start)
    if line is None:
        return None
    head, position = line
    if not head.startswith(b"*"):
        return head.split(), position
    words = []
    for _ in range(int(head[1:])):
        line = _line(buffer, position)
        if line is None:
            return None
        length, begin = int(line[0][1:]), line[1]
        position = begin + length + 2
        if len(buffer) < position:
            return None
        words.append(buffer[begin : begin + length])
    return words, position


def _line(buffer: bytes, start: int) -> tuple[bytes, int] | None:
    end = buffer.find(b"\r\n", start)
    return None if end < 0 else (buffer[start:end], end + 2)


def _packed(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)
