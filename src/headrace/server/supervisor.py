"""`headrace up`: keeps the service's processes alive, and stops them in order.

One listening socket is opened here and inherited by every worker: connections wait in it while a worker is replaced,
so the death of one fails only the requests that it was answering. What ends is started again with a back-off; a
process of ours whose event loop falls silent is killed first. When the supervisor itself is killed, the kernel ends
its children.
"""

import asyncio
import errno
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from headrace.clock import Clock, SystemClock
from headrace.config import Config
from headrace.embedded import DirectoryLock, EmbeddedPostgres, EmbeddedRedis
from headrace.errors import BackendError, HeadraceError, PortTaken
from headrace.events import Observer, ProcessExited, ProcessStarted, Silent
from headrace.server.assignment import Assignment
from headrace.server.backoff import Backoff
from headrace.server.children import Child, EmbeddedChild, OwnChild

_WATCH_S = 0.05


def cpus() -> int:
    """CPUs that this process may use."""
    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1


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
        self._run_directory = self._directory / "run"
        self._keepers: dict[str, tuple[asyncio.Task[None], asyncio.Event]] = {}
        self._stopping = asyncio.Event()
        self._failure: HeadraceError | None = None
        self._socket = socket.socket()
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
        """What the processes share belongs to this run alone."""
        shutil.rmtree(self._run_directory, ignore_errors=True)
        self._run_directory.mkdir(mode=0o700)

    def _on_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGTTIN, self.add_worker)
        loop.add_signal_handler(signal.SIGTTOU, self.remove_worker)

    async def _start(self) -> None:
        """Embedded servers side by side, then our own processes side by side."""
        self._choose_embedded()
        servers = [each for each in (self._redis, *self._shards) if each is not None]
        await self._all_ready([EmbeddedChild(server, clock=self._clock) for server in servers])
        if self._stopping.is_set():
            return
        workers = self._config.server.workers or cpus()
        await self._all_ready([self._controller(), *(self._worker(index) for index in range(workers))])

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
        index = next(index for index in range(10_000) if f"worker-{index}" not in self._keepers)
        self._keep(self._worker(index))

    def remove_worker(self) -> None:
        """Let the newest worker drain and end; the last one stays."""
        workers = [name for name in self._keepers if name.startswith("worker-")]
        if len(workers) > 1:
            _, leave = self._keepers.pop(max(workers, key=lambda name: int(name.removeprefix("worker-"))))
            leave.set()

    def _keep(self, child: Child) -> "asyncio.Future[None]":
        """Run a child until told to leave it; the future is done when it is ready for the first time."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        leave = asyncio.Event()
        task = loop.create_task(self._keeping(child, ready, leave))
        self._keepers[child.name] = (task, leave)
        return ready

    async def _keeping(self, child: Child, ready: "asyncio.Future[None]", leave: asyncio.Event) -> None:
        backoff = Backoff()
        while not leave.is_set():
            started_at = self._clock.monotonic()
            process: subprocess.Popen[bytes] | None = None
            try:
                await child.prepare()
                process = child.spawn()
                self._observer.on(ProcessStarted(child.name, process.pid))
                await self._until(leave, child.wait_until_ready(process))
                if not ready.done():
                    ready.set_result(None)
                await self._until(leave, self._ended(child, process))
            except HeadraceError as error:
                if not ready.done():
                    ready.set_result(None)
                    self._fail(error)
                    await leave.wait()
            if leave.is_set():
                break
            backoff = backoff.after(self._clock.monotonic() - started_at)
            if process is not None:
                exit_code = process.poll()
                if exit_code is None:
                    await child.stop(process)
                    exit_code = process.returncode
                self._observer.on(ProcessExited(child.name, process.pid, exit_code, backoff.wait_s))
            await self._until(leave, self._clock.sleep(backoff.wait_s))
        if process is not None:
            await child.stop(process)

    def _fail(self, error: HeadraceError) -> None:
        """The service cannot come up."""
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
        for is_next in (
            lambda name: name.startswith("worker-"),
            lambda name: name == "controller",
            lambda name: True,
        ):
            names = [name for name in self._keepers if is_next(name)]
            keepers = [self._keepers.pop(name) for name in names]
            for _, leave in keepers:
                leave.set()
            await asyncio.gather(*(task for task, _ in keepers))


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
