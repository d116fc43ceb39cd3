"""The answers of several shards to one question: read at once, a few blocks ahead, within bounds.

One reader a shard. The first error is everybody's: the other readers are cancelled, on the server too, when the block
ends. With `tolerant`, a shard that cannot be reached is noted in `missing` instead.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from headrace.database.fanout.merge import Block
from headrace.errors import DatabaseUnavailable, HeadraceError, ResultTooLarge, StatementFailed

_AHEAD: Final = 2
"""Blocks of one shard that may wait here: one in work and one to go on with."""
COLUMNS_CHANGED: Final = "42P10"
"""SQLSTATE of an answer with other columns than expected: invalid_column_reference."""
_CELL_BYTES: Final = 16
"""What a value counts that is neither text nor bytes."""


class Bounds:
    """What one result may hold in this process. Raises `ResultTooLarge` above it."""

    def __init__(self, rows_max: int, bytes_max: int) -> None:
        self._rows_left, self._bytes_left = rows_max, bytes_max
        self._rows_max, self._bytes_max = rows_max, bytes_max

    def count(self, rows: int, size: int) -> None:
        """Take note of more rows."""
        self._rows_left -= rows
        self._bytes_left -= size
        if self._rows_left < 0:
            raise ResultTooLarge(
                f"The result holds more than {self._rows_max} rows.",
                fix="Narrow it, use stream(), or raise database.result_rows_max.",
            )
        if self._bytes_left < 0:
            raise ResultTooLarge(
                f"The result holds more than {self._bytes_max} bytes.",
                fix="Narrow it, use stream(), or raise database.result_bytes_max.",
            )

    def count_block(self, block: Block) -> None:
        """Take note of a block of rows."""
        self.count(len(block), weight(block))


def weight(block: Block) -> int:
    """About how many bytes of values a block holds."""
    return sum(len(value) if isinstance(value, str | bytes) else _CELL_BYTES for row in block for value in row)


class How(NamedTuple):
    """What a read may do when a shard does not answer."""

    tolerant: bool = False
    """Leave the shard out, and say so."""
    repeatable: bool = False
    """Ask once more: nothing in the statement acts."""


Opening = Callable[[], AbstractAsyncContextManager[Any]]
"""Asks a shard: a context whose value is an iterator of blocks."""


class Part:
    """The answer of one shard, as far as it has been read."""

    def __init__(self, parts: "Parts", shard: str, opening: Opening) -> None:
        self.shard = shard
        self._parts = parts
        self._opening = opening
        self._blocks: asyncio.Queue[Block | None] = asyncio.Queue(_AHEAD)

    async def next(self) -> Block | None:
        """See `merge.Blocks`; raises the first error of any part, and of columns that are not as expected."""
        block = await self._next()
        if block is not None and self._parts.columns is not None:
            self._parts.columns = self._parts.columns or block[0].columns
            if block[0].columns != self._parts.columns:
                raise StatementFailed(
                    f"{self.shard} answered with the columns {', '.join(block[0].columns)}, not with"
                    f" {', '.join(self._parts.columns)}: its tables were changed.",
                    sqlstate=COLUMNS_CHANGED,
                    fix="Repeat it. If it fails again, the tables of the shards differ.",
                )
        return block

    async def _next(self) -> Block | None:
        if self._blocks.empty():
            getting = asyncio.get_running_loop().create_task(self._blocks.get())
            waited: set[asyncio.Future[Any]] = {getting, self._parts.failure}
            try:
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not getting.done():
                    getting.cancel()
            if not getting.cancelled() and getting.done():
                return getting.result()
            self._parts.failure.result()
        return self._blocks.get_nowait()

    async def read(self) -> None:
        """Read everything; what cannot be read ends all parts."""
        delivered = not self._parts.how.repeatable
        for attempt in (1, 2):
            try:
                async with self._opening() as blocks:
                    async for block in blocks:
                        delivered = True
                        await self._blocks.put(block)
                break
            except DatabaseUnavailable as error:
                # As with every read that does nothing else: once more on another connection, as long as nobody has
                # seen a row of it.
                if attempt == 1 and not delivered:
                    continue
                if not self._parts.how.tolerant:
                    raise
                self._parts.missing[self.shard] = error.message
                break
        await self._blocks.put(None)


class Parts:
    """The readers of all shards; use it as a context."""

    def __init__(self, openings: Mapping[str, Opening], how: How, *, columns: tuple[str, ...] | None = None) -> None:
        """With `columns`, all answers must have these; `()`: those of the first."""
        self.how = how
        self.columns = columns
        self.missing: dict[str, str] = {}
        """Why each shard did not answer; only if tolerant."""
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.parts = [Part(self, shard, opening) for shard, opening in openings.items()]
        self._readers: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._readers = {loop.create_task(self._read(part)) for part in self.parts}
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        if not self.failure.done():
            self.failure.cancel()
        elif not self.failure.cancelled():
            self.failure.exception()  # seen, whether or not anybody asked for another block

    async def _read(self, part: Part) -> None:
        try:
            await part.read()
        except HeadraceError as error:
            if not self.failure.done():
                self.failure.set_exception(error)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            if not self.failure.done():
                self.failure.set_exception(error)
            raise
