"""The file system that workers see: a few directories of libraries, read-only, under a root of their own.

Built once by the zygote, before it gives up its rights; each worker's mount namespace is a copy of its.
"""

import os
import posixpath
from collections.abc import Sequence

from headrace.agents.isolation import kernel

SCRATCH = "/scratch"
"""What workers find as TMPDIR: not /tmp, below which an interpreter and its libraries may live that it would hide."""
_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
_ROOT_BYTES = 1 << 20
# It must exist for the zygote to write uid maps, and is needed no more when it is covered.
_STAGE = "/proc"


def system_directories() -> list[str]:
    """Where the libraries are that extension modules link to."""
    return [path for path in _SYSTEM if os.path.isdir(path)]  # noqa: PTH112 - pathlib is not loaded in the zygote


def build(readable: Sequence[str]) -> None:
    """Become a process that sees the `readable` directories and an empty scratch directory, and nothing else.

    Needs CAP_SYS_ADMIN over a mount namespace of its own.
    """
    os.umask(0o022)  # the host's may be stricter, and who will live here is not who makes the directories
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    links, directories = _sorted_out(readable)
    # Copies are taken before anything is covered: a library may live below the stage.
    trees = [(path, kernel.copy_of_tree(path)) for path in directories]
    kernel.mount("tmpfs", _STAGE, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, f"size={_ROOT_BYTES},mode=755")
    os.chdir(_STAGE)
    for path, tree in trees:
        os.makedirs(path[1:], mode=0o755, exist_ok=True)  # noqa: PTH103 - pathlib is not loaded in the zygote
        kernel.make_read_only(tree)
        kernel.attach(tree, path[1:])
        os.close(tree)
    for path, target in links:
        if not os.path.lexists(path[1:]):
            os.makedirs(posixpath.dirname(path[1:]) or ".", exist_ok=True)  # noqa: PTH103 - as above
            os.symlink(target, path[1:])  # noqa: PTH211 - as above
    os.makedirs(SCRATCH[1:], exist_ok=True)  # noqa: PTH103 - as above
    kernel.swap_root()
    kernel.detach(".")
    os.chdir("/")
    root = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        kernel.make_read_only(root)
    finally:
        os.close(root)


def mount_scratch(size_bytes: int) -> None:
    """A private directory to write to; it counts as memory, within its own limit."""
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("tmpfs", SCRATCH, "tmpfs", flags, f"size={size_bytes},nr_inodes=1024,mode=700")


def _sorted_out(readable: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Links to be made, and real directories, none within another."""
    links, real = [], set()
    for path in readable:
        target = os.path.realpath(path)
        real.add(target)
        if target != path:
            links.append((path, target))
    directories: list[str] = []
    for path in sorted(real):
        if not directories or not path.startswith(f"{directories[-1]}/"):
            directories.append(path)
    return links, directories
