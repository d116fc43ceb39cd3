"""A Redis in memory, its connections, and an event loop whose idle moments decide what happens next.

Everything above the socket is the real thing: `Pipeline`, `Wire`, the protocol, tracking, leases. Each connection is
two queues, to the server and back. Whenever the loop has nothing left to run, one thing that could happen does, drawn
from a seeded generator: a command is carried out, a reply or a push arrives, an actor goes on, or time passes. So a
run is a function of its seed, and a second of simulated silence costs nothing.
"""

import asyncio
import fnmatch
import random
import selectors
from collections import deque
from collections.abc import Callable

import hiredis

from headrace.cache import exchange, lease
from headrace.cache.pipeline import Wire

OK = b"+OK\r\n"
NIL = b"_\r\n"
TRACED_MAX = 90
TIMER_FIRST = 0.03
"""How often time passes although something else could happen: timers must fire in the middle of things too."""

Step = Callable[[], str]
"""Does one thing and says what it was."""


class IdleLoop(asyncio.SelectorEventLoop):
    """An event loop in simulated time; `idle(seconds)` is called instead of waiting."""

    def __init__(self, idle: Callable[[float | None], None]) -> None:
        super().__init__(IdleSelector(idle))
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor, func, *arguments):
        """In the calling thread: another one would bring its own time."""
        future = self.create_future()
        future.set_result(func(*arguments))
        return future


class IdleSelector(selectors.SelectSelector):
    """Never waits for sockets: there are none."""

    def __init__(self, idle: Callable[[float | None], None]) -> None:
        super().__init__()
        self._idle = idle

    def select(self, timeout: float | None = None) -> list:
        if timeout is None or timeout > 0:
            self._idle(timeout)
        return []


class LoopClock:
    """The loop's time as a Clock."""

    def __init__(self, loop: IdleLoop) -> None:
        self._loop = loop
        self.monotonic = loop.time

    def wall(self) -> float:
        return 1_700_000_000.0 + self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Connection:
    """The server's end of a connection, and the transport and the link of the client's end."""

    def __init__(self, server: "SimulatedRedis", label: str, wire: Wire) -> None:
        self.server = server
        self.label = label
        self.wire = wire
        self.prefix: bytes | None = None
        self.is_open = True
        self._reader = hiredis.Reader()
        self.commands: deque[list[bytes]] = deque()
        self.replies: deque[bytes] = deque()

    def write(self, data: bytes) -> None:
        self._reader.feed(data)
        while (command := self._reader.gets()) is not False:
            self.commands.append(command)

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        self.close()

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.server.connections.remove(self)

    def carry_out(self) -> str:
        command = self.commands.popleft()
        self.replies.append(self.server.reply(self, command))
        return f"{self.label} -> {b' '.join(command[:3])[:TRACED_MAX]!r}"

    def deliver(self) -> str:
        reply = self.replies.popleft()
        self.wire.data_received(reply)
        return f"{self.label} <- {reply[:TRACED_MAX]!r}"

    def kill(self) -> str:
        """What the server has not read is lost, and so is what the client has not read."""
        self.close()
        self.wire.connection_lost(None)
        return f"{self.label} is cut ({'tracking' if self.prefix else 'calls'})"


