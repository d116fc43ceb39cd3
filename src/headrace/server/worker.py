"""A process that serves HTTP: `python -m headrace.server.worker ASSIGNMENT`."""

import importlib
import os
import signal
import socket
import sys

import uvicorn
from starlette.types import ASGIApp

from headrace.clock import SystemClock
from headrace.config import Config
from headrace.embedded.launch import die_with_parent
from headrace.errors import CallerError, ConfigError, HeadraceError
from headrace.events import GuardOff
from headrace.server import log
from headrace.server.application import Headrace
from headrace.server.assignment import EXIT_CONFIG, Assignment
from headrace.server.garbage import Garbage
from headrace.server.protocol import Protocol
from headrace.server.pulse import Pulse


def imported(path: str) -> ASGIApp:
    """The application that `module:attribute` names, looked up from the working directory first."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{path!r} does not name an application.", fix="Write it as module:app.")
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - sys.path holds strings
    try:
        found: ASGIApp = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{path!r} cannot be imported: {error}.", fix="Run `headrace up` where `python -c 'import module'` works."
        ) from error
    if not callable(found):
        raise ConfigError(f"{path!r} is a {type(found).__name__}, not an ASGI application.")
    return found


class Server(uvicorn.Server):
    """uvicorn's server, which ends our streams before it waits for its connections; its loop beats and is guarded."""

    def __init__(self, config: uvicorn.Config, headrace: Headrace, alive_fd: int) -> None:
        super().__init__(config)
        self._headrace = headrace
        self._pulse = Pulse(alive_fd, clock=SystemClock())
        self._garbage = Garbage(SystemClock())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open, then give the first sign of life."""
        await super().startup(sockets)
        if not self.should_exit:
            rooms = self._headrace.rooms
            self._garbage.settle()
            rooms.monitor.add_source(self._garbage.measured)
            try:
                rooms.agents.guard.arm()
            except ConfigError as error:
                rooms.observer.on(GuardOff(error.message))
            await self._pulse.__aenter__()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close."""
        await self._headrace.drain()
        await super().shutdown(sockets)
        self._headrace.rooms.agents.guard.disarm()
        await self._pulse.__aexit__(None, None, None)


def serve(assignment: Assignment, config: Config) -> int:
    """Serve until told to stop; the exit code."""
    headrace = Headrace(
        config,
        observer=log.LogObserver(),
        directory=assignment.directory,
        worker=assignment.worker,
        supervisor_pid=assignment.supervisor_pid,
    )
    wrapped = imported(assignment.application) if assignment.application else None
    server = Server(
        uvicorn.Config(
            headrace.asgi(wrapped),
            loop="uvloop",
            http=Protocol,
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=round(config.server.drain_s),
            timeout_keep_alive=75,
            backlog=4096,
        ),
        headrace,
        assignment.alive_fd,
    )
    server.run(sockets=[socket.socket(fileno=assignment.listen_fd)])
    return 0 if server.started else 1


def main() -> int:
    """Run the worker that the argument describes."""
    assignment = Assignment.from_argument(sys.argv[1])
    # The launcher's SIGTERM would wait for the event loop, which an agent may hold for ever.
    die_with_parent(assignment.supervisor_pid, signal.SIGKILL)
    try:
        config = assignment.config()
        log.configure(config.log, process=f"worker-{assignment.worker}")
        return serve(assignment, config)
    except HeadraceError as error:
        sys.stderr.write(f"headrace: {error}\n")
        return EXIT_CONFIG if isinstance(error, CallerError) else 1


if __name__ == "__main__":
    sys.exit(main())
