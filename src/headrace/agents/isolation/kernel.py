"""What a worker needs of Linux and Python does not offer: thin calls through ctypes, each raising `OSError`.

No compiler is needed and nothing is installed. Numbers and structures are from the kernel's uapi headers.
"""

import ctypes
import errno
import os
import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from headrace.agents.isolation import syscalls

CLONE_NEWNS = 0x0002_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000
CLONE_PARENT = 0x0000_8000

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x4_0000
MNT_DETACH = 2

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_CAPABILITY_VERSION_3 = 0x2008_0522

LANDLOCK_VERSION = 1
_LANDLOCK_PATH_BENEATH = 1

libc = ctypes.CDLL(None, use_errno=True)
# With the interpreter's lock held: nothing of Python runs between the two halves of a fork.
_locked = ctypes.PyDLL(None, use_errno=True)


class PartMissing(Exception):
    """The kernel did not grant one part of the isolation."""

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(part, reason)
        self.part = part
        self.reason = reason


@contextmanager
def part(name: str) -> Iterator[None]:
    """What fails inside is this part of the isolation."""
    try:
        yield
    except OSError as error:
        raise PartMissing(name, error.strerror or str(error)) from error


class MountAttributes(ctypes.Structure):
    """`struct mount_attr`."""

    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class RulesetAttributes(ctypes.Structure):
    """`struct landlock_ruleset_attr`."""

    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class PathBeneath(ctypes.Structure):
    """`struct landlock_path_beneath_attr`."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("access", ctypes.c_uint64), ("fd", ctypes.c_int32))


class FilterProgram(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


class CapabilityHeader(ctypes.Structure):
    """`struct __user_cap_header_struct`."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class CapabilityData(ctypes.Structure):
    """Two of `struct __user_cap_data_struct`."""

    _fields_ = (("words", ctypes.c_uint32 * 6),)


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def _argument(value: object) -> object:
    return ctypes.c_long(value) if isinstance(value, int) else value


def syscall(name: str, *arguments: object) -> int:
    """Make a system call that libc may have no function for."""
    return _checked(libc.syscall(ctypes.c_long(_number(name)), *map(_argument, arguments)))


def _number(name: str) -> int:
    column = syscalls.machine()
    number = None if column is None else syscalls.number(name, column)
    if number is None:
        raise OSError(errno.ENOSYS, f"this machine ({platform.machine()}) has no known number for {name}")
    return number


def prctl(option: int, *arguments: object) -> int:
    """`prctl(2)`."""
    padded = (*arguments, 0, 0, 0, 0)[:4]
    return _checked(libc.prctl(option, *map(_argument, padded)))


# -- processes ----------------------------------------------------------------------------------------------------


def fork_into(flags: int) -> int:
    """Fork with namespaces: 0 in the child.

    What `os.fork` does around the call is done here too. glibc's own bookkeeping is skipped: it matters to processes
    with threads, and the caller must have none.
    """
    clone = _number("clone")
    _locked.PyOS_BeforeFork()
    pid = _locked.syscall(ctypes.c_long(clone), *map(ctypes.c_long, (flags | signal.SIGCHLD, 0, 0, 0, 0)))
    error = ctypes.get_errno()
    if pid == 0:
        _locked.PyOS_AfterFork_Child()
        return 0
    _locked.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(error, os.strerror(error))
    return int(pid)


def unshare(flags: int) -> None:
    """Move this process into new namespaces."""
    _checked(libc.unshare(flags))


def die_with_parent() -> None:
    """Be killed when the thread that is the parent ends. A change of credentials resets it."""
    prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def be_undumpable() -> None:
    """No core, and no attaching by processes of the same user."""
    prctl(_PR_SET_DUMPABLE, 0)


def be_dumpable() -> None:
    """Let this process's own user reach its files in /proc again, after a change of user took that away."""
    prctl(_PR_SET_DUMPABLE, 1)


def gain_nothing() -> None:
    """Set no_new_privs."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Give up every capability for good."""
    for capability in range(64):
        try:
            prctl(_PR_CAPBSET_DROP, capability)
        except OSError:
            break  # one above the last that this kernel knows, or none may be dropped: the sets below matter more
    header = CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    _checked(libc.capset(ctypes.byref(header), ctypes.byref(CapabilityData())))


def install_filter(program: bytes) -> None:
    """Let a BPF program decide about every later system call of this process."""
    prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(FilterProgram(len(program) // 8, program)))


def set_host_name(name: bytes) -> None:
    """The name in this uts namespace."""
    _checked(libc.sethostname(name, len(name)))


# -- mounts -------------------------------------------------------------------------------------------------------


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """`mount(2)`."""
    _checked(
        libc.mount(
            source.encode(),
            target.encode(),
            None if kind is None else kind.encode(),
            ctypes.c_ulong(flags),
            options.encode() or None,
        )
    )


def detach(path: str) -> None:
    """Take a mount and all below it out of sight."""
    _checked(libc.umount2(path.encode(), MNT_DETACH))


def copy_of_tree(path: str) -> int:
    """A descriptor of a copy of the mounts at `path`, not yet visible anywhere."""
    return syscall("open_tree", _AT_FDCWD, path.encode(), _OPEN_TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC)


def make_read_only(tree: int) -> None:
    """No writes, devices or set-user-ids in this tree of mounts."""
    wanted = MountAttributes(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV, 0, 0, 0)
    flags = _AT_EMPTY_PATH | _AT_RECURSIVE
    syscall("mount_setattr", tree, b"", flags, ctypes.byref(wanted), ctypes.sizeof(wanted))


def attach(tree: int, path: str) -> None:
    """Show a copied tree at `path`."""
    syscall("move_mount", tree, b"", _AT_FDCWD, path.encode(), _MOVE_MOUNT_F_EMPTY_PATH)


def swap_root() -> None:
    """Make the current directory, which is a mount, the root, and put the old one on top of it."""
    syscall("pivot_root", b".", b".")


# -- Landlock -----------------------------------------------------------------------------------------------------


def landlock_version() -> int:
    """The ABI of this kernel's Landlock; raises when there is none or it is switched off."""
    return syscall("landlock_create_ruleset", None, 0, LANDLOCK_VERSION)


def landlock_ruleset(attributes: RulesetAttributes, size: int) -> int:
    """A new ruleset's descriptor. `size` is what the kernel's ABI knows of the structure."""
    return syscall("landlock_create_ruleset", ctypes.byref(attributes), size, 0)


def landlock_allow(ruleset: int, access: int, directory: int) -> None:
    """Allow `access` to everything below an open directory."""
    rule = PathBeneath(access, directory)
    syscall("landlock_add_rule", ruleset, _LANDLOCK_PATH_BENEATH, ctypes.byref(rule), 0)


def landlock_enforce(ruleset: int) -> None:
    """Hold this process, and all it starts, to the ruleset."""
    syscall("landlock_restrict_self", ruleset, 0)
