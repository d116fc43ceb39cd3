"""`headrace up`: keeps the service's processes alive, and stops them in order.

One listening socket is opened here and inherited by every worker: connections wait in it while a worker is replaced,
so the death of one fails only the requests that it was answering. What ends is started again with a back-off; a
process of ours whose event loop falls silent is killed first. When the supervisor itself is killed, the kernel ends
its children.
"""

import asyncio
import errno
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import psutil

from headrace.app import WORKERS_MAX, asked_for_workers
from headrace.clock import Clock, SystemClock
from headrace.config import Config
from headrace.embedded import DirectoryLock, EmbeddedPostgres, EmbeddedRedis
from headrace.embedded.directory import Owner, make_private, usable
from headrace.errors import BackendError, HeadraceError, PortTaken
from headrace.events import Observer, ProcessExited, ProcessFailed, ProcessStarted, Silent
from headrace.server.assignment import Assignment
from headrace.server.backoff import Backoff
from headrace.server.children import Child, EmbeddedChild, OwnChild

_WATCH_S = 0.05

_RUN_FILES = ("counters*", "snapshot*", "controller.lock", "workers", "workers.*.new")
"""What the processes of a run make in its directory."""

# What may pass by itself: a full disk, a program that is being replaced, no file descriptors, processes, memory or
# threads left (of the last Python tells by a RuntimeError).
_MAY_PASS = (HeadraceError, OSError, subprocess.SubprocessError, RuntimeError, MemoryError, psutil.Error)


def cpus() -> int:
    """CPUs that this process may use."""
    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1


@dataclass(slots=True, eq=False)
class _Keeper:
    """One child, and the task that keeps it alive until it is told to leave it."""

    child: Child
    ready: "asyncio.Future[None]"
    """Done when the child is ready for the first time, or the service cannot come up."""
    leave: asyncio.Event
    process: subprocess.Popen[bytes] | None = None
    """The child's last process, until it was seen to its end."""
    task: "asyncio.Task[None] | None" = None


