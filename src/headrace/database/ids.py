"""Unique ids made by the client: 63 bits, roughly in the order of time, without asking anybody.

    41 bits  milliseconds since 2025-01-01 UTC, until 2094
    10 bits  node number, leased by one process at a time
    12 bits  sequence within the millisecond

The layout is Snowflake's (Twitter, 2010). What differs is the time: a lease is a number and a stretch of time, by the
home shard's clock, in which its holder may make ids. The next holder's stretch begins where that one ends. So two ids
can never be equal, whatever the clocks of the machines say, however long a process is paused, and whoever still
believes in his lease: an id outside of the stretch is not made. Inside of it time goes on by this machine's monotonic
clock.

What that rests on is the home shard's memory: a failover that loses commits may lose a lease. Use synchronous
replication there, as for anything else that must not be lost.
"""

import asyncio
import os
import uuid
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from headrace.clock import Clock, SystemClock
from headrace.errors import BackendError, BugError, CallerError, ConfigError, IdsUnavailable, NotOpen, StatementFailed
from headrace.events import IdNodeLost, Observer, Silent

if TYPE_CHECKING:
    from headrace.database.database import Database
    from headrace.database.postgres.nodes import Node

EPOCH_MS: Final = 1_735_689_600_000
"""2025-01-01 UTC, in milliseconds since 1970."""
NODES: Final = 1 << 10
SEQUENCES: Final = 1 << 12
_TIMES: Final = 1 << 41

_LOCK = 0x69647300  # "ids": any number, as long as it is always the same
_TABLE = f"""
CREATE TABLE IF NOT EXISTS headrace_id_nodes (
    node int PRIMARY KEY CHECK (node BETWEEN 0 AND {NODES - 1}), owner uuid NOT NULL, limit_ms bigint NOT NULL
)"""
_NOW = "now AS MATERIALIZED (SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS ms)"
_ACQUIRE = f"""
WITH {_NOW}, free AS (
    SELECT number, ms FROM now, generate_series(0, {NODES - 1}) AS number
    LEFT JOIN headrace_id_nodes AS taken ON taken.node = number
    WHERE taken.node IS NULL OR taken.limit_ms <= ms
    ORDER BY number LIMIT 1
)
INSERT INTO headrace_id_nodes (node, owner, limit_ms) SELECT number, $1, ms + $2::bigint FROM free
ON CONFLICT (node) DO UPDATE SET owner = excluded.owner, limit_ms = excluded.limit_ms
RETURNING node, limit_ms - $2::bigint, limit_ms"""  # noqa: S608 - both are constants
_RENEW = f"""
WITH {_NOW} UPDATE headrace_id_nodes SET limit_ms = greatest(limit_ms, ms + $3::bigint) FROM now
WHERE node = $1 AND owner = $2 RETURNING node, ms, limit_ms"""  # noqa: S608 - a constant
_RELEASE = "UPDATE headrace_id_nodes SET limit_ms = $3 WHERE node = $1 AND owner = $2 AND limit_ms > $3"
_PAUSE_S = 0.05


class IdParts(NamedTuple):
    """What an id says."""

    ms: int
    """Since 1970, by the home shard's clock."""
    node: int
    sequence: int


def parts_of(id_: int) -> IdParts:
    """Take an id apart."""
    if not 0 <= id_ < 1 << 63:
        raise CallerError(f"{id_} is no id of headrace.", fix="An id has 63 bits.")
    rest, sequence = divmod(id_, SEQUENCES)
    ms, node = divmod(rest, NODES)
    return IdParts(ms + EPOCH_MS, node, sequence)


class Lease(NamedTuple):
    """A node number, and the stretch of time in which its holder may make ids."""

    node: int
    start_ms: int
    """Now, by the home shard's clock."""
    limit_ms: int
    """The first millisecond that is not in it."""
    asked_at: float
    """This process's monotonic time when `start_ms` was asked for."""


class Wait(NamedTuple):
    """Why there is no id now."""

    seconds: float
    reason: str


class IdSequence:
    """The ids of one lease. Pure: `now` is monotonic time.

    Each id is above the one before. In a burst, or when the home shard's clock was set back, it borrows from the
    future, up to `ahead_ms_max`.
    """

    def __init__(self, lease: Lease, *, ahead_ms_max: int, after_ms: int = 0) -> None:
        self.lease = lease
        self.last_ms = max(lease.start_ms - 1, after_ms)
        self._sequence = SEQUENCES - 1
        self._ahead_ms_max = ahead_ms_max

    def renewed(self, lease: Lease) -> None:
        """Go on with more time of the same node number."""
        if lease.node != self.lease.node:
            raise BugError(f"The lease of node {self.lease.node} was renewed as {lease.node}.")
        self.lease = lease

    def take(self, now: float) -> int | Wait:
        """The next id, or how long to wait for one."""
        lease = self.lease
        time_ms = lease.start_ms + int((now - lease.asked_at) * 1000)
        ms, sequence = self.last_ms, self._sequence + 1
        if time_ms > ms or sequence == SEQUENCES:
            ms, sequence = max(time_ms, ms + 1), 0
        if ms >= lease.limit_ms:
            return Wait(0.0, f"the lease of node number {lease.node} ended and was not renewed")
        if ms - time_ms > self._ahead_ms_max:
            ahead_s = (ms - time_ms) / 1000
            return Wait(ahead_s - self._ahead_ms_max / 1000, f"the last id is {ahead_s:g} s ahead of time")
        self.last_ms, self._sequence = ms, sequence
        return (ms - EPOCH_MS) * (NODES * SEQUENCES) + lease.node * SEQUENCES + sequence


