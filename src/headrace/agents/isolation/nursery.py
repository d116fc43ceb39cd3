"""Where workers are born: the host's side of the zygote, kept alive and asked for forks."""

import asyncio
import json
import os
import socket
import sys
import sysconfig
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.agents.isolation import root, zygote
from headrace.agents.isolation.limits import IsolationConfig
from headrace.clock import Clock
from headrace.errors import IsolationUnavailable, WorkerFailed
from headrace.events import Observer, ZygoteEnded

_BOOT_TIMEOUT_S = 15.0
# A busy machine may need seconds to fork what was asked for last; a worker whose pid is not heard stays a zombie.
_END_TIMEOUT_S = 10.0
_LOOK_EVERY_S = 0.005
_ANSWER_BYTES_MAX = 4096


def readable_directories(config: IsolationConfig) -> list[str]:
    """What agents may read: the interpreter's libraries, the system's, and what is configured."""
    found = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    found |= {path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}}
    return [*sorted(path for path in found if Path(path).is_dir()), *root.system_directories(), *config.readable]


def boot_parameters(config: IsolationConfig) -> dict[str, Any]:
    """What a zygote is told at its start."""
    return {
        "host": os.getpid(),
        "package": str(Path(__file__).parents[2]),
        "path": [path for path in sys.path if path and Path(path).exists()],
        "preload": list(config.preload),
        "readable": readable_directories(config),
    }


def command(descriptor: int, parameters: dict[str, Any]) -> list[str]:
    """The program of a zygote."""
    return [sys.executable, "-I", "-S", zygote.__file__, str(descriptor), json.dumps(parameters)]


# Without it glibc reserves 64 MB of address space for each of many threads, which RLIMIT_AS would count.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "2", "LC_ALL": "C.UTF-8", "TMPDIR": root.SCRATCH}


