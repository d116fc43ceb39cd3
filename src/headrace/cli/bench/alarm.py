"""A wake-up that is late by microseconds instead of milliseconds.

Event loops keep time in whole milliseconds (uvloop's timers, epoll's time-out), which would add half a millisecond to
what a request appears to take: several times what a cached answer needs. Linux has a clock that an event loop reads
like a socket, timerfd(2); Python offers it from 3.13 on, so it is reached through the C library here. Elsewhere the
loop's own timer has to do, and the run's `lag_ms` shows it.
"""

import asyncio
import ctypes
import os
import sys
from collections.abc import Callable

GRANULARITY_S = 0.0005
"""The alarm rings at most this often: at high rates a wake-up serves several requests, and each saves its own."""

_CLOCK_MONOTONIC = 1
_TFD_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC
_NANOSECONDS = 1_000_000_000


class _Itimerspec(ctypes.Structure):
    """struct itimerspec of a 64-bit Linux: interval, then value, each in seconds and nanoseconds."""

    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class Alarm:
    """Calls `ring` once, after the delay that was set last."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._handle: asyncio.TimerHandle | None = None
        self._fd = -1
        if sys.platform == "linux":
            libc = ctypes.CDLL(None)
            self._settime = libc.timerfd_settime
            self._fd = libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK_CLOEXEC)
        if self._fd >= 0:
            self._spec = _Itimerspec()
            self._reference = ctypes.byref(self._spec)
            loop.add_reader(self._fd, self._on_readable)

    def set(self, delay_s: float) -> None:
        """Ring after `delay_s` seconds, at the soonest after `GRANULARITY_S`; replaces an earlier setting."""
        delay_s = max(delay_s, GRANULARITY_S)
        if self._fd >= 0:
            self._spec.value_s, self._spec.value_ns = divmod(int(delay_s * _NANOSECONDS), _NANOSECONDS)
            self._settime(self._fd, 0, self._reference, None)
        else:
            if self._handle is not None:
                self._handle.cancel()
            self._handle = self._loop.call_later(delay_s, self._ring)

    def close(self) -> None:
        """Never ring again."""
        if self._handle is not None:
            self._handle.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _on_readable(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return  # set again between the ring and this call
        self._ring()
