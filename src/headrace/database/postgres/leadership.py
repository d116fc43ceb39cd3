"""Keeps to the server of a shard that leads. A thin shell around `leader`."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from headrace.clock import Clock
from headrace.database.postgres.leader import SIGHTING, Leader, Lineage, NoLeader, Sighting, choose_leader

_FRESH_S: Final = 0.2
"""A look at the servers that is no older answers the next one who asks, too."""


class Leadership:
    """Who leads a shard, as far as this process knows."""

    def __init__(
        self,
        hosts: Mapping[str, str],
        *,
        ask: Callable[[str, str, float], Awaitable[Sequence[Any] | None]],
        follow: Callable[[Leader | NoLeader], Awaitable[None]],
        timeout_s: float,
        clock: Clock,
    ) -> None:
        self.lineage = Lineage()
        self._hosts = hosts
        self._ask = ask
        self._follow = follow
        self._timeout_s = timeout_s
        self._clock = clock
        self._leader: Leader | NoLeader | None = None
        self._looked_at = -float("inf")
        self._looking: asyncio.Task[Leader | NoLeader] | None = None

    def met(self, seen: Sighting) -> str | None:
        """Take note of a server that was connected to; why it may not be written to, if it may not."""
        objection = self.lineage.objection(seen)
        self.lineage = self.lineage.after(seen)
        return objection

    async def look(self) -> Leader | NoLeader:
        """Ask every server who it is; `follow` is told of a leader that is another than before, or none any more."""
        is_fresh = self._clock.monotonic() - self._looked_at < _FRESH_S
        if self._looking is None or (self._looking.done() and not is_fresh):
            self._looking = asyncio.get_running_loop().create_task(self._elect())
        # One look for all who wait, which outlives the one that began it.
        await asyncio.wait({self._looking})
        return self._looking.result()

    async def answers(self) -> bool:
        """Whether the server that is written to answers one who comes anew; any of them, if none is known to lead."""
        leader = self._leader
        asked = [leader.address] if isinstance(leader, Leader) else list(self._hosts)
        return any(await asyncio.gather(*(self._sight(address, self._hosts[address]) for address in asked)))

    async def close(self) -> None:
        """Wait for a look that is under way; it ends within the timeout."""
        if self._looking is not None:
            await asyncio.wait({self._looking})

    async def _elect(self) -> Leader | NoLeader:
        # The dead refuse at once; one that is frozen or cut off has only the timeout.
        asked = await asyncio.gather(*(self._sight(address, dsn) for address, dsn in self._hosts.items()))
        sightings = [seen for seen in asked if seen is not None]
        found, self.lineage = choose_leader(sightings, self.lineage, asked=len(asked))
        self._looked_at = self._clock.monotonic()
        before = self._leader
        if isinstance(found, Leader) or (found.is_fenced and not isinstance(before, NoLeader)):
            self._leader = found
        if self._leader != before and before is not None and self._leader is not None:
            await self._follow(self._leader)
        return found

    async def _sight(self, address: str, dsn: str) -> Sighting | None:
        row = await self._ask(dsn, SIGHTING, self._timeout_s)
        return None if row is None else Sighting.of(address, row)
