"""Lets so many through in one turn of the event loop, and the others in the next turns, in the order of their arrival.

What begins or ends an execution takes tens of microseconds and need not wait for anything; a burst of 50,000 of them
would hold the loop for seconds, and with it every other request. Whoever comes when nobody waits goes through without
being delayed.
"""

import asyncio
from collections import deque


class Turnstile:
    """A gate that is as wide as one turn of the loop may be long."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._passed = 0
        """How many went through in this turn."""
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def go_through(self) -> None:
        """Return at once, or in one of the next turns."""
        if not self._passed:
            asyncio.get_running_loop().call_soon(self._turn)
        if self._passed < self._width and not self._waiting:
            self._passed += 1
            return
        gate = asyncio.get_running_loop().create_future()
        self._waiting.append(gate)
        await gate

    def _turn(self) -> None:
        self._passed = 0
        while self._waiting and self._passed < self._width:
            gate = self._waiting.popleft()
            if not gate.done():
                gate.set_result(None)
                self._passed += 1
        if self._passed:
            asyncio.get_running_loop().call_soon(self._turn)
