"""Processes that share a cache, what can be done to their servers meanwhile, and whether they agree afterwards."""

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis

from headrace.cache.codec import Codec, Envelope
from headrace.cache.topology import slot_of
from tests.redis_servers import CLOCK, RedisCluster, RedisServer

PROGRAM = Path(__file__).parent / "faults/cache/coherence_process.py"
UNHEARD_S = 1.2
"""A little more than `degraded_ttl`: copies that the shared tier could not confirm have gone stale after it."""
pause = threading.Event().wait

Fetch = Callable[[str], bytes | None]


@dataclass
class Report:
    """What a fleet did, and in what its processes differ from the shared tier."""

    operations: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    faults: int = 0
    compared: int = 0
    differences: list[str] = field(default_factory=list)


class Fleet:
    """Three processes on one shared tier, two of them writers; `timeout_s` is theirs for a call, if it is not the
    usual one."""

    def __init__(self, url: str, *, fetch: Fetch, timeout_s: float | None = None) -> None:
        patience = [] if timeout_s is None else [str(timeout_s)]
        self._fetch = fetch
        self._codec = Codec()
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(PROGRAM), url, str(number), role, *patience],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number, role in enumerate(["writer", "writer", "reader"])
        ]
        for process in self.processes:
            self._answer(process)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def run(self, operations: int, *, faults: Callable[[], None] | None = None, every_s: float = 0.1) -> Report:
        """So many operations in all, four fifths of them with faults on the way; a comparison after either part.

        While servers are away operations are quick and leave little to compare, hence the quiet fifth.
        """
        report = Report()
        share = operations // len(self.processes)
        self._tell({"do": "run", "operations": share - share // 5})
        with _repeated(faults, every_s) as count:
            self._collect(report)
        report.faults = count[0]
        self._compare(report)
        self._run_quietly(share // 5, report)
        return report

    def _run_quietly(self, share: int, report: Report) -> None:
        # The last operation may be any, and after a `clear` there is nothing to compare.
        self._tell({"do": "run", "operations": share, "without": ["clear"]})
        self._collect(report)
        self._compare(report)

    def run_through(self, ordeal: Callable[[], AbstractContextManager[None]], operations: int = 0) -> Report:
        """Operations from before the beginning to after the end of what happens to the servers, and then so many more.

        It does not end before every operation that was under way in it has ended, and each writer was told an error. A
        slow machine does little in that time, and leaves little to compare.
        """
        report = Report()
        self._tell({"do": "run_until_told"})
        pause(0.5)
        with ordeal():
            self._tell({"do": "meet"})
            for process in self.processes:
                self._answer(process)
        pause(0.5)
        self._tell({"do": "stop"})
        self._collect(report)
        self._compare(report)
        if operations:
            self._run_quietly(operations // len(self.processes), report)
        return report

    def _tell(self, command: dict[str, object]) -> None:
        for process in self.processes:
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> dict[str, object]:
        line = process.stdout.readline()
        assert line, f"process {process.pid} ended with {process.wait()}"
        return json.loads(line)

    def _collect(self, report: Report) -> None:
        for process in self.processes:
            answer = self._answer(process)
            report.operations += sum(answer["done"].values())
            report.errors.update(answer["errors"])
            report.slowest_s = max(report.slowest_s, answer["slowest_s"])

    def _compare(self, report: Report) -> None:
        for _ in range(2):  # the second time nobody has anything left to deliver that others have to hear of
            self._tell({"do": "settle"})
            for process in self.processes:
                self._answer(process)
        pause(UNHEARD_S)
        # Reading fills memory from the shared tier where it holds nothing fresh: what it held is looked at before.
        for question in ("dump", "read", "dump"):
            self._tell({"do": question})
            for number, process in enumerate(self.processes):
                for key, value in self._answer(process).items():
                    report.compared += 1
                    if value != (shared := self._shared(key)):
                        report.differences.append(f"{question}: process {number} has {key}={value}, not {shared}")

    def _shared(self, key: str) -> object:
        """What the shared tier answers for a key, read without the cache."""
        generation = self._fetch("headrace:@generation") or b""
        data = self._fetch(f"headrace:{generation.decode()}:{{{key}}}")
        found = self._codec.open(key, data) if data is not None else None
        if not isinstance(found, Envelope):
            return None
        valid = all(self._fetch(f"headrace:@tag:{tag}") == token for tag, token in found.tags)
        return found.value if valid else None


@contextmanager
def _repeated(act: Callable[[], None] | None, every_s: float) -> Iterator[list[int]]:
    """Do something again and again in a thread; how often it was done so far."""
    count = [0]
    is_over = threading.Event()

    def go_on() -> None:
        while act is not None:
            act()
            count[0] += 1
            if is_over.wait(every_s):
                return

    with ThreadPoolExecutor(max_workers=1) as pool:
        acting = pool.submit(go_on)
        try:
            yield count
        finally:
            is_over.set()
        acting.result()  # a fault that could not be made is a failure of its own


def fetch_from(server: RedisServer) -> Fetch:
    """Reads the server's own data."""
    client = server.client()
    return lambda name: client.get(name)


def fetch_from_cluster(cluster: RedisCluster) -> Fetch:
    """Reads from whoever serves the slot."""
    return lambda name: cluster.owner(slot_of(name.encode())).call("GET", name)


def kill_tracking(server: RedisServer) -> None:
    """Cut every connection that the server tells changes to."""
    _kill(server, lambda flags: "t" in flags)


def kill_calls(server: RedisServer) -> None:
    """Cut every connection that the processes call over."""
    _kill(server, lambda flags: "t" not in flags)


def _kill(server: RedisServer, is_wanted: Callable[[str], bool]) -> None:
    with server.client() as client:
        for line in client.client_list():
            if line["name"] == "headrace" and is_wanted(line["flags"]):
                try:
                    client.client_kill_filter(_id=line["id"])
                except redis.ResponseError:
                    continue  # it ended by itself


def restart(server: RedisServer) -> None:
    """kill -9, and an empty server at the same address."""
    server.stop()
    server.start()


@contextmanager
def stopped(server: RedisServer, seconds: float) -> Iterator[None]:
    """No server for so long, and for the block."""
    server.stop()
    pause(seconds)
    yield
    server.start()


class SlotMoves:
    """Moves one slot of a cluster after another from primary to primary, with the keys in it."""

    def __init__(self, cluster: RedisCluster, keys: list[str]) -> None:
        self._cluster = cluster
        self._slots = sorted({slot_of(f"{{{key}}}".encode()) for key in keys})
        self._next = 0

    def __call__(self) -> None:
        slot = self._slots[self._next % len(self._slots)]
        self._next += 1
        owner = self._cluster.owner(slot)
        targets = [server for server in primaries(self._cluster) if server is not owner]
        self._cluster.move(slot, targets[self._next % len(targets)])


def primaries(cluster: RedisCluster) -> list[RedisServer]:
    """Who serves slots now."""
    alive = [server for server in cluster.servers if server.process is not None]
    ports = {port for _, _, (_, port, *_), *_ in alive[0].call("CLUSTER", "SLOTS")}
    return [server for server in alive if server.port in ports]


def fail_over(cluster: RedisCluster) -> None:
    """A replica takes over from a living primary."""
    leaders = primaries(cluster)
    replica = next(server for server in cluster.servers if server not in leaders)
    deadline = CLOCK.monotonic() + 20
    replica.call("CLUSTER", "FAILOVER")
    while replica not in primaries(cluster):
        assert CLOCK.monotonic() < deadline, "the replica did not take over"
        pause(0.05)
    cluster.primaries = primaries(cluster)
    cluster.replicas = [server for server in cluster.servers if server not in cluster.primaries]
