"""How well a pool's connections are used, and how many of a server's are ours. Pure.

Efficiency is the share of opened connection-seconds in which a connection belonged to a caller. Alone it would
reward starvation: a pool of one is always busy while everybody waits. So it is counted second by second, and the work
of a second in which the 99th percentile of waiting for a connection was above the limit does not count; the
connection-seconds opened in it do. Seconds without any demand are left out: a pool is kept open for the next burst.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Final, NamedTuple

WINDOW_S: Final = 60
"""Seconds that the figures cover."""
APPLICATION: Final = "headrace"
"""First word of the application_name of our sessions; the rest is different for every pool."""
# Only client sessions count against the limit; of other roles' sessions the kind is not shown, but the name is.
ROOM: Final = f"""
SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
       - coalesce(nullif(current_setting('reserved_connections', true), '')::int, 0),
       count(*) FILTER (WHERE application_name NOT LIKE '{APPLICATION} %'),
       count(DISTINCT application_name) FILTER (WHERE application_name LIKE '{APPLICATION} %')
FROM pg_stat_activity
WHERE usesysid IS NOT NULL AND coalesce(backend_type, 'client backend') = 'client backend'"""  # noqa: S608 - of constants
"""Asks a server for the fields of `Room`."""
_WAITS_MAX: Final = 1000
"""Waits of one second that are looked at; of a faster pool its first ones."""


class PoolUsage(NamedTuple):
    """The last minute of a pool, as far as there was demand."""

    efficiency: float | None
    """Busy share of the opened connection-seconds, those of seconds with too long a wait counted as idle; None: no
    demand."""
    wait_p99_s: float | None
    """99th percentile of waiting for a connection."""


@dataclass(slots=True)
class _Second:
    number: int
    busy_s: float = 0.0
    opened_s: float = 0.0
    waits: list[float] = field(default_factory=list)


class UsageMeter:
    """Adds up connection-seconds between changes."""

    __slots__ = ("_at", "_busy", "_limit_s", "_opened", "_seconds")

    def __init__(self, *, wait_p99_max_s: float, now: float) -> None:
        self._limit_s = wait_p99_max_s
        self._at = now
        self._busy = self._opened = 0
        self._seconds: deque[_Second] = deque(maxlen=WINDOW_S)

    def change(self, now: float, *, busy: int, opened: int) -> None:
        """From now on so many are opened, and so many of them busy."""
        self._pass(now)
        self._busy, self._opened = busy, max(opened, busy)

    def waited(self, now: float, seconds: float) -> None:
        """Somebody got a connection after this wait."""
        self._pass(now)
        waits = self._second(now).waits
        if len(waits) < _WAITS_MAX:
            waits.append(seconds)

    def usage(self, now: float) -> PoolUsage:
        """The figures of the last minute."""
        self._pass(now)
        recent = [second for second in self._seconds if second.number > now - WINDOW_S]
        asked = [second for second in recent if second.waits or second.busy_s]
        opened = sum(second.opened_s for second in asked)
        busy = sum(second.busy_s for second in asked if (_p99(second.waits) or 0.0) <= self._limit_s)
        waits = [wait for second in recent for wait in second.waits]
        return PoolUsage(min(1.0, busy / opened) if opened else None, _p99(waits))

    def _pass(self, now: float) -> None:
        """Account for the time since the last change."""
        while self._at < now:
            second = self._second(self._at)
            ends = min(now, second.number + 1.0)
            second.busy_s += self._busy * (ends - self._at)
            second.opened_s += self._opened * (ends - self._at)
            if now - ends > WINDOW_S:
                ends = now - WINDOW_S  # nothing older is ever shown
            self._at = ends

    def _second(self, at: float) -> _Second:
        number = int(at)
        if not self._seconds or self._seconds[-1].number < number:
            self._seconds.append(_Second(number))
        return self._seconds[-1]


def _p99(waits: list[float]) -> float | None:
    return sorted(waits)[min(len(waits) - 1, len(waits) * 99 // 100)] if waits else None


class NodeStatistics(NamedTuple):
    """The connections of this process to one node."""

    connections: int
    idle: int
    waiting: int
    available: bool
    """It answered last time, and nothing is missing that must run before it serves."""
    connections_max: int = 0
    """How many it may have now: what was configured, or this process's share of the server."""
    efficiency: float | None = None
    """Busy share of the opened connection-seconds of the last minute (see `pool_usage`); None: no demand."""
    wait_p99_s: float | None = None
    """99th percentile of waiting for a connection, over the same minute."""
    unknown: int = 0
    """Writes of which nobody knows whether they were kept."""
    resolved: int = 0
    """Writes of which it was found out."""


class Room(NamedTuple):
    """What a server says of its connections."""

    limit: int
    """That a role without privileges may have: `max_connections` without the reserved ones."""
    others: int
    """Taken by clients that are none of our pools."""
    pools: int
    """Pools of ours, of all processes."""


def fair_share(room: Room, wanted: int) -> int:
    """Connections that each pool may have so that all of them fit; at least one."""
    return max(1, min(wanted, (room.limit - room.others) // max(1, room.pools)))
