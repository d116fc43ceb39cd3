"""psycopg's pool of connections, and what it lacks."""

import asyncio
from typing import Any

from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from headrace.database.postgres.pipeline import ConnectFailed, PipelinedConnection

__all__ = ["Pool", "PoolClosed", "PoolTimeout", "TooManyRequests"]


class Pool(AsyncConnectionPool[PipelinedConnection]):
    """psycopg's pool, which can also get smaller at once, and be closed while a server leaves it waiting."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._connecting: dict[asyncio.Task[Any], PipelinedConnection | None] = {}

    async def getconn(self, timeout: float | None = None) -> PipelinedConnection:
        """A connection. Who is cancelled just as it comes is cancelled all the same.

        The pool waits by `asyncio.wait_for`, which before Python 3.12 swallows a cancellation in that moment [1].

        [1] https://github.com/python/cpython/issues/86296
        """
        task = asyncio.current_task()
        assert task is not None, "a connection is borrowed by a task"
        cancellations = task.cancelling()
        connection = await super().getconn(timeout)
        if task.cancelling() > cancellations:
            await self.putconn(connection)
            raise asyncio.CancelledError
        return connection

    async def _connect(self, timeout: float | None = None) -> PipelinedConnection:
        connecting = asyncio.get_running_loop().create_task(super()._connect(timeout))
        self._connecting[connecting] = None
        try:
            return await connecting
        except asyncio.CancelledError:
            if not connecting.cancelled():
                connecting.cancel()
                raise
            raise ConnectFailed("the pool is being closed") from None
        finally:
            del self._connecting[connecting]

    async def reconnect_failed(self) -> None:
        """Try again for those who wait: without them, the next caller would be the first to find a server back."""
        await super().reconnect_failed()
        if self._waiting and not self.closed:
            self._maybe_grow_pool()

    def greeting(self, connection: PipelinedConnection) -> None:
        """The connection is open and its session is being set up, by the task that says so."""
        task = asyncio.current_task()
        if task in self._connecting:
            self._connecting[task] = connection

    def give_up(self) -> None:
        """Stop connecting: a frozen server would hold up the closing."""
        for connecting, connection in self._connecting.items():
            if connection is None:
                connecting.cancel()
            else:
                connection.sever()  # not cancelled: psycopg would first wait for the server to agree

    async def take_back(self, connection: PipelinedConnection) -> None:
        """A borrowed connection is free again, if it may have another borrower at all."""
        if connection.is_marked or connection.is_in_transaction:
            # Closed rather than rolled back: a caller that is cancelled while it waits for that would lose it.
            await connection.close()
        if self.is_over:
            await self.discard(connection)
        else:
            await self.putconn(connection)

    async def discard(self, connection: PipelinedConnection) -> None:
        """Close a borrowed connection and put none in its place."""
        async with self._lock:
            self._nconns -= 1
        await self._close_connection(connection)

    async def shrink(self) -> None:
        """Close idle connections above the maximum; busy ones are discarded when they come back."""
        async with self._lock:
            excess = max(0, min(self._nconns - self._max_size, len(self._pool)))
            closing = [self._pool.popleft() for _ in range(excess)]
            self._nconns -= excess
        for connection in closing:
            await self._close_connection(connection)

    @property
    def size(self) -> int:
        """Connections that are open, or just being made."""
        return self._nconns

    @property
    def occupied(self) -> int:
        """Those that belong to a caller, from the moment that they are handed over."""
        return max(0, self._nconns - len(self._pool) - len(self._connecting))

    @property
    def is_over(self) -> bool:
        """Whether it has more connections than it may."""
        return self._nconns > self._max_size
