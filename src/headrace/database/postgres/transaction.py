"""What a caller does inside a transaction on one node."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, NamedTuple, TypeVar

from headrace.database.postgres.pipeline import ConnectFailed, DriverError, Params, PipelinedConnection
from headrace.database.postgres.rows import Row
from headrace.errors import CallerError, HeadraceError, StatementFailed

T = TypeVar("T")
_ABORTED: Final = "25P02"
"""SQLSTATE of a transaction that an error has ended."""


class Pieces(NamedTuple):
    """SQL with a value between each two pieces, for statements that take no parameters, such as COPY."""

    texts: tuple[str, ...]
    values: tuple[Any, ...]


class Transaction:
    """One open transaction: its statements commit or vanish together.

    Its connection belongs to somebody else afterwards, so it takes no statement after its end, also not of a task that
    outlives its block.
    """

    __slots__ = ("_connection", "_translate", "_turn", "guard", "is_over", "texts")

    def __init__(self, connection: PipelinedConnection, translate: Callable[[DriverError], HeadraceError]) -> None:
        self._connection = connection
        self._translate = translate
        self._turn = asyncio.Lock()
        self.is_over = False
        """It takes no more statements."""
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

        async def ask(connection: PipelinedConnection) -> int:
            return (await connection.execute(sql, params or None)).rowcount

        return await self._ask(ask, sql)

    async def fetch_counted(self, sql: str, *params: Any) -> tuple[list[Row], int]:
        """The rows of a statement, if it has any, and the number of those that it touched."""

        async def ask(connection: PipelinedConnection) -> tuple[list[Row], int]:
            cursor = await connection.execute(sql, params or None)
            return (await cursor.fetchall() if cursor.description else []), cursor.rowcount

        return await self._ask(ask, sql)

    async def execute_many(self, sql: str, rows: Sequence[Params]) -> None:
        """Run a statement for each row of parameters, pipelined."""

        async def ask(connection: PipelinedConnection) -> None:
            async with connection.cursor() as cursor:
                await cursor.executemany(sql, rows)

        await self._ask(ask, sql)

    async def run(self, pieces: Pieces) -> int:
        """Run a statement with its values written into it; the number of rows that it touched."""
        return await self._ask(lambda connection: connection.run_literally(pieces.texts, pieces.values))

    async def copy_in(self, table: str, blocks: AsyncIterator[bytes]) -> None:
        """Append rows, in the text form of COPY, to a table."""
        await self._ask(lambda connection: connection.copy_in(table, blocks))

    @asynccontextmanager
    async def stream(self, sql: str, *params: Any, block_rows: int) -> AsyncIterator[AsyncIterator[list[Row]]]:
        """The rows of a statement in blocks, read as they are asked for."""
        self._check_open()
        try:
            async with aclosing(self._connection.blocks(sql, params, block_rows)) as blocks:
                yield blocks
        except DriverError as error:
            raise self._translate(error) from error

    async def prepare(self, gid: str) -> None:
        """Prepare it for a two-phase commit, under this name; raises if it cannot be, and has been undone."""
        if not await self._ask(lambda connection: connection.prepare_transaction(gid)):
            raise self._aborted()

    async def end(self) -> None:
        """Take no more statements. Raises if what it ran cannot be committed: an error was met, or it is over."""
        self.is_over = True
        async with self._turn:  # a statement of another task is still under way
            if self._connection.is_hung_up():
                raise ConnectFailed("the connection broke before the commit")
            if self._connection.is_aborted:
                raise self._aborted()
            if not self._connection.is_in_transaction:
                raise CallerError(
                    "A statement inside the transaction has ended it.",
                    fix="Leave COMMIT and ROLLBACK to the block: it commits at its end and rolls back when it raises.",
                )

    async def _ask(self, ask: Callable[[PipelinedConnection], Awaitable[T]], *texts: str) -> T:
        async with self._turn:
            self._check_open()
            self.texts.update(texts)
            try:
                return await ask(self._connection)
            except DriverError as error:
                raise self._translate(error) from error

    def _check_open(self) -> None:
        if self.is_over:
            raise CallerError(
                "The transaction is over, its connection another caller's.", fix="Await all of it inside its block."
            )

    def _aborted(self) -> StatementFailed:
        return StatementFailed(
            "A statement of the transaction failed, so nothing of it was kept.",
            sqlstate=_ABORTED,
            fix="Let the error leave the block, or go back to a SAVEPOINT made before.",
        )
