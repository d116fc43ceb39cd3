"""What isolation this machine can really give: each part is tried, in a process of its own that is thrown away.

Run as a program it prints, as JSON, the parts and why each one that failed did; `probe` runs it. A configuration is
not believed, and neither is a kernel version: containers take away what the kernel has.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Literal, NoReturn

import msgspec

from headrace.agents.isolation import hardening, kernel, landlock, seccomp, zygote
from headrace.agents.isolation.frames import Bounds
from headrace.agents.isolation.kernel import PartMissing, part
from headrace.errors import IsolationUnavailable

_PROBE_TIMEOUT_S = 20.0
_REASON_BYTES_MAX = 1000
_WELL = "\N{CHECK MARK}"
_BASE_BYTES = 1 << 33
_BOUNDS = Bounds(64 << 20, 10.0, 32, 8, 4, 1 << 20, 1 << 16, 1 << 20)


class MissingPart(msgspec.Struct, frozen=True):
    """A part that could not be had."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


class Achievable(msgspec.Struct, frozen=True, kw_only=True):
    """What the probes achieved on this machine, as this user."""

    level: Literal["process", "trusted"]
    """`trusted`: no isolation at all."""
    missing: tuple[MissingPart, ...]
    """What `process` lacks."""
    landlock_abi: int
    """Version of this kernel's Landlock; 0: none. It denies TCP from 4 on, signals and abstract sockets from 6 on."""

    def require(self) -> None:
        """Raise `IsolationUnavailable` unless the level is `process`."""
        if self.missing:
            raise IsolationUnavailable(
                f"This machine cannot give isolation level 'process': it lacks {', '.join(map(str, self.missing))}."
            )


def probe() -> Achievable:
    """Try every part; takes about a tenth of a second, and blocks."""
    if sys.platform != "linux":
        return Achievable(level="trusted", missing=(MissingPart("Linux", f"this is {sys.platform}"),), landlock_abi=0)
    from headrace.agents.isolation import nursery
    from headrace.agents.isolation.limits import IsolationConfig

    parameters = nursery.boot_parameters(IsolationConfig())
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM, zygote.__file__, json.dumps(parameters)]
    try:
        done = subprocess.run(
            command, env=nursery.ENVIRONMENT, cwd="/", capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
        found = msgspec.json.decode(done.stdout, type=dict[str, str | int])
    except (OSError, subprocess.SubprocessError, msgspec.DecodeError) as error:
        return Achievable(level="trusted", missing=(MissingPart("probe", str(error)),), landlock_abi=0)
    abi = int(found.pop("landlock_abi"))
    missing = tuple(MissingPart(name, str(reason)) for name, reason in found.items() if reason)
    return Achievable(level="trusted" if missing else "process", missing=missing, landlock_abi=abi)


async def probe_in_thread() -> Achievable:
    """`probe` off the event loop."""
    return await asyncio.get_running_loop().run_in_executor(None, probe)


# The zygote's own way of importing; then every trial of this module.
_PROGRAM = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("zygote", sys.argv[1])
zygote = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zygote)
boot = json.loads(sys.argv[2])
zygote.make_importable(boot["package"], boot["path"])
from headrace.agents.isolation import probe
print(json.dumps(probe.trials(boot["readable"])))
"""


# -- in the program -----------------------------------------------------------------------------------------------

Trial = Callable[[int], None]
"""Tries a part; is given the descriptor on which to say how it went, should another process have to say it."""


def trials(readable: list[str]) -> dict[str, str | int]:
    """Each part with the reason why it failed, or an empty one; and the ABI of Landlock."""
    tries: dict[str, Trial] = {
        "pidfd": _try_pidfd,
        "Landlock": partial(_try_landlock, readable),
        "seccomp": _try_seccomp,
        **{name: partial(_try_namespace, flag) for name, flag in hardening.NAMESPACES.items()},
    }
    found: dict[str, str | int] = {name: _reason(trial) for name, trial in tries.items()}
    if not any(found.values()):
        # Each part can be had; now all of them together, as a worker has them.
        found["all parts together"] = _reason(partial(_try_together, readable))
    try:
        return {**found, "landlock_abi": kernel.landlock_version()}
    except OSError:
        return {**found, "landlock_abi": 0}


def _reason(trial: Trial) -> str:
    """Why a trial failed, as said by the child that made it; empty when it did not."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        _say(writing, trial)
    os.close(writing)
    with open(reading, "rb") as said:  # noqa: PTH123 - a descriptor
        text = said.read(_REASON_BYTES_MAX).decode(errors="replace")
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    return text.removesuffix(_WELL) if text else "its trial was killed"


def _say(writing: int, trial: Trial) -> NoReturn:
    said = "it ended without a word"
    try:
        trial(writing)
        said = _WELL
    except PartMissing as missing:
        said = f"{missing.part}: {missing.reason}"
    except OSError as error:
        said = error.strerror or str(error)
    finally:
        os.write(writing, said.encode()[:_REASON_BYTES_MAX])
        os._exit(0)


def _try_pidfd(_: int) -> None:
    os.close(os.pidfd_open(os.getpid()))


def _try_namespace(flag: int, _: int) -> None:
    # Root makes the zygote's mount namespace as root; a worker's namespaces are always made by an ordinary user.
    if os.geteuid() == 0 and flag != kernel.CLONE_NEWUSER:
        kernel.unshare(flag)
    else:
        kernel.unshare(flag | kernel.CLONE_NEWUSER)


def _try_landlock(readable: list[str], _: int) -> None:
    kernel.gain_nothing()
    landlock.enforce(readable=readable, writable=[])
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_DIRECTORY))
    except PermissionError:
        return
    raise OSError(0, "it is in force, and yet the root directory can be listed")


def _try_seccomp(_: int) -> None:
    kernel.gain_nothing()
    seccomp.enforce(pid=os.getpid())
    try:
        socket.socket(socket.AF_UNIX).close()
    except PermissionError:
        return
    raise OSError(0, "it is in force, and yet a socket can be opened")


def _try_together(readable: list[str], writing: int) -> None:
    proc = os.open("/proc", os.O_PATH)
    zygote.move_in(readable)

    def be_worker(is_mapped: bool) -> NoReturn:  # noqa: FBT001 - the zygote's word to its child
        _say(writing, partial(_harden, readable, is_mapped))

    zygote.fork(be_worker, proc)
    os._exit(0)  # the worker says how it went


def _harden(readable: list[str], is_mapped: bool, writing: int) -> None:  # noqa: FBT001 - the zygote's word
    keep = {0, 1, 2, writing}
    hardening.harden(is_mapped=is_mapped, scratch_bytes=_BOUNDS.scratch_bytes, readable=readable, keep=keep)
    with part("resource limits"):
        hardening.limit(_BOUNDS, base_bytes=_BASE_BYTES)
