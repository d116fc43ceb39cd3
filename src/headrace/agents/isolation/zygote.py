"""The process that workers are forked from: clean, small, without threads and without a secret.

Executed as a program by `nursery.py` with an empty environment and one socket. It imports what workers need, moves
into a root that holds libraries only, gives up its rights, and then forks a worker for each request. A worker is made
a child of the host, not of the zygote: it dies with the host, lives on without the zygote, and the host sees its end.
"""

import gc
import importlib
import json
import os
import sys
import types
from collections.abc import Callable
from functools import partial
from socket import CMSG_LEN, SCM_RIGHTS, SOL_SOCKET, socket
from typing import Any, NoReturn

REQUEST_BYTES_MAX = 4096
_DESCRIPTORS = 3  # of a request: the worker's socket, its stdout and stderr, and the page it marks its steps on
_NOBODY = 65534
_WORKER_PID = 1  # as it sees itself: the first of its pid namespace


def main(arguments: list[str]) -> None:
    """Serve until the host is gone. `arguments`: the socket's descriptor and the start parameters as JSON."""
    host = socket(fileno=int(arguments[0]))
    boot = json.loads(arguments[1])
    del sys.argv[1:], sys.orig_argv[1:]  # an agent need not know where its host is installed
    make_importable(boot["package"], boot["path"])
    kernel = importlib.import_module("headrace.agents.isolation.kernel")
    try:
        kernel.die_with_parent()
        if os.getppid() != boot["host"]:
            return
        base_bytes, proc = _settle_in(boot)
    except kernel.PartMissing as missing:
        host.send(json.dumps({"missing": missing.part, "reason": missing.reason}).encode())
        return
    host.send(json.dumps({"ready": True}).encode())
    _serve(host, proc, base_bytes, boot["readable"])


def make_importable(package: str, path: list[str]) -> None:
    """Let our modules be imported without what their packages import: drivers, and whatever those know."""
    sys.path[:] = path
    sys.dont_write_bytecode = True
    directory = package
    for name in ("headrace", "headrace.agents", "headrace.agents.isolation"):
        if name != "headrace":
            directory = f"{directory}/{name.rpartition('.')[2]}"
        empty = types.ModuleType(name)
        empty.__path__ = [directory]
        sys.modules[name] = empty


def _settle_in(boot: Any) -> tuple[int, int]:
    """Import, then give up everything; the size of the address space, and a descriptor of /proc."""
    from headrace.agents.isolation.kernel import part

    importlib.import_module("headrace.agents.isolation.worker")
    for name in boot["preload"]:
        importlib.import_module(name)
    proc = os.open("/proc", os.O_PATH | os.O_CLOEXEC)
    with part("out-of-memory score"):  # when memory runs out, workers go before their host
        score = os.open("self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        os.write(score, b"1000")
        os.close(score)
    move_in(boot["readable"])
    with open(os.open("self/statm", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)) as statm:  # noqa: PTH123 - no pathlib
        base_bytes = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    importlib.import_module("headrace.agents.isolation.seccomp").compiled(pid=_WORKER_PID)
    gc.collect()
    gc.freeze()
    return base_bytes, proc


def move_in(readable: list[str]) -> None:
    """See the readable directories only, be an ordinary user, and be able to gain nothing any more."""
    from headrace.agents.isolation import kernel, root
    from headrace.agents.isolation.kernel import part

    if os.geteuid() == 0:
        with part("mount namespace"):
            kernel.unshare(kernel.CLONE_NEWNS)
        with part("private root"):
            root.build(readable)
        with part("unprivileged user"):
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
            kernel.be_dumpable()
    else:
        uid, gid = os.geteuid(), os.getegid()
        with part("user namespace"):
            kernel.unshare(kernel.CLONE_NEWUSER)
            write_maps("/proc/self", uid, gid)
        with part("mount namespace"):
            kernel.unshare(kernel.CLONE_NEWNS)
        with part("private root"):
            root.build(readable)
    with part("no_new_privs"):
        kernel.gain_nothing()
    with part("capabilities"):
        kernel.drop_capabilities()
    with part("parent-death signal"):
        kernel.die_with_parent()


def write_maps(process: str, uid: int, gid: int, *, proc: int | None = None) -> None:
    """Name one user and one group in a new user namespace as they are named outside."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        descriptor = os.open(f"{process}/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def _serve(host: socket, proc: int, base_bytes: int, readable: list[str]) -> None:
    """Fork a worker for each request, until the host closes its end."""
    while True:
        data, descriptors = _receive(host)
        if not data:
            return  # the host is gone
        request = json.loads(data)
        answer = {"number": request["number"], **_answer(request, descriptors, proc, base_bytes, readable)}
        for descriptor in descriptors:
            os.close(descriptor)
        try:
            host.send(json.dumps(answer).encode())
        except BrokenPipeError:
            return  # as above; its worker sees the same


def _receive(host: socket) -> tuple[bytes, list[int]]:
    data, ancillary, _, _ = host.recvmsg(REQUEST_BYTES_MAX, CMSG_LEN(_DESCRIPTORS * 4))
    descriptors: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (SOL_SOCKET, SCM_RIGHTS):
            descriptors += [int.from_bytes(content[at : at + 4], sys.byteorder) for at in range(0, len(content), 4)]
    return data, descriptors


def _answer(
    request: Any, descriptors: list[int], proc: int, base_bytes: int, readable: list[str]
) -> dict[str, object]:
    from headrace.agents.isolation import worker

    be_worker = partial(
        worker.run, descriptors, scratch_bytes=request["scratch_bytes"], base_bytes=base_bytes, readable=readable
    )
    try:
        return {"pid": fork(be_worker, proc)}
    except OSError as error:
        return {"failed": error.strerror or str(error)}


def fork(become: Callable[[bool], NoReturn], proc: int) -> int:
    """Fork a process in namespaces of its own, a child of our parent; it is told whether its user has a name there."""
    from headrace.agents.isolation import hardening, kernel

    mapped, map_done = os.pipe()
    try:
        pid = kernel.fork_into(sum(hardening.NAMESPACES.values()) | kernel.CLONE_PARENT)
        if pid == 0:
            os.close(map_done)
            become(os.read(mapped, 1) == b"1")
        # When this fails the pipe is closed without the byte, and the worker ends by itself.
        write_maps(str(pid), os.geteuid(), os.getegid(), proc=proc)
        os.write(map_done, b"1")
        return pid
    finally:
        os.close(mapped)
        os.close(map_done)


if __name__ == "__main__":
    main(sys.argv[1:])
