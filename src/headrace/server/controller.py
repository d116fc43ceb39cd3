"""The process that watches the others: `python -m headrace.server.controller ASSIGNMENT`.

It adds up what the workers count and publishes the snapshot. A lease, an flock in the run directory, keeps a second
one waiting, so there is one at any time however many are started.
"""

import asyncio
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop

from headrace.app import watching
from headrace.clock import SystemClock
from headrace.config import Config
from headrace.embedded.launch import die_with_parent
from headrace.errors import CallerError, HeadraceError
from headrace.monitor import Counters, Monitor, SnapshotFile
from headrace.server import log
from headrace.server.assignment import EXIT_CONFIG, Assignment
from headrace.server.pulse import Pulse


@contextmanager
def lease(path: Path) -> Iterator[None]:
    """Hold the lock file while the block runs; wait for it as long as somebody else does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


async def watch(assignment: Assignment, config: Config) -> None:
    """Fold and publish until told to stop. Raises what ended the watching, for the supervisor to start anew."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    clock = SystemClock()
    counters = Counters.open(
        assignment.directory / "counters", slots=config.monitor.slots, slot_bytes=config.monitor.slot_bytes
    )
    monitor = Monitor(
        config.monitor,
        clock=clock,
        counters=counters,
        publication=SnapshotFile(assignment.directory / "snapshot"),
        fold=True,
        observer=log.LogObserver(),
    )
    try:
        async with watching(monitor) as ticking, Pulse(assignment.alive_fd, clock=clock):
            stopping = loop.create_task(stop.wait())
            await asyncio.wait({stopping, ticking}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if ticking.done():
                ticking.result()
    finally:
        counters.close()


def main() -> int:
    """Run the controller that the argument describes."""
    assignment = Assignment.from_argument(sys.argv[1])
    die_with_parent(assignment.supervisor_pid, signal.SIGKILL)
    try:
        config = assignment.config()
        log.configure(config.log, process="controller")
        with lease(assignment.directory / "controller.lock"):
            uvloop.run(watch(assignment, config))
    except HeadraceError as error:
        sys.stderr.write(f"headrace: {error}\n")
        return EXIT_CONFIG if isinstance(error, CallerError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