class Ids:
    """Makes unique ids: `async with Ids(database) as ids: await ids.next()`.

    For the loop that opened it. At most 1024 hold one open at the same time.
    """

    def __init__(
        self,
        database: "Database",
        *,
        lease_s: float = 30.0,
        wait_max_s: float = 2.0,
        ahead_ms_max: int = 1000,
        clock: Clock | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Leases are for `lease_s` and renewed after a third of it; a call waits at most `wait_max_s` for an id."""
        if not lease_s >= 1 or not wait_max_s >= 0 or ahead_ms_max < 1:
            raise ConfigError(f"Ids: lease_s={lease_s}, wait_max_s={wait_max_s}, ahead_ms_max={ahead_ms_max}.")
        self._database = database
        self._lease_ms = round(lease_s * 1000)
        self._wait_max_s = wait_max_s
        self._ahead_ms_max = ahead_ms_max
        self._clock = clock or SystemClock()
        self._observer = observer or Silent()
        self._owner = uuid.uuid4()
        self._sequence: IdSequence | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._pid = 0

    async def __aenter__(self) -> Self:
        """Lease a node number. Raises `IdsUnavailable` if all are taken, and what the home shard says."""
        await self._acquire()
        self._pid = os.getpid()
        self._renewal = asyncio.get_running_loop().create_task(self._renew_on())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the node number back, if the home shard can be asked; else it comes free when the lease ends."""
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.gather(self._renewal, return_exceptions=True)
        sequence, self._sequence = self._sequence, None
        if sequence is None:
            return
        try:
            await self._home.execute(_RELEASE, (sequence.lease.node, self._owner, sequence.last_ms + 1))
        except (BackendError, NotOpen):
            return

    @property
    def node(self) -> int | None:
        """The node number that is leased; None: not open."""
        return self._sequence.lease.node if self._sequence is not None else None

    async def next(self) -> int:
        """A new id. Raises `IdsUnavailable` when none can be made in time: it is never made up."""
        # A fork has the same lease in its memory, and may not use it.
        if self._sequence is None or self._pid != os.getpid():
            raise NotOpen("These Ids are not open in this process.", fix="Use them inside `async with Ids(database)`.")
        taken = self._sequence.take(self._clock.monotonic())
        return taken if isinstance(taken, int) else await self._wait()

    async def take(self, count: int) -> list[int]:
        """Several new ids, rising."""
        return [await self.next() for _ in range(count)]

    async def _wait(self) -> int:
        ends = self._clock.monotonic() + self._wait_max_s
        while self._sequence is not None:
            now = self._clock.monotonic()
            taken = self._sequence.take(now)
            if isinstance(taken, int):
                return taken
            if now + taken.seconds >= ends:
                raise IdsUnavailable(f"No id can be made within {self._wait_max_s:g} s: {taken.reason}.")
            await self._clock.sleep(min(max(taken.seconds, _PAUSE_S), ends - now))
        raise NotOpen("These Ids were closed.")

    @property
    def _home(self) -> "Node":
        return self._database.nodes[self._database.shard_map.home]

    async def _acquire(self) -> None:
        owner = uuid.uuid4()
        async with self._home.transaction() as transaction:
            await transaction.fetch("SELECT pg_advisory_xact_lock($1)", _LOCK)
            await transaction.execute(_TABLE)
            asked_at = self._clock.monotonic()  # not sooner: by how long others hold this up its ids would be ahead
            rows = await transaction.fetch(_ACQUIRE, owner, self._lease_ms)
        if not rows:
            raise IdsUnavailable(
                f"All {NODES} node numbers are leased.",
                fix="Open one Ids a process, and close it when it is not used.",
            )
        node, start_ms, limit_ms = rows[0]
        if not EPOCH_MS <= start_ms < limit_ms < EPOCH_MS + _TIMES:
            raise IdsUnavailable(
                f"The home shard's clock says {start_ms} ms, which no id can hold.", fix="Set that machine's clock."
            )
        self._owner = owner
        after_ms = self._sequence.last_ms if self._sequence is not None else 0
        lease = Lease(node, start_ms, limit_ms, asked_at)
        self._sequence = IdSequence(lease, ahead_ms_max=self._ahead_ms_max, after_ms=after_ms)

    async def _renew_on(self) -> None:
        pause_s = self._lease_ms / 3000
        while True:
            await self._clock.sleep(pause_s)
            try:
                await self._renew()
                pause_s = self._lease_ms / 3000
            except (BackendError, StatementFailed):
                # Ids are made until the lease ends, and then refused; asked again soon, for as long as it takes.
                pause_s = min(1.0, self._lease_ms / 10_000)

    async def _renew(self) -> None:
        sequence = self._sequence
        if sequence is None:
            return
        asked_at = self._clock.monotonic()
        rows = await self._home.fetch(_RENEW, (sequence.lease.node, self._owner, self._lease_ms))
        if rows:
            node, start_ms, limit_ms = rows[0]
            sequence.renewed(Lease(node, start_ms, limit_ms, asked_at))
            return
        self._observer.on(IdNodeLost(sequence.lease.node))
        await self._acquire()
