"""Who a process is: its id together with the moment it started, because the kernel hands out ids again."""

import sys
from pathlib import Path

import psutil

_PROC = Path("/proc")
# Field 3 of /proc/<pid>/stat is the state and field 22 the start in clock ticks since boot (proc(5)); both counted
# from behind the command name, which may itself hold spaces and parentheses.
_STATE, _STARTED = 0, 19
_DEAD = frozenset("ZXx")


def started(pid: int) -> int:
    """A mark of when the process started, comparable only with itself; 0 when there is none, or only a zombie."""
    if not sys.platform.startswith("linux"):
        return _started_elsewhere(pid)
    try:
        fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[_STATE].decode() in _DEAD else int(fields[_STARTED])


def _started_elsewhere(pid: int) -> int:
    try:
        process = psutil.Process(pid)
        return 0 if process.status() == psutil.STATUS_ZOMBIE else int(process.create_time() * 1000)
    except psutil.Error:
        return 0


def is_alive(pid: int, mark: int) -> bool:
    """Whether the process that had this id and this mark still runs."""
    return mark != 0 and started(pid) == mark
