"""COPY on a connection that stays usable wherever its caller is cancelled, or is closed in bounded time."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from psycopg import AsyncConnection, AsyncCopy, pq
from psycopg.sql import Composed

END_S: Final = 5.0
"""Longest wait for a server to agree to the end of a COPY that was broken off; psycopg's own bound for a statement."""


@asynccontextmanager
async def copying(
    connection: AsyncConnection[Any], command: Composed, *, sever: Callable[[], None]
) -> AsyncIterator[AsyncCopy]:
    """A COPY under way, ended when the block is left. `sever` breaks the connection off, whoever waits on it.

    psycopg ends a COPY that has begun, but waits for a frozen server without bound. Its caller may also be cancelled
    just before it begins, when the server has already agreed: a request to cancel then comes too late, and the
    connection would be left in the middle of a COPY.
    """
    later = asyncio.get_running_loop().call_later
    bound: asyncio.TimerHandle | None = None
    has_begun = False
    async with connection.cursor() as cursor:
        try:
            async with cursor.copy(command) as copy:
                has_begun = True
                try:
                    yield copy
                except BaseException:  # a cancellation too; raised again
                    bound = later(END_S, sever)
                    raise
        except asyncio.CancelledError as error:
            if not has_begun and connection.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
                bound = later(END_S, sever)
                await AsyncCopy(cursor).finish(error)
            raise
        finally:
            if bound is not None:
                bound.cancel()
            if connection.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
                await connection.close()  # cancelled once more while it was being ended
