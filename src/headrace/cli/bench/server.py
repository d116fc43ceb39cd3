"""The server under test: started when it is first needed, stopped whatever happens."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from headrace.clock import Clock
from headrace.errors import BenchFailed

READY = re.compile(r"^headrace is up: (http://\S+)", re.MULTILINE)
READY_S_MAX = 180.0
"""The first start in a directory makes its databases."""
STOP_S_MAX = 45.0
"""Draining requests, then stopping the embedded servers."""
POLL_INTERVAL_S = 0.05
LOG_LINES_SHOWN = 20


def up_command(directory: Path, *, workers: int) -> list[str]:
    """How `headrace up` is started in a directory of its own and on a free port, which it announces."""
    up = [sys.executable, "-m", "headrace", "up"]
    return [*up, "--directory", str(directory), "--port", "0", "--workers", str(workers)]


class ServerUnderTest:
    """`async with ServerUnderTest(...) as server`: `await server.url()` starts it, leaving the block stops it."""

    def __init__(
        self,
        command: Callable[[Path], list[str]],
        *,
        directory: Path,
        clock: Clock,
        ready_s_max: float = READY_S_MAX,
        stop_s_max: float = STOP_S_MAX,
    ) -> None:
        self._ready_s_max = ready_s_max
        self._stop_s_max = stop_s_max
        self._command = command
        self._directory = directory
        self._log = directory / "server.log"
        self._clock = clock
        self._process: asyncio.subprocess.Process | None = None
        self._url = ""
        self._failure: BenchFailed | None = None

    async def __aenter__(self) -> Self:
        """Start nothing yet."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ask the server to stop; kill it and everything that it started when it does not."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        family = await asyncio.to_thread(_family, process.pid)
        try:
            async with asyncio.timeout(self._stop_s_max):
                await process.wait()
        except TimeoutError as timeout:
            words = await self._last_words()
            raise BenchFailed(f"The server did not stop within {self._stop_s_max:.0f} s. {words}") from timeout
        finally:
            # Also when the waiting was cancelled: nothing that we started may outlive us.
            if process.returncode is None:
                await asyncio.to_thread(_kill, family)
                await process.wait()

    async def url(self) -> str:
        """Where it listens, once it says that it is up. BenchFailed, and from then on, when it is not."""
        if self._failure is not None:
            raise self._failure
        try:
            if self._process is None:
                self._process = await self._start()
                self._url = await self._wait_until_up(self._process)
            await self._require_running(self._process)
        except BenchFailed as failure:
            self._failure = failure
            raise
        return self._url

    async def _start(self) -> asyncio.subprocess.Process:
        command = self._command(self._directory / "data")
        with await asyncio.to_thread(self._log.open, "wb") as log:
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                # Ctrl-C is for us alone: we stop the server after we have stopped using it.
                start_new_session=True,
            )

    async def _wait_until_up(self, process: asyncio.subprocess.Process) -> str:
        deadline = self._clock.monotonic() + self._ready_s_max
        while self._clock.monotonic() < deadline:
            if ready := READY.search(await self._output()):
                return ready[1]
            await self._require_running(process)
            await self._clock.sleep(POLL_INTERVAL_S)
        raise BenchFailed(f"The server was not up after {self._ready_s_max:.0f} s. {await self._last_words()}")

    async def _require_running(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is not None:
            words = await self._last_words()
            raise BenchFailed(f"The server under test ended with code {process.returncode}. {words}")

    async def _output(self) -> str:
        return await asyncio.to_thread(self._log.read_text, errors="replace")

    async def _last_words(self) -> str:
        lines = (await self._output()).splitlines()
        return "\n".join(["Its output ended with:", *lines[-LOG_LINES_SHOWN:]])


def _family(pid: int) -> list[psutil.Process]:
    """The process and all of its descendants, while it still knows them."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill(family: list[psutil.Process]) -> None:
    for process in family:
        try:
            process.kill()  # psutil compares start times: a pid that was given to someone else is left alone
        except psutil.NoSuchProcess:
            continue
