"""What a supervisor asks of an embedded server, and the short way to run one for a test or a benchmark."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from headrace.clock import Clock, SystemClock
from headrace.embedded.directory import DirectoryLock
from headrace.embedded.failure import failure

_PAUSE_S = 0.01
_LOG_LINES = 20


class Server(Protocol):
    """One embedded server process.

    Its life is `prepare`, `spawn`, `is_ready` until it is, `stop`; after the process has died by itself, `prepare` and
    `spawn` again. Whoever does this holds the `DirectoryLock` of the directory or of one above it, because `prepare`
    ends every server that it finds at work there. Nothing here needs an event loop; all of it blocks.
    """

    name: str
    """What people call it: `redis`, `shard-0`."""
    directory: Path
    """Holds everything of this server and of no other."""

    def prepare(self) -> None:
        """Make directories, data and configuration; clear away what a killed run left. Cheap when all is there.

        Raises DirectoryUnusable when the directory is read-only, full, unreachable or of another version, and
        EmbeddedServerFailed when the programs are missing or fail.
        """

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the process and return at once. The caller's thread must live as long as the server shall."""

    def is_ready(self) -> bool:
        """Whether it answers a query now; False for every way of not yet doing so. Takes at most a few seconds."""

    def stop(self, process: subprocess.Popen[bytes], *, timeout_s: float = 10.0) -> None:
        """End it cleanly within `timeout_s`, else by force, and reap it. Does nothing to one that has ended."""

    def log_tail(self, lines: int = 20) -> str:
        """The end of what it wrote since `spawn`."""

    @property
    def url(self) -> str:
        """Where clients connect; known before the server runs."""


AnyServer = TypeVar("AnyServer", bound=Server)


def wait_until_ready(
    server: Server, process: subprocess.Popen[bytes], *, timeout_s: float = 30.0, clock: Clock | None = None
) -> None:
    """Return when `server` answers; raise what its log says if its `process` ends or `timeout_s` passes first."""
    clock = clock or SystemClock()
    deadline = clock.monotonic() + timeout_s
    while not server.is_ready():
        try:
            outcome = f"ended with status {process.wait(_PAUSE_S)}"
        except subprocess.TimeoutExpired:
            if clock.monotonic() < deadline:
                continue
            outcome = f"was not ready after {timeout_s:g} s"
        raise failure(f"{server.name} in {server.directory} {outcome}.", server.log_tail(_LOG_LINES))


@contextmanager
def started(server: AnyServer, *, timeout_s: float = 30.0, clock: Clock | None = None) -> Iterator[AnyServer]:
    """Run `server` for the length of a `with` block, its directory locked."""
    with DirectoryLock(server.directory):
        server.prepare()
        process = server.spawn()
        try:
            wait_until_ready(server, process, timeout_s=timeout_s, clock=clock)
            yield server
        finally:
            server.stop(process)
