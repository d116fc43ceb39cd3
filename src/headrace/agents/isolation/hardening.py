"""How a worker gives up what it does not need, in the one order that works.

Mounts need capabilities, and a change of credentials resets the parent-death signal; seccomp is last because it
forbids all of it.
"""

import os
import resource
from collections.abc import Collection

from headrace.agents.isolation import kernel, landlock, root, seccomp
from headrace.agents.isolation.frames import Bounds
from headrace.agents.isolation.kernel import PartMissing, part

NAMESPACES = {
    "user namespace": kernel.CLONE_NEWUSER,
    "mount namespace": kernel.CLONE_NEWNS,
    "pid namespace": kernel.CLONE_NEWPID,
    "ipc namespace": kernel.CLONE_NEWIPC,
    "network namespace": kernel.CLONE_NEWNET,
    "uts namespace": kernel.CLONE_NEWUTS,
}
NICENESS = 5
"""Below whoever hosts the worker: a spinning agent takes what the host leaves."""

_CPU_GRACE_S = 1
_FORBIDDEN = ("RTPRIO", "MEMLOCK", "MSGQUEUE", "CORE")


def harden(*, is_mapped: bool, scratch_bytes: int, readable: Collection[str], keep: Collection[int]) -> None:
    """Hold this process to the isolation; raises `PartMissing` at the first part that cannot be had.

    What is left are the limits, which are known when there is an agent.
    """
    if not is_mapped:
        raise PartMissing("user namespace", "its user could not be mapped")
    os.setsid()
    os.nice(NICENESS)
    with part("uts namespace"):
        kernel.set_host_name(b"worker")
    with part("mount namespace"):
        if scratch_bytes:
            root.mount_scratch(scratch_bytes)
    close_all_but(keep)
    with part("capabilities"):  # no_new_privs is inherited from the zygote; a new user namespace gives all of these
        kernel.drop_capabilities()
    with part("parent-death signal"):
        kernel.be_undumpable()
        kernel.die_with_parent()
    with part("Landlock"):
        landlock.enforce(readable=readable, writable=[root.SCRATCH] if scratch_bytes else [])
    with part("seccomp"):
        seccomp.enforce(pid=os.getpid())


def limit(bounds: Bounds, *, base_bytes: int) -> None:
    """Set the resource limits, for good. The address space is counted from `base_bytes` on."""
    cpu_s = max(1, round(bounds.cpu_s))
    wanted = {
        "AS": base_bytes + bounds.memory_bytes,
        "NOFILE": bounds.files,
        "NPROC": bounds.processes,
        "FSIZE": bounds.scratch_bytes,
        **dict.fromkeys(_FORBIDDEN, 0),
    }
    for name, value in wanted.items():
        which = getattr(resource, f"RLIMIT_{name}", None)
        if which is not None:
            _lower(which, value, value)
    # SIGXCPU at the first, which kills by itself; SIGKILL a second later for whoever ignores it.
    _lower(resource.RLIMIT_CPU, cpu_s, cpu_s + _CPU_GRACE_S)


def _lower(which: int, soft: int, hard: int) -> None:
    ceiling = resource.getrlimit(which)[1]
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(which, (soft, hard))


def close_all_but(keep: Collection[int]) -> None:
    """Close every other descriptor, those of the interpreter's own too."""
    first = 0
    for descriptor in sorted(keep):
        if first < descriptor:  # an empty range is taken as an endless one by CPython 3.11
            os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))
