"""How often something was asked for lately, in one byte a counter: a count-min sketch with ageing."""

ROWS = 4
COUNT_MAX = 15
_HALVES = bytes(count >> 1 for count in range(256))


class Sketch:
    """Approximate counts by hash, never too low, forgetting by halves.

    Intuition: four smudged mirrors; trust the dimmest reflection. With a width of eight counters a node the estimate
    is exact for nearly everything that matters. Source: Cormode and Muthukrishnan, Count-Min Sketch, 2005;
    conservative update after Estan and Varghese, 2002; ageing after Einziger, Friedman and Manes, TinyLFU, 2017.
    """

    __slots__ = ("_mask", "_table")

    def __init__(self, width: int) -> None:
        self._table = bytearray(width)
        self._mask = width - 1

    def estimate(self, key_hash: int) -> int:
        """The count of a hash: at least what was recorded, as far as it is remembered."""
        table = self._table
        mask = self._mask
        step = (key_hash >> 15) | 1
        least = COUNT_MAX
        place = key_hash
        for _ in range(ROWS):
            count = table[place & mask]
            if count < least:
                least = count
            place += step
        return least

    def raise_to(self, key_hash: int, count: int) -> None:
        """See to it that the estimate of a hash is at least `count`."""
        table = self._table
        mask = self._mask
        step = (key_hash >> 15) | 1
        place = key_hash
        for _ in range(ROWS):
            if table[place & mask] < count:
                table[place & mask] = count
            place += step

    def halve(self) -> None:
        """Forget half of everything, in one pass at memory speed."""
        self._table = self._table.translate(_HALVES)