class SimulatedRedis:
    """The commands that the cache uses, with RESP3 replies and broadcast tracking."""

    def __init__(self, now: Callable[[], float], written: Callable[[bytes, bytes], None]) -> None:
        self._now = now
        self._written = written
        self.data: dict[bytes, tuple[bytes, float | None]] = {}
        self.connections: list[Connection] = []
        scripts = {
            "COMMIT": lease.COMMIT,
            "RELEASE": lease.RELEASE,
            "RENEW": lease.RENEW,
            "SWAP": exchange.SWAP,
        }
        self._scripts = {script._digest.encode(): name for name, script in scripts.items()}

    def steps(self) -> list[Step]:
        """What could happen next between the server and its clients."""
        carried = [connection.carry_out for connection in self.connections if connection.commands]
        return carried + [connection.deliver for connection in self.connections if connection.replies]

    def flush(self) -> str:
        self.data.clear()
        for connection in self.connections:
            if connection.prefix is not None:
                connection.replies.append(b">2\r\n$10\r\ninvalidate\r\n" + NIL)
        return "FLUSHALL"

    def get(self, name: bytes) -> bytes | None:
        value, expires_at = self.data.get(name, (None, None))
        if expires_at is not None and expires_at <= self._now():
            self._remove(name)
            return None
        return value

    def reply(self, connection: Connection, command: list[bytes]) -> bytes:
        name, *arguments = command
        match name:
            case b"PING":
                return b"+PONG\r\n"
            case b"CLIENT":
                connection.prefix = arguments[-1]
                return OK
            case b"GET":
                return _bulk(self.get(arguments[0]))
            case b"MGET":
                return _array([_bulk(self.get(each)) for each in arguments])
            case b"GETRANGE":
                return _bulk((self.get(arguments[0]) or b"")[int(arguments[1]) : int(arguments[2]) + 1])
            case b"SET":
                return self._set(*arguments)
            case b"UNLINK" | b"DEL":
                return b":%d\r\n" % sum(self._remove(each) for each in arguments if self.get(each) is not None)
            case b"SCAN":
                names = [each for each in self.data if fnmatch.fnmatchcase(each, arguments[2].replace(b"[^", b"[!"))]
                return _array([_bulk(b"0"), _array([_bulk(each) for each in names])])
            case b"EVALSHA":
                keys = 2 + int(arguments[1])
                return b":%d\r\n" % self._run(self._scripts[arguments[0]], arguments[2:keys], arguments[keys:])
        raise AssertionError(f"the cache sent {command!r}, which is not simulated")

    def _run(self, script: str, keys: list[bytes], arguments: list[bytes]) -> int:
        if script == "SWAP":
            return self._swap(keys, *arguments[:4], tokens=arguments[4:])
        if self.get(keys[-1]) != arguments[0]:
            return 0
        if script == "RENEW":
            self.data[keys[0]] = (arguments[0], self._now() + int(arguments[1]) / 1000)
            return 1
        self._remove(keys[-1])
        if script == "COMMIT":
            self._set(keys[0], arguments[1], *([b"PX", arguments[2]] if arguments[2] else []))
        return 1

    def _swap(
        self, keys: list[bytes], head: bytes, data: bytes, life: bytes, last: bytes, *, tokens: list[bytes]
    ) -> int:
        entry, lease_name, *names = keys
        if [self.get(name) for name in names] != tokens or (self.get(entry) or b"")[: int(last) + 1] != head:
            return 0
        if self.get(lease_name) is not None:
            self._remove(lease_name)
        self._set(entry, data, *([b"PX", life] if life else []))
        return 1

    def _set(self, name: bytes, value: bytes, *options: bytes) -> bytes:
        if b"NX" in options and self.get(name) is not None:
            return NIL
        expires_at = self._now() + int(options[-1]) / 1000 if b"PX" in options else None
        self.data[name] = (value, expires_at)
        self._written(name, value)
        self._push(name)
        return OK

    def _remove(self, name: bytes) -> bool:
        del self.data[name]
        self._push(name)
        return True

    def _push(self, name: bytes) -> None:
        for connection in self.connections:
            if connection.prefix is not None and name.startswith(connection.prefix):
                connection.replies.append(b">2\r\n$10\r\ninvalidate\r\n" + _array([_bulk(name)]))


class Idleness:
    """What an idle loop does: one of the steps that could be next, or the passing of time."""

    def __init__(
        self, rng: random.Random, steps: Callable[[], list[Step]], *, kind: type[IdleLoop] = IdleLoop
    ) -> None:
        self._rng = rng
        self._steps = steps
        self.loop = kind(self._next)
        self.trace: list[str] = []

    def _next(self, timeout: float | None) -> None:
        steps = self._steps()
        if steps and (timeout is None or self._rng.random() >= TIMER_FIRST):
            self.trace.append(self._rng.choice(steps)())
            return
        assert timeout is not None, "everybody waits for somebody else"
        self.loop.now += timeout + 1e-9  # a timer that is due by a rounding error would never come


def _bulk(value: bytes | None) -> bytes:
    return NIL if value is None else b"$%d\r\n%b\r\n" % (len(value), value)


def _array(items: list[bytes]) -> bytes:
    return b"*%d\r\n%b" % (len(items), b"".join(items))
