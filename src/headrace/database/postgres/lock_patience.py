"""How long the rows of one group may wait for locks that other sessions hold. Pure."""


class LockPatience:
    """Bounds what the rows of a group wait one after the other.

    The first row that meets a lock may wait as long as any statement; each row that waited in vain leaves a quarter of
    that to the next. So all that wait in vain take about a third longer than one would alone.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_ms = limit_s * 1000
        self.commands: tuple[bytes, ...] = ()
        """Sent at the beginning of a transaction, and after a row in it was undone."""

    def shorten(self) -> None:
        """A row waited in vain."""
        self._limit_ms = max(1.0, self._limit_ms / 4)  # 0 would be no limit
        self.commands = (b"SET LOCAL lock_timeout = %d" % self._limit_ms,)
