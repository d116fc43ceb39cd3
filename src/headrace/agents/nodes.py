"""This process as one of several nodes: it renews a lease on every shard, and gives the work of dead nodes to others.

One write for a node and beat, whatever it runs. A lease is measured by the clock of the shard alone, so clocks of
machines need not agree. Nobody has to be sure that a silent node is dead: it is given up by deleting its row, and what
it owned gets other owners in the same table in which it would have to write, so whatever it still does changes nothing
there. A node that finds its row gone joins again under a new name and stops what it ran under the old one.
"""

import asyncio
import os
from collections.abc import Callable

from headrace.agents.admission import Admission
from headrace.agents.config import AgentsConfig
from headrace.agents.store import AgentStore, Key
from headrace.clock import Clock
from headrace.errors import BackendError, DatabaseUnavailable
from headrace.events import NodeFenced, NodesLost, Observer

BEATS_IN_A_LEASE = 5
_SETTLED_S = 30.0
"""What was begun longer ago is either known here or nobody's: no answer is waited for so long."""
_FORGET_S = 60.0
"""How often old executions are looked for."""
_FORGET_FIRST, _FORGET_MAX = 1_000, 16_000
"""Finished executions that are deleted at once: twice as many each time while there are so many."""
_FORGET_PAUSES = 2
"""How many times as long as a deletion took the shard is left alone, so a node spends a third of its time at most."""


class Membership:
    """The node's names by shard, and the loops that keep them."""

    def __init__(
        self,
        store: AgentStore,
        config: AgentsConfig,
        admission: Admission,
        *,
        name: str,
        clock: Clock,
        observer: Observer,
        cancel: Callable[[Key], object],
        interrupt: Callable[[str], int],
        known: Callable[[], list[Key]],
    ) -> None:
        self._store = store
        self._config = config
        self._admission = admission
        self._name = name
        self._clock = clock
        self._observer = observer
        self._cancel = cancel
        self._interrupt = interrupt
        self._known = known
        self._doubts: dict[str, float] = {}
        self._owners: dict[str, str] = {}
        self._living: dict[str, int] = {}
        self._loops: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Join every shard; one that is down, when it is reached."""
        await asyncio.gather(*(self._try_to_join(shard) for shard in self._store.shards))
        loop = asyncio.get_running_loop()
        self._loops = {
            loop.create_task(work(shard)) for shard in self._store.shards for work in (self._keep, self._forget)
        }

    async def close(self) -> None:
        """Leave, so that nobody has to wait for the end of the lease; unless something of ours has not stopped, beside
        which others would run it again."""
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        busy = {self._store.shard_of(tenant) for tenant, _ in self._known()}
        left = [self._leave(shard, owner) for shard, owner in self._owners.items() if shard not in busy]
        await asyncio.gather(*left)
        self._owners.clear()

    def owner(self, shard: str) -> str:
        """This node's name on a shard. Raises `DatabaseUnavailable` while it has none there."""
        owner = self._owners.get(shard)
        if owner is None:
            raise DatabaseUnavailable(f"Shard {shard} was not reached since this process started.")
        return owner

    def is_member(self, shard: str) -> bool:
        """Whether it has a name there."""
        return shard in self._owners

    def doubt(self, shard: str) -> None:
        """An answer was lost: something may be ours there that nobody here runs."""
        self._doubts[shard] = self._clock.monotonic() + 3 * _SETTLED_S

    async def _try_to_join(self, shard: str) -> None:
        # A name for each life: what another process, or this one before a pause, owned is never taken for ours.
        node = f"{self._name}-{os.urandom(6).hex()}"
        try:
            await self._store.join(shard, node, lease_s=self._config.node_lease_s)
        except BackendError:
            return  # the shard's own event tells; the next beat tries again
        self._owners[shard] = node

    async def _leave(self, shard: str, owner: str) -> None:
        try:
            await self._store.leave(shard, owner)
        except BackendError:
            return  # others will see the lease end

    async def _keep(self, shard: str) -> None:
        while True:
            await self._clock.sleep(self._config.node_lease_s / BEATS_IN_A_LEASE)
            try:
                await self.beat(shard)
            except BackendError:
                continue  # the shard's own event tells
            except Exception as error:  # noqa: BLE001 - a fault of ours must not end the node's life
                asyncio.get_running_loop().call_exception_handler({"message": "a beat failed", "exception": error})

    async def beat(self, shard: str) -> None:
        """One renewal, and what comes with it."""
        if not self.is_member(shard):
            await self._try_to_join(shard)
            return
        owner, tenants = self._owners[shard], self._admission.tenants()
        beat = await self._store.beat(shard, owner, lease_s=self._config.node_lease_s, tenants=tenants)
        if not beat.is_member:
            del self._owners[shard]
            runs = self._interrupt(owner)
            try:
                await self._try_to_join(shard)
            finally:
                self._observer.on(NodeFenced(shard, owner, runs))
            return
        await self._disown_unknown(shard, owner)
        for key in beat.cancelled:
            self._cancel(key)
        self._living[shard] = beat.living
        mine = [tenant for tenant in tenants if self._store.shard_of(tenant) == shard]
        self._admission.learn(max(self._living.values()), beat.ledgers, asked=mine, wall=self._clock.wall())
        reaped = await self._store.reap(
            shard, owner, retry_first_s=self._config.retry_first_s, retry_max_s=self._config.retry_max_s
        )
        if reaped.nodes or reaped.returned or reaped.ended:
            self._observer.on(NodesLost(shard, reaped.nodes, reaped.returned, reaped.ended))

    async def _disown_unknown(self, shard: str, owner: str) -> None:
        """Give up what is ours there and unknown here; what is just being taken may be among it, and cannot begin."""
        doubt_until = self._doubts.get(shard)
        if doubt_until is None:
            return
        is_settled = self._clock.monotonic() > doubt_until
        for threaded in (False, True):
            await self._store.give_back_unknown(shard, owner=owner, threaded=threaded, known=self._known())
        await self._store.disown(shard, owner=owner, known=self._known(), older_than_s=_SETTLED_S)
        if is_settled and self._doubts[shard] == doubt_until:
            del self._doubts[shard]

    async def _forget(self, shard: str) -> None:
        """Delete what is old, as fast as it comes; apart from the beats, which nothing may delay."""
        limit, kept_s = _FORGET_FIRST, self._config.executions_kept_s
        while True:
            began, gone = self._clock.monotonic(), 0
            try:
                gone = await self._store.forget(shard, older_than_s=kept_s, limit=limit)
            except BackendError:
                gone = 0  # the shard's own event tells
            except Exception as error:  # noqa: BLE001 - a fault of ours must not end the deleting
                asyncio.get_running_loop().call_exception_handler(
                    {"message": "nothing was deleted", "exception": error}
                )
            if gone < limit:
                limit = _FORGET_FIRST
                await self._clock.sleep(_FORGET_S)
            else:
                limit = min(2 * limit, _FORGET_MAX)
                await self._clock.sleep(_FORGET_PAUSES * (self._clock.monotonic() - began))
