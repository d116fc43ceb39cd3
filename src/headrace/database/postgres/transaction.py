"""What a caller does inside a transaction on one node."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, NamedTuple

from headrace.database.postgres.pipeline import DriverError, Params, PipelinedConnection
from headrace.database.postgres.rows import Row
from headrace.errors import HeadraceError


class Pieces(NamedTuple):
    """SQL with a value between each two pieces, for statements that take no parameters, such as COPY."""

    texts: tuple[str, ...]
    values: tuple[Any, ...]


class Transaction:
    """One open transaction: its statements commit or vanish together."""

    __slots__ = ("_connection", "_translate", "guard", "texts")

    def __init__(self, connection: PipelinedConnection, translate: Callable[[DriverError], HeadraceError]) -> None:
        self._connection = connection
        self._translate = translate
        self.texts: set[str] = set()
        """The statements that it ran."""
        self.guard: Callable[[str, Params], Awaitable[None]] | None = None
        """Raises of a statement that does not belong here."""

    async def fetch(self, sql: str, *params: Any) -> list[Row]:
        """The rows of a statement."""
        if self.guard is not None:
            await self.guard(sql, params)
        return (await self.fetch_counted(sql, *params))[0]

    async def execute(self, sql: str, *params: Any) -> int:
        """Run a statement; the number of rows that it touched."""
        if self.guard is not None:
            await self.guard(sql, params)
        self.texts.add(sql)
        try:
            return (await self._connection.execute(sql, params or None)).rowcount
        except DriverError as error:
            raise self._translate(error) from error

    async def fetch_counted(self, sql: str, *params: Any) -> tuple[list[Row], int]:
        """The rows of a statement, if it has any, and the number of those that it touched."""
        self.texts.add(sql)
        try:
            cursor = await self._connection.execute(sql, params or None)
            return (await cursor.fetchall() if cursor.description else []), cursor.rowcount
        except DriverError as error:
            raise self._translate(error) from error

    async def execute_many(self, sql: str, rows: Sequence[Params]) -> None:
        """Run a statement for each row of parameters, pipelined."""
        self.texts.add(sql)
        try:
            async with self._connection.cursor() as cursor:
                await cursor.executemany(sql, rows)
        except DriverError as error:
            raise self._translate(error) from error

    async def run(self, pieces: Pieces) -> int:
        """Run a statement with its values written into it; the number of rows that it touched."""
        try:
            return await self._connection.run_literally(pieces.texts, pieces.values)
        except DriverError as error:
            raise self._translate(error) from error

    async def copy_in(self, table: str, blocks: AsyncIterator[bytes]) -> None:
        """Append rows, in the text form of COPY, to a table."""
        try:
            await self._connection.copy_in(table, blocks)
        except DriverError as error:
            raise self._translate(error) from error

    @asynccontextmanager
    async def stream(self, sql: str, *params: Any, block_rows: int) -> AsyncIterator[AsyncIterator[list[Row]]]:
        """The rows of a statement in blocks, read as they are asked for."""
        try:
            async with aclosing(self._connection.blocks(sql, params, block_rows)) as blocks:
                yield blocks
        except DriverError as error:
            raise self._translate(error) from error
