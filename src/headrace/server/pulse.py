"""The sign of life that a process gives its supervisor: a byte a second through a pipe, from the event loop itself."""

import asyncio
import os
from types import TracebackType
from typing import Self

from headrace.clock import Clock

PERIOD_S = 1.0


class Pulse:
    """Beats while the block runs; a loop that hangs, or a process that is stopped, falls silent."""

    def __init__(self, descriptor: int, *, clock: Clock) -> None:
        self._descriptor = descriptor
        self._clock = clock
        self._beating: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Start to beat."""
        os.set_blocking(self._descriptor, False)
        self._beating = asyncio.get_running_loop().create_task(self._beat())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)

    async def _beat(self) -> None:
        while True:
            try:
                os.write(self._descriptor, b".")
            except BlockingIOError:
                # The supervisor is slow to read: what is in the pipe already says that we live.
                await self._clock.sleep(PERIOD_S)
                continue
            except BrokenPipeError:
                return
            await self._clock.sleep(PERIOD_S)