class Supervisor:
    """The processes of one `headrace up`."""

    def __init__(
        self,
        config: Config,
        *,
        config_path: Path | None = None,
        application: str | None = None,
        observer: Observer | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._config = config
        self._config_path = config_path
        self._application = application
        self._observer = observer or Silent()
        self._clock = clock or SystemClock()
        self._directory = config.embedded.directory.resolve()
        self._run_directory = self._directory / "headrace-run"
        self._keepers: dict[str, _Keeper] = {}
        """All whose child may still be alive, those that leave it included."""
        self._workers_wanted = config.server.workers or cpus()
        self._is_up = False
        self._stopping = asyncio.Event()
        self._failure: BaseException | None = None
        self._socket: socket.socket
        self._redis: EmbeddedRedis | None = None
        self._shards: list[EmbeddedPostgres] = []

    @property
    def url(self) -> str:
        """Where the service answers."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def directory(self) -> Path:
        """Where the embedded servers keep their data."""
        return self._directory

    async def run(self, on_up: Callable[["Supervisor"], None]) -> None:
        """Start everything, call `on_up`, and keep it alive until a signal comes.

        Raises what kept the service from coming up; from then on failures are repaired, not raised.
        """
        with ExitStack() as stack:
            self._socket = stack.enter_context(self._listening())
            stack.enter_context(DirectoryLock(self._directory))
            self._fresh_run_directory()
            self._on_signals()
            try:
                await self._start()
                if not self._stopping.is_set():
                    self._is_up = True
                    self._adjust_workers()
                    on_up(self)
                await self._stopping.wait()
            finally:
                await self._stop()
        if self._failure is not None:
            raise self._failure

    # -- starting -----------------------------------------------------------------------------------------------

    def _listening(self) -> socket.socket:
        server = self._config.server
        family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((server.host, server.port))
        except OSError as error:
            listening.close()
            if error.errno == errno.EADDRINUSE:
                raise PortTaken(f"Port {server.port} of {server.host} is taken.") from error
            raise BackendError(f"{server.host}:{server.port} cannot be bound: {error.strerror}.") from error
        listening.listen(4096)
        listening.setblocking(False)  # noqa: FBT003 - the socket's own signature
        return listening

    def _fresh_run_directory(self) -> None:
        """What the processes share belongs to this run alone; what they did not make is left alone."""
        make_private(self._run_directory, Owner(os.geteuid(), os.getegid()))
        with usable(self._directory):
            for pattern in _RUN_FILES:
                for left in self._run_directory.glob(pattern):
                    left.unlink()

    def _on_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGTTIN, self.add_worker)
        loop.add_signal_handler(signal.SIGTTOU, self.remove_worker)
        loop.add_signal_handler(signal.SIGUSR1, self._scale_as_asked)

    async def _start(self) -> None:
        """Embedded servers side by side, then our own processes side by side."""
        self._choose_embedded()
        servers = [each for each in (self._redis, *self._shards) if each is not None]
        await self._all_ready([EmbeddedChild(server, clock=self._clock) for server in servers])
        if self._stopping.is_set():
            return
        workers = [self._worker(index) for index in range(self._workers_wanted)]
        await self._all_ready([self._controller(), *workers])

    def _choose_embedded(self) -> None:
        embedded = self._config.embedded
        if embedded.redis and self._config.cache.remote is None:
            self._redis = EmbeddedRedis(self._directory / "redis")
        if not self._config.database.shards:
            self._shards = [
                EmbeddedPostgres(self._directory / f"shard-{index}", name=f"shard-{index}", major=embedded.postgres)
                for index in range(embedded.shards)
            ]

    async def _all_ready(self, children: list[Child]) -> None:
        ready = [self._keep(child) for child in children]
        stopping: asyncio.Future[Any] = asyncio.get_running_loop().create_task(self._stopping.wait())
        try:
            for each in ready:
                await asyncio.wait({stopping, each}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()

    def _controller(self) -> Child:
        return OwnChild(
            "controller",
            "headrace.server.controller",
            partial(self._assignment, worker=0, listen_fd=-1),
            clock=self._clock,
            stop_timeout_s=5.0,
        )

    def _worker(self, index: int) -> Child:
        listen_fd = self._socket.fileno()
        return OwnChild(
            f"worker-{index}",
            "headrace.server.worker",
            partial(self._assignment, worker=index, listen_fd=listen_fd),
            clock=self._clock,
            stop_timeout_s=self._config.server.drain_s + 5.0,
            descriptors=(listen_fd,),
        )

    def _assignment(self, alive_fd: int, *, worker: int, listen_fd: int) -> Assignment:
        return Assignment(
            config_path=str(self._config_path) if self._config_path else None,
            run_directory=str(self._run_directory),
            supervisor_pid=os.getpid(),
            alive_fd=alive_fd,
            worker=worker,
            listen_fd=listen_fd,
            application=self._application,
            redis_url=self._redis.url if self._redis else None,
            shards=tuple((shard.name, shard.url) for shard in self._shards),
        )

    # -- keeping ------------------------------------------------------------------------------------------------

    def add_worker(self) -> None:
        """Serve with one more worker."""
        self.scale(self._workers_wanted + 1)

    def remove_worker(self) -> None:
        """Let the newest worker drain and end; the last one stays."""
        self.scale(self._workers_wanted - 1)

    def scale(self, workers: int) -> None:
        """Serve with this many workers, at least one: the newest drain and leave, or more are started."""
        self._workers_wanted = min(max(workers, 1), WORKERS_MAX)
        if self._is_up and not self._stopping.is_set():
            self._adjust_workers()

    def _scale_as_asked(self) -> None:
        workers = asked_for_workers(self._run_directory)
        if workers is not None:
            self.scale(workers)

    def _adjust_workers(self) -> None:
        # By index; one that still drains is not counted, but its name is not free: what is told of the two would mix.
        known = {int(name.removeprefix("worker-")): name for name in self._keepers if name.startswith("worker-")}
        serving = [self._keepers[known[index]] for index in sorted(known)]
        serving = [keeper for keeper in serving if not keeper.leave.is_set()]
        for keeper in serving[self._workers_wanted :]:
            keeper.leave.set()
        missing = max(0, self._workers_wanted - len(serving))
        for index in islice((index for index in count() if index not in known), missing):
            self._keep(self._worker(index))

    def _keep(self, child: Child) -> "asyncio.Future[None]":
        """Run a child until told to leave it; the future is done when it is ready for the first time."""
        loop = asyncio.get_running_loop()
        keeper = self._keepers[child.name] = _Keeper(child, loop.create_future(), asyncio.Event())
        keeper.task = loop.create_task(self._keeping(keeper))
        keeper.task.add_done_callback(partial(self._left, keeper))
        return keeper.ready

    def _left(self, keeper: _Keeper, task: "asyncio.Task[None]") -> None:
        """Forget who has done his work; one that ended otherwise is a bug, which ends the service in order."""
        del self._keepers[keeper.child.name]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    async def _keeping(self, keeper: _Keeper) -> None:
        leave, backoff = keeper.leave, Backoff()
        while not leave.is_set():
            started_at, failure = self._clock.monotonic(), None
            try:
                await self._one_run(keeper)
            except _MAY_PASS as error:
                failure = error
                if not (self._is_up or keeper.ready.done()):
                    self._fail_start(keeper, error)
                    await leave.wait()
            if leave.is_set():
                break
            backoff = backoff.after(self._clock.monotonic() - started_at)
            await self._end(keeper, failure, backoff.wait_s)
            await self._until(leave, self._clock.sleep(backoff.wait_s))
        await self._end(keeper, None, None)

    async def _one_run(self, keeper: _Keeper) -> None:
        """Start the child and watch it until it ends, or until told to leave it."""
        child, leave = keeper.child, keeper.leave
        if keeper.process is not None:
            # It would not end after the last run, and there must not be two.
            await child.stop(keeper.process)
            keeper.process = None
        await child.prepare()
        process = keeper.process = child.spawn()
        self._observer.on(ProcessStarted(child.name, process.pid))
        await self._until(leave, child.wait_until_ready(process))
        if leave.is_set():
            return
        if not keeper.ready.done():
            keeper.ready.set_result(None)
        await self._until(leave, self._ended(child, process))

    async def _end(self, keeper: _Keeper, failure: BaseException | None, restart_in_s: float | None) -> None:
        """End what is left of the last run, and tell how that went."""
        child, process = keeper.child, keeper.process
        if process is not None:
            try:
                await child.stop(process)
                keeper.process = None
            except _MAY_PASS as error:
                failure = error
        if failure is not None:
            self._observer.on(ProcessFailed(child.name, str(failure), restart_in_s))
        if process is not None and restart_in_s is not None and process.poll() is not None:
            self._observer.on(ProcessExited(child.name, process.pid, process.returncode, restart_in_s))

    def _fail_start(self, keeper: _Keeper, error: BaseException) -> None:
        """The service cannot come up."""
        if not isinstance(error, HeadraceError):
            cause, error = error, BackendError(f"{keeper.child.name} cannot be started: {error}.")
            error.__cause__ = cause
        self._fail(error)
        keeper.ready.set_result(None)

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self._stopping.set()

    async def _ended(self, child: Child, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            if child.silent_s() > self._config.server.silence_max_s:
                process.kill()
            await self._clock.sleep(_WATCH_S)

    async def _until(self, leave: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
        """Do the work, unless told to leave meanwhile."""
        loop = asyncio.get_running_loop()
        left, done = loop.create_task(leave.wait()), loop.create_task(work)
        await asyncio.wait({left, done}, return_when=asyncio.FIRST_COMPLETED)
        left.cancel()
        if not done.done():
            done.cancel()
            await asyncio.gather(done, return_exceptions=True)
            return
        done.result()

    # -- stopping -----------------------------------------------------------------------------------------------

    async def _stop(self) -> None:
        """Workers first, so that they can still write; then the controller; the servers last."""
        self._stopping.set()
        for is_next in (
            lambda name: name.startswith("worker-"),
            lambda name: name == "controller",
            lambda name: True,
        ):
            keepers = [keeper for name, keeper in self._keepers.items() if is_next(name)]
            for keeper in keepers:
                keeper.leave.set()
            # What a keeper raises, `_left` has taken down.
            await asyncio.gather(*(keeper.task for keeper in keepers if keeper.task), return_exceptions=True)


def with_overrides(
    config: Config, *, host: str | None, port: int | None, workers: int | None, directory: Path | None
) -> Config:
    """The configuration with what the command line says laid over it."""
    server, embedded = config.server, config.embedded
    return replace(
        config,
        server=replace(
            server,
            host=server.host if host is None else host,
            port=server.port if port is None else port,
            workers=server.workers if workers is None else workers,
        ),
        embedded=replace(embedded, directory=embedded.directory if directory is None else directory),
    )
