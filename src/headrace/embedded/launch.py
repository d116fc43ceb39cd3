"""Becomes an embedded server: takes on an identity, ties its life to the supervisor's, then execs.

Run by path as `python -I -S launch.py PARENT_PID SIGNAL MODE UID GID COMMAND...`; it imports nothing but the standard
library, so that it costs a bare interpreter start and no package of the user's can break it.

The order is the point. `PR_SET_PDEATHSIG` survives `execve` but the kernel clears it whenever credentials change, so
the identity comes first; and a parent that died before the `prctl` would never be noticed, so it is compared last.

Modes:

- `own`: run as whoever started us.
- `namespace`: a new user namespace in which we are UID:GID, while files and signals still see our own uid outside.
  This is how root runs a Postgres, which refuses uid 0, without giving files away. Needs Linux and its permission.
- `account`: become UID:GID for real (root only).

Where there is no `prctl` (macOS) nothing tells the server that its supervisor was killed: it lives on until the next
`prepare()` in its directory ends it.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

EXIT_PARENT_GONE = 123
EXIT_IDENTITY_REFUSED = 124
EXIT_NOT_EXECUTABLE = 126

_CLONE_NEWUSER = 0x10000000
_PR_SET_PDEATHSIG = 1


def enter_namespace(uid: int, gid: int) -> None:
    """Move into a user namespace where the own uid and gid are called `uid` and `gid`, and no others exist."""
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    # Whoever cannot add groups may not drop them either: the kernel wants this said before it takes a gid map.
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {outer_uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {outer_gid} 1")


def become_account(uid: int, gid: int) -> None:
    """Give up root for good: groups first, the uid last, because after it nothing else is allowed."""
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)


def take_identity(mode: str, uid: int, gid: int) -> None:
    """Become what `mode` says, or exit with EXIT_IDENTITY_REFUSED."""
    try:
        if mode == "namespace":
            enter_namespace(uid, gid)
        elif mode == "account":
            become_account(uid, gid)
    except (OSError, AttributeError) as error:  # AttributeError: a libc without `unshare`
        sys.stderr.write(f"launch: cannot run as {mode} {uid}:{gid}: {error}\n")
        sys.exit(EXIT_IDENTITY_REFUSED)


def reset_signals(death_signal: int) -> None:
    """Undo what a server would inherit: blocked signals, those that a shell ignores for `up &`, and Python's SIGPIPE.

    SIGXFSZ stays ignored, as Python has it: a file-size limit then comes back as an error that the server reports,
    instead of killing it without a word.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGPIPE, signal.SIGTERM, signal.SIGINT, death_signal):
        signal.signal(number, signal.SIG_DFL)


def die_with_parent(parent: int, death_signal: int) -> None:
    """Have the kernel send `death_signal` here when the thread that started us ends; exit if it has already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, death_signal)
    if os.getppid() != parent:
        sys.stderr.write(f"launch: the supervisor {parent} is gone\n")
        sys.exit(EXIT_PARENT_GONE)


def main(arguments: list[str]) -> None:
    """Do the steps in their order, and become the command."""
    parent, death_signal, mode, uid, gid, *command = arguments
    os.umask(0o077)
    take_identity(mode, int(uid), int(gid))
    reset_signals(int(death_signal))
    die_with_parent(int(parent), int(death_signal))
    try:
        os.execv(command[0], command)  # noqa: S606 - a list from our own caller, and no shell
    except OSError as error:
        sys.stderr.write(f"launch: cannot execute {command[0]}: {error}\n")
        sys.exit(EXIT_NOT_EXECUTABLE)


if __name__ == "__main__":
    main(sys.argv[1:])