class Nursery:
    """A zygote that is started again, with growing pauses, whenever it dies. Its workers do not depend on it."""

    def __init__(self, config: IsolationConfig, *, clock: Clock, observer: Observer) -> None:
        self._config = config
        self._clock = clock
        self._observer = observer
        self._parameters: dict[str, Any] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._socket: socket.socket | None = None
        self._answers: dict[int, asyncio.Future[int]] = {}
        self._unclaimed: set[int] = set()
        self._orphans: set[int] = set()
        self._numbers = 0
        self._ready = asyncio.Event()
        self._ended = asyncio.Event()
        self._end_reason = ""
        self._keeper: asyncio.Task[None] | None = None
        self.starts = 0
        """Zygotes started so far."""

    @property
    def pid(self) -> int | None:
        """The zygote's pid while there is one."""
        return None if self._process is None else self._process.pid

    async def open(self) -> None:
        """Start the zygote; raises `IsolationUnavailable` when the kernel lacks a part."""
        loop = asyncio.get_running_loop()
        self._parameters = await loop.run_in_executor(None, boot_parameters, self._config)
        try:
            await self._start()
        except BaseException:
            await self._end()
            raise
        self._keeper = loop.create_task(self._keep())

    async def close(self) -> None:
        """Stop asking, and let the zygote end."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait((self._keeper,))
        # Workers that were asked for by somebody who left: our children all the same, and not to be left as zombies.
        ends_at = self._clock.monotonic() + _END_TIMEOUT_S
        while (self._unclaimed and self._ready.is_set()) or self._orphans:
            if self._clock.monotonic() >= ends_at:
                break
            await asyncio.sleep(_LOOK_EVERY_S)
        await self._end()

    async def fork(self, scratch_bytes: int, descriptors: Sequence[int]) -> int:
        """The pid of a new worker, our child, that has the three descriptors."""
        self._numbers += 1
        number = self._numbers
        request = json.dumps({"number": number, "scratch_bytes": scratch_bytes}).encode()
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        is_asked = False
        try:
            async with asyncio.timeout(self._config.start_timeout_s):
                await self._ready.wait()
            assert self._socket is not None, "it is ready"
            self._socket.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))])
            is_asked = True
            async with asyncio.timeout(self._config.start_timeout_s):
                return await answer
        except (OSError, TimeoutError) as error:
            self._leave(number, answer, is_asked=is_asked)
            raise WorkerFailed(f"The zygote did not fork a worker: {str(error) or 'no answer'}.") from error
        except asyncio.CancelledError:
            self._leave(number, answer, is_asked=is_asked)
            raise
        finally:
            self._answers.pop(number, None)

    def _leave(self, number: int, answer: "asyncio.Future[int]", *, is_asked: bool) -> None:
        """Nobody waits for this worker any more; it may come all the same, or have come just now."""
        if answer.done() and not answer.cancelled() and answer.exception() is None:
            self._reap_at_its_end(answer.result())
        elif is_asked:
            self._unclaimed.add(number)

    async def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)  # noqa: FBT003 - the socket's own signature
        self._ended.clear()
        self.starts += 1
        try:
            # From this thread, which stays: the kernel ends the zygote and its workers with the thread that starts it.
            self._process = await asyncio.create_subprocess_exec(
                *command(theirs.fileno(), self._parameters),
                stdin=asyncio.subprocess.DEVNULL,
                env=ENVIRONMENT,
                cwd="/",
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._socket = ours
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_BOOT_TIMEOUT_S):
                data = await loop.sock_recv(ours, _ANSWER_BYTES_MAX)
        except (OSError, TimeoutError) as error:
            raise WorkerFailed(f"The zygote did not start: {str(error) or 'no answer'}.") from error
        answer = json.loads(data) if data else {}
        if "missing" in answer:
            raise IsolationUnavailable(
                f"This kernel does not give a part of level 'process': {answer['missing']} ({answer['reason']})."
            )
        if not answer:
            raise WorkerFailed("The zygote ended at its start; what it said stands in this process's stderr.")
        loop.add_reader(ours.fileno(), self._receive)
        self._ready.set()

    async def _end(self) -> None:
        """Close our end, at which the zygote ends; kill it when it does not."""
        self._forget("the pool is closed")
        process, self._process = self._process, None
        if process is None:
            return
        try:
            async with asyncio.timeout(_END_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    def _forget(self, reason: str) -> None:
        self._ready.clear()
        self._ended.set()
        self._end_reason = reason
        self._unclaimed.clear()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(WorkerFailed(f"The zygote did not fork a worker: {reason}."))

    def _receive(self) -> None:
        assert self._socket is not None, "the reader is removed before the socket is closed"
        try:
            data = self._socket.recv(_ANSWER_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._forget("it died")
            return
        message = json.loads(data)
        answer = self._answers.get(message["number"])
        if answer is None or answer.done():
            self._unclaimed.discard(message["number"])
            if "pid" in message:
                self._reap_at_its_end(message["pid"])
        elif "pid" in message:
            answer.set_result(message["pid"])
        else:
            answer.set_exception(WorkerFailed(f"The zygote could not fork a worker: {message['failed']}."))

    async def _keep(self) -> None:
        """Start it again whenever it dies."""
        first_s, longest_s = self._config.zygote_backoff_first_s, self._config.zygote_backoff_max_s
        pause_s = first_s
        while True:
            started = self._clock.monotonic()
            await self._ended.wait()
            if self._clock.monotonic() - started > longest_s:
                pause_s = first_s
            self._observer.on(ZygoteEnded(self._end_reason, pause_s))
            if self._process is not None:
                if self._process.returncode is None:
                    self._process.kill()
                await self._process.wait()
            await self._clock.sleep(pause_s)
            pause_s = min(pause_s * 2, longest_s)
            try:
                await self._start()
            except (WorkerFailed, IsolationUnavailable, OSError) as error:
                self._forget(str(error))

    def _reap_at_its_end(self, pid: int) -> None:
        """For a worker that came after nobody waited any more: its socket is closed, so it ends by itself."""
        loop = asyncio.get_running_loop()
        descriptor = os.pidfd_open(pid)
        self._orphans.add(descriptor)

        def reap() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            os.waitpid(pid, 0)
            self._orphans.discard(descriptor)

        loop.add_reader(descriptor, reap)
