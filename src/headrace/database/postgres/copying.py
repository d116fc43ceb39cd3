"""COPY on a connection that stays usable wherever its caller is cancelled."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from psycopg import AsyncConnection, AsyncCopy, pq
from psycopg.sql import Composed


@asynccontextmanager
async def copying(connection: AsyncConnection[Any], command: Composed) -> AsyncIterator[AsyncCopy]:
    """A COPY under way; it is ended when the block is left.

    psycopg ends one that has begun. Its caller may be cancelled just before that, when the server has already agreed:
    a request to cancel then comes too late, and the connection would be left in the middle of a COPY.
    """
    async with connection.cursor() as cursor:
        has_begun = False
        try:
            async with cursor.copy(command) as copy:
                has_begun = True
                yield copy
        except asyncio.CancelledError as error:
            if not has_begun and connection.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
                await AsyncCopy(cursor).finish(error)
            raise
