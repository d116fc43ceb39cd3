"""Keeps a process under the map that is in force: agrees on it when it opens, and notices when it is overtaken."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from headrace.clock import Clock
from headrace.database.kept_map import (
    KeptMap,
    agreed_map,
    check_fits,
    check_map,
    check_shard,
    decide_map,
    keep_map,
    read_epoch,
    read_map,
)
from headrace.database.postgres.nodes import Node
from headrace.database.shard_map import ShardMap
from headrace.errors import ConfigError, DatabaseUnavailable, HeadraceError
from headrace.events import Observer, ShardMapChanged

_TICK_S: Final = 1.0
_LOOK_MAX_S: Final = 2.0
_PAUSE_S: Final = 0.02
_PAUSE_MAX_S: Final = 0.5


class MapKeeper:
    """The shard map of one process.

    A router that was overtaken finds out in three ways: a shard is reached anew, a shard's fence refuses a write, or
    the next look is due. Each of them reads one number from each shard, and a map only where that number is higher.
    """

    def __init__(
        self,
        nodes: Mapping[str, Node],
        plan: ShardMap,
        *,
        look_s: float,
        adopt: Callable[[ShardMap], None],
        clock: Clock,
        observer: Observer,
    ) -> None:
        self.shard_map = plan
        self._nodes = nodes
        self._look_s = look_s
        self._adopt = adopt
        self._clock = clock
        self._observer = observer
        self._looks: dict[str, list[asyncio.Task[None]]] = {}
        """Of each shard, the look that is under way and the one after it, if somebody asked meanwhile."""

    async def agree(self) -> None:
        """Compare with every shard that is reached, before one of them is told to keep what another would refuse.

        Raises `ConfigError` if the configuration makes another map than they keep.
        """
        reached = [node for node in self._nodes.values() if node.available]
        kept: list[KeptMap] = []
        for node, found in zip(reached, await asyncio.gather(*map(_read, reached)), strict=True):
            if found is not None:
                check_shard(found, node.name)
                kept.append(found)
        agreed = agreed_map(kept, self.shard_map)
        if agreed is self.shard_map:
            for found in kept:
                check_map(found, KeptMap(found.shard, agreed))
            return
        check_fits(agreed, self.shard_map, self._nodes)
        self._take(agreed)

    async def decide_first(self) -> None:
        """Let the home shard, if it is reached, keep the first map before the others do.

        Of two processes that open new shards with different configurations, one is refused here, before a shard was
        told by each of them.
        """
        home = self._nodes.get(self.shard_map.home)
        if home is not None and home.available:
            await self.keep(home)

    async def keep(self, node: Node) -> None:
        """Let a shard keep the map, or take over the newer one that it keeps; before it serves anything else."""
        if node.name in self._nodes:  # a replica has the row of its primary
            self._take((await keep_map(node, self.shard_map)).shard_map)

    async def publish(self, following: ShardMap) -> None:
        """Put the next map into force and tell every shard that is reached; the others are told when they are.

        Returns when it is decided. Raises `ShardMapOutdated` if another process was first (then that one's map is in
        force here, too) and `DatabaseUnavailable` if the home shard cannot be asked. If it raises `OutcomeUnknown`,
        look at `shard_map` a moment later.
        """
        home = self._nodes.get(self.shard_map.home)
        if home is None:
            raise ConfigError(
                f"The home of the shard map, {self.shard_map.home}, is not configured.", fix="Configure every shard."
            )
        try:
            await decide_map(home, following)
        except HeadraceError:
            await self.refresh()
            raise
        self._take(following)
        await self.refresh()

    async def refresh(self) -> None:
        """Look at every shard that is reached, for at most two seconds: take over a newer map, hand on ours."""
        looks = [self._ask(node) for node in self._nodes.values() if node.available]
        if looks:
            # Not cancelled when it takes longer: a frozen server's look ends when it thaws, and is the only one there.
            await asyncio.wait(looks, timeout=_LOOK_MAX_S)

    async def overtaken(self, epoch: int, *, timeout_s: float) -> bool:
        """Wait until a newer map than that of the epoch is in force here; False if none is found in time."""
        ends, pause_s = self._clock.monotonic() + timeout_s, _PAUSE_S
        while self.shard_map.epoch <= epoch:
            await self.refresh()
            if self.shard_map.epoch > epoch:
                break
            left_s = ends - self._clock.monotonic()
            if left_s <= 0:
                return False
            await self._clock.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _PAUSE_MAX_S)
        return True

    async def watch(self) -> None:
        """Look when it is due, and when a shard is back; until cancelled."""
        looked_at, reached = self._clock.monotonic(), self._reached()
        while True:
            await self._clock.sleep(min(_TICK_S, self._look_s))
            now, before, reached = self._clock.monotonic(), reached, self._reached()
            if now - looked_at >= self._look_s or reached - before:
                await self.refresh()
                looked_at = now

    async def close(self) -> None:
        """End what still looks."""
        looks = [look for each in self._looks.values() for look in each]
        for look in looks:
            look.cancel()
        await asyncio.gather(*looks, return_exceptions=True)

    def _reached(self) -> set[str]:
        return {name for name, node in self._nodes.items() if node.available}

    def _ask(self, node: Node) -> asyncio.Task[None]:
        """A look that begins from now on: one under way may have been answered before what its caller is to see."""
        looks = [look for look in self._looks.get(node.name, ()) if not look.done()]
        if len(looks) < 2:
            looks.append(asyncio.get_running_loop().create_task(self._look(node, list(looks))))
        self._looks[node.name] = looks
        return looks[-1]

    async def _look(self, node: Node, before: list[asyncio.Task[None]]) -> None:
        if before:
            await asyncio.wait(before)
        try:
            epoch = await read_epoch(node)
            if epoch is not None and epoch != self.shard_map.epoch:
                await self.keep(node)
        except HeadraceError:
            # A shard that does not answer, or may not be written to, is looked at again when the next look is due.
            return

    def _take(self, shard_map: ShardMap) -> None:
        if shard_map.epoch > self.shard_map.epoch:
            before, self.shard_map = self.shard_map, shard_map
            self._adopt(shard_map)
            moved = len(before.moves_to(shard_map)) if before.rule == shard_map.rule else 0
            self._observer.on(ShardMapChanged(before.epoch, shard_map.epoch, moved))


async def _read(node: Node) -> KeptMap | None:
    try:
        return await read_map(node)
    except DatabaseUnavailable:
        return None
