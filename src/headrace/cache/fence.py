"""The in-process fence: a value read before an invalidation is never installed after it.

Intuition: whoever fetches a value first notes the number on the board; if the number has changed when the value is
there, the value may be old and is not kept. A board of one number a key would grow without bound, so keys share 4096
numbers by hash: a false alarm costs one extra load, a missed one cannot happen. One more number stands for all keys at
once and makes `clear` O(1).
"""

STRIPES = 4096

Epoch = tuple[int, int]


class Fence:
    """Striped invalidation counters. The caller holds its own lock where check and install must be one step."""

    __slots__ = ("_global", "_stripes")

    def __init__(self) -> None:
        self._global = 0
        self._stripes = [0] * STRIPES

    def epoch(self, key: str) -> Epoch:
        """The number to note before a value of `key` is fetched."""
        return self._global, self._stripes[hash(key) % STRIPES]

    def holds(self, key: str, epoch: Epoch) -> bool:
        """Whether nothing was invalidated since `epoch` was noted."""
        return self._global == epoch[0] and self._stripes[hash(key) % STRIPES] == epoch[1]

    def raise_for(self, key: str) -> None:
        """Turn away every value of `key` that is being fetched now."""
        self._stripes[hash(key) % STRIPES] += 1

    def raise_for_all(self) -> None:
        """Turn away every value that is being fetched now."""
        self._global += 1
