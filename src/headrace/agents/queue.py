"""The durable queue, as one node sees it: takes what fits, as often as there is something.

A loop for each shard and kind (in the loop, in a thread). It is woken by submissions of its own process and by places
that become free; what others submit it finds by asking, at once after it found something and then less and less often,
up to `queue_poll_s`.
"""

import asyncio
from collections.abc import Awaitable, Callable

from headrace.agents.admission import Admission
from headrace.agents.config import AgentsConfig
from headrace.agents.nodes import Membership
from headrace.agents.places import Places
from headrace.agents.store import AgentStore, Key, Submission
from headrace.errors import BackendError

_POLL_FIRST_S = 0.02
_UNLIMITED = 1 << 30


class Queue:
    """Takes queued executions for which there are places, and hands each to `start`."""

    def __init__(
        self,
        store: AgentStore,
        config: AgentsConfig,
        *,
        places: Places,
        admission: Admission,
        membership: Membership,
        start: Callable[[Submission], Awaitable[None]],
    ) -> None:
        self._store = store
        self._config = config
        self._places = places
        self._admission = admission
        self._membership = membership
        self._start = start
        self._loops: set[asyncio.Task[None]] = set()
        self._starting: dict[asyncio.Task[None], Key] = {}
        self._short: set[tuple[str, bool]] = set()
        """Loops that could have taken more with more places, or with more places for some tenant."""
        self._wakes = {(shard, threaded): asyncio.Event() for shard in store.shards for threaded in (False, True)}

    async def open(self) -> None:
        """Begin to take."""
        loop = asyncio.get_running_loop()
        self._loops = {loop.create_task(self._serve(shard, threaded)) for shard, threaded in self._wakes}

    async def close(self) -> None:
        """Take no more. What was taken has begun or was given back when this returns."""
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        if self._starting:
            await asyncio.wait(self._starting, timeout=self._config.cancel_grace_s)
        for start in list(self._starting):
            start.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        for shard, threaded in self._wakes:
            await self._give_all_back(shard, threaded=threaded)

    def starting(self) -> list[Key]:
        """What was taken and has not begun yet."""
        return list(self._starting.values())

    def wake(self, shard: str, *, threaded: bool) -> None:
        """There is something in the queue."""
        self._wakes[shard, threaded].set()

    def place_is_free(self) -> None:
        """An execution ended. Most of the time nobody waits for its place, and then this costs nothing."""
        if self._short:
            for key in self._short:
                self._wakes[key].set()
            self._short.clear()

    async def _serve(self, shard: str, threaded: bool) -> None:  # noqa: FBT001 - one of the two keys of the loop
        wake, pause, is_in_doubt = self._wakes[shard, threaded], _POLL_FIRST_S, False
        while True:
            wake.clear()
            try:
                if is_in_doubt:
                    await self._store.give_back_unknown(
                        shard, owner=self._membership.owner(shard), threaded=threaded, known=self.starting()
                    )
                    is_in_doubt = False
                taken = await self._round(shard, threaded=threaded)
            except BackendError:
                taken, is_in_doubt = 0, True
                self._membership.doubt(shard)  # what was sent may be carried out later than it is asked for here
            except Exception as error:  # noqa: BLE001 - a fault of ours must not end the queue
                taken, is_in_doubt = 0, True
                asyncio.get_running_loop().call_exception_handler({"message": "the queue failed", "exception": error})
            if taken:
                pause = _POLL_FIRST_S
                continue
            pause = min(pause * 2, self._config.queue_poll_s)
            try:
                async with asyncio.timeout(pause):
                    await wake.wait()
                pause = _POLL_FIRST_S
            except TimeoutError:
                continue

    async def _round(self, shard: str, *, threaded: bool) -> int:
        if not self._membership.is_member(shard):
            return 0
        # A batch may be beginning while the next one is taken, no more: the rest is for nodes that have less to do.
        wanted = min(self._config.queue_batch_max, 2 * self._config.queue_batch_max - len(self._starting))
        places = min(wanted, self._places.free(threaded=threaded) - len(self._starting))
        free = self._admission.free()
        if places <= 0 or 0 in free.values():
            self._short.add((shard, threaded))
        if places <= 0:
            return 0
        taken = await self._store.take(
            shard,
            owner=self._membership.owner(shard),
            threaded=threaded,
            limit=places,
            free=free,
            free_default=_UNLIMITED,
        )
        loop = asyncio.get_running_loop()
        for submission in taken:
            self._starting[loop.create_task(self._begin(submission))] = submission.key
        return len(taken)

    async def _begin(self, submission: Submission) -> None:
        me = asyncio.current_task()
        assert me is not None
        try:
            await self._start(submission)
        finally:
            del self._starting[me]
            self.place_is_free()

    async def _give_all_back(self, shard: str, *, threaded: bool) -> None:
        if not self._membership.is_member(shard):
            return
        try:
            owner = self._membership.owner(shard)
            await self._store.give_back_unknown(shard, owner=owner, threaded=threaded, known=[])
        except BackendError:
            return  # it goes back when the lease ends
