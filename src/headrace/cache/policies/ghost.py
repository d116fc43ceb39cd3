"""What was evicted a short while ago: hashes without values."""

from collections import OrderedDict


class Ghost:
    """The hashes of the last evictions, first in, first out.

    Intuition: the cloakroom keeps the numbers of coats that left. Two keys with the same 32 bits are one to it, which
    costs one of them a better or worse place in a queue and nothing else.
    """

    __slots__ = ("_hashes",)

    def __init__(self) -> None:
        self._hashes: OrderedDict[int, None] = OrderedDict()

    def add(self, key_hash: int, bound: int) -> None:
        """Remember a hash as the newest, and forget the oldest beyond `bound`, at most two at a time."""
        hashes = self._hashes
        hashes.pop(key_hash, None)
        hashes[key_hash] = None
        for _turn in range(2):
            if len(hashes) <= bound:
                return
            hashes.popitem(last=False)

    def take(self, key_hash: int) -> bool:
        """Whether the hash is remembered; it is not any more."""
        if key_hash in self._hashes:
            del self._hashes[key_hash]
            return True
        return False

    def __len__(self) -> int:
        return len(self._hashes)
