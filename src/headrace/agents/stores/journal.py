"""Writes of finished executions, grouped: many callers, one transaction, each acknowledged after its commit.

While one batch is being committed the next one gathers, so a batch is as large as the load makes it and a lonely write
waits for nobody. Batches of one shard follow each other; shards do not wait for each other.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from headrace.clock import Clock
from headrace.errors import BackendError, BugError, HeadraceError, NotOpen

T = TypeVar("T")

_RETRY_S = 0.2


class _Waiting(NamedTuple, Generic[T]):
    item: T
    done: asyncio.Future[None]
    since: float


class Journal(Generic[T]):
    """A grouped writer for one shard.

    `write` must be safe to repeat with the same items: after a broken connection nobody knows whether it was
    committed, and the journal tries again until an item has waited for `retry_s` since it came. An item that the
    database refuses fails its own caller alone. A batch has at most `batch_max` items, of `weight_max` together.
    """

    def __init__(
        self,
        write: Callable[[Sequence[T]], Awaitable[None]],
        *,
        batch_max: int,
        retry_s: float,
        clock: Clock,
        weight_of: Callable[[T], int] = lambda _: 0,
        weight_max: int = 1,
    ) -> None:
        self._write = write
        self._weight_of = weight_of
        self._weight_max = weight_max
        self._batch_max = batch_max
        self._retry_s = retry_s
        self._clock = clock
        self._waiting: deque[_Waiting[T]] = deque()
        self._writer: asyncio.Task[None] | None = None
        self._closed = False

    async def append(self, item: T) -> None:
        """Return when the item is committed; raise what the database said of it otherwise."""
        if self._closed:
            raise NotOpen("The journal is closed.")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._waiting.append(_Waiting(item, done, self._clock.monotonic()))
        if self._writer is None or self._writer.done():
            self._writer = loop.create_task(self._drain())
        # Shielded by being a plain future: a caller who is cancelled stops waiting, the item is written all the same.
        await done

    async def close(self) -> None:
        """Write what waits, then refuse more."""
        self._closed = True
        if self._writer is not None:
            await self._writer

    async def _drain(self) -> None:
        while self._waiting:
            batch = self._next_batch()
            try:
                await self._commit(batch)
            except Exception as error:  # noqa: BLE001 - its callers know; the others' writes must go on
                loop = asyncio.get_running_loop()
                loop.call_exception_handler({"message": "a journal failed to write a batch", "exception": error})
            finally:
                for _, done, _ in batch:
                    if not done.done():
                        done.cancel()

    def _next_batch(self) -> "list[_Waiting[T]]":
        batch = [self._waiting.popleft()]
        weight = self._weight_of(batch[0].item)
        while self._waiting and len(batch) < self._batch_max:
            weight += self._weight_of(self._waiting[0].item)
            if weight > self._weight_max:
                break
            batch.append(self._waiting.popleft())
        return batch

    async def _commit(self, batch: "list[_Waiting[T]]") -> None:
        try:
            # The last one came last; who came before has waited for as long, and longer.
            give_up_at = batch[-1].since + self._retry_s
            await self._write_with_patience([waiting.item for waiting in batch], give_up_at)
        except BackendError as error:
            for _, done, _ in batch:
                _settle(done, error)
        except HeadraceError as error:
            if len(batch) == 1:
                _settle(batch[0].done, error)
                return
            # The database refused the batch for the sake of one item: find it by writing them one at a time.
            for one in batch:
                await self._commit([one])
        except Exception as error:
            # A fault of ours: its own callers are told, and the next batch is written all the same.
            bug = BugError(f"A batch of {len(batch)} could not be written: {type(error).__name__}: {error}.")
            for _, done, _ in batch:
                _settle(done, bug)
            raise
        else:
            for _, done, _ in batch:
                _settle(done, None)

    async def _write_with_patience(self, items: list[T], give_up_at: float) -> None:
        while True:
            try:
                return await self._write(items)
            except BackendError:
                if self._clock.monotonic() >= give_up_at:
                    raise
            await self._clock.sleep(_RETRY_S)


def _settle(done: asyncio.Future[None], error: HeadraceError | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
