"""The kinds of processes that the supervisor keeps: embedded servers and our own."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from headrace.clock import Clock
from headrace.embedded import Server
from headrace.embedded.identity import OWN
from headrace.embedded.process import launched
from headrace.errors import BackendError, ConfigError
from headrace.server.assignment import EXIT_CONFIG, Assignment

_PAUSE_S = 0.02
_READY_TIMEOUT_S = 60.0


class Child(Protocol):
    """One kind of process: how it is made, when it is ready, how it ends."""

    name: str

    async def prepare(self) -> None:
        """Everything that must be true before it starts."""

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start it; the main thread must call this, since the kernel ties the child's life to it."""

    async def wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        """Return when it works; raise if it ends first or takes too long."""

    async def stop(self, process: subprocess.Popen[bytes]) -> None:
        """End it cleanly, or by force when that takes too long."""

    def silent_s(self) -> float:
        """Seconds since its last sign of life; 0 for what gives none."""


class EmbeddedChild:
    """An embedded Redis or Postgres."""

    def __init__(self, server: Server, *, clock: Clock) -> None:
        self.name = server.name
        self._server = server
        self._clock = clock

    async def prepare(self) -> None:
        """Clear away what a killed run left, make what is missing."""
        await asyncio.to_thread(self._server.prepare)

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the server."""
        return self._server.spawn()

    async def wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        """Ask it until it answers."""
        give_up_at = self._clock.monotonic() + _READY_TIMEOUT_S
        while not await asyncio.to_thread(self._server.is_ready):
            if process.poll() is not None or self._clock.monotonic() > give_up_at:
                state = "ended" if process.poll() is not None else "does not answer"
                raise BackendError(f"{self.name} {state}. Its log ends:\n{self._server.log_tail()}")
            await self._clock.sleep(_PAUSE_S)

    async def stop(self, process: subprocess.Popen[bytes]) -> None:
        """Its own clean stop."""
        await asyncio.to_thread(self._server.stop, process)

    def silent_s(self) -> float:
        """An embedded server gives no signs; clients notice when it hangs."""
        return 0.0


class OwnChild:
    """A worker or the controller: a Python process of ours that beats through a pipe."""

    def __init__(
        self,
        name: str,
        module: str,
        assign: Callable[[int], Assignment],
        *,
        clock: Clock,
        stop_timeout_s: float,
        descriptors: tuple[int, ...] = (),
    ) -> None:
        self.name = name
        self._module = module
        self._assign = assign
        self._clock = clock
        self._stop_timeout_s = stop_timeout_s
        self._descriptors = descriptors
        self._read_fd = -1
        self._beat_at = 0.0
        self._ready = asyncio.Event()

    async def prepare(self) -> None:
        """Nothing to prepare."""

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the process with the writing end of a fresh pipe."""
        self._close()
        self._ready = asyncio.Event()
        self._read_fd, write_fd = os.pipe()
        self._beat_at = self._clock.monotonic()
        try:
            # Before there is a process: if this fails, none is left that nobody knows of.
            os.set_blocking(self._read_fd, False)
            asyncio.get_running_loop().add_reader(self._read_fd, self._on_beat)
            command = [sys.executable, "-m", self._module, self._assign(write_fd).to_argument()]
            return subprocess.Popen(
                launched(command, identity=OWN, death_signal=signal.SIGTERM),
                stdin=subprocess.DEVNULL,
                pass_fds=(write_fd, *self._descriptors),
                start_new_session=True,
            )
        finally:
            os.close(write_fd)

    async def wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the first beat."""
        give_up_at = self._clock.monotonic() + _READY_TIMEOUT_S
        while not self._ready.is_set():
            if process.poll() is not None:
                self._raise_end(process.returncode)
            if self._clock.monotonic() > give_up_at:
                raise BackendError(f"{self.name} was not ready within {_READY_TIMEOUT_S:g} s.")
            with suppress(TimeoutError):
                async with asyncio.timeout(_PAUSE_S):
                    await self._ready.wait()

    def _raise_end(self, exit_code: int) -> None:
        if exit_code == EXIT_CONFIG:
            raise ConfigError(f"{self.name} cannot do what it was told to.", fix="Correct what its output names.")
        raise BackendError(f"{self.name} ended with {exit_code} before it was ready; see its output.")

    async def stop(self, process: subprocess.Popen[bytes]) -> None:
        """SIGTERM, time to drain, SIGKILL."""
        give_up_at = self._clock.monotonic() + self._stop_timeout_s
        if process.poll() is None:
            process.terminate()
        while process.poll() is None:
            if self._clock.monotonic() > give_up_at:
                process.kill()
                process.wait()
            else:
                await self._clock.sleep(_PAUSE_S)
        self._close()

    def silent_s(self) -> float:
        """Seconds since the last beat, once there was a first."""
        if not self._ready.is_set():
            return 0.0
        # A supervisor that was itself held up wakes to its timers before it has heard what was said meanwhile.
        self._on_beat()
        return self._clock.monotonic() - self._beat_at

    def _on_beat(self) -> None:
        with suppress(BlockingIOError):
            if os.read(self._read_fd, 4096):
                self._beat_at = self._clock.monotonic()
                self._ready.set()
            else:
                asyncio.get_running_loop().remove_reader(self._read_fd)

    def _close(self) -> None:
        if self._read_fd >= 0:
            asyncio.get_running_loop().remove_reader(self._read_fd)
            os.close(self._read_fd)
            self._read_fd = -1
