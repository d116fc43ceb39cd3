"""How often something was asked for lately."""

from array import array
from typing import TYPE_CHECKING, Final

from headrace.cache.policies.node import Node

if TYPE_CHECKING:
    from mypy_extensions import i64

COUNT_MAX: Final = 15
COUNTERS_MASK: Final = 0xFFFFFFFFFFFF
"""Twelve counters of four bits. Above them stands the period in which a word was last brought up to date."""
HALF_MASK: Final = 0x777777777777
"""The counters after a shift to the right by one, without what fell from each into the next."""
PERIOD_SHIFT: Final = 48
PERIOD_MASK: Final = 1023
WORDS_MIN: Final = 512
WORDS_PER_NODE: Final = 2
"""Of eight bytes each, so that of the keys of one period nearly all are told apart."""
PERIOD_PER_NODE: Final = 10
"""Accesses for each node until all counts are halved: TinyLFU's and Caffeine's sample."""


class Frequencies:
    """Counts of accesses, forgetting by halves: exact for the nodes in the cache, estimated for what left it.

    A node carries its own count, so that a hit costs no hashing; a count-min sketch keeps what nodes knew when they
    left. Intuition of the sketch: three smudged mirrors; trust the dimmest reflection. As in Caffeine all counters of
    a hash are in one word, here three of twelve, so that a look costs one access to memory. Nothing is ever swept:
    counts are halved when they are looked at, and one word is brought up to date every few accesses, before its
    period comes round again. Until the first eviction nothing has left and nothing is kept. Sources: Cormode and
    Muthukrishnan, Count-Min Sketch, 2005; conservative update after Estan and Varghese, 2002; ageing after Einziger,
    Friedman and Manes, TinyLFU, 2017.
    """

    __slots__ = ("_accesses", "_mask", "_nodes_max", "_nodes_min", "_period", "_periods", "_words")

    def __init__(self) -> None:
        self._words: array[int] = array("q")
        self._mask: i64 = 0
        self._accesses: i64 = 0
        self._period: i64 = 0
        self._periods: i64 = 0
        self._nodes_min: i64 = 0
        self._nodes_max: i64 = -1

    def fit(self, nodes: "i64") -> None:
        """Be ready to remember what leaves a cache of so many nodes. To be called before each eviction."""
        if self._nodes_min <= nodes <= self._nodes_max:
            return
        self._nodes_min = nodes - (nodes >> 1)
        self._nodes_max = nodes + (nodes >> 1)
        self._period = PERIOD_PER_NODE * nodes
        size = WORDS_MIN
        while size < WORDS_PER_NODE * nodes:
            size *= 2
        if size > len(self._words):
            self._words = array("q", bytes(8 * size))
            self._mask = size - 1

    def arrive(self, node: Node) -> None:
        """Count the access that inserts a node, on top of what is remembered of its hash."""
        count: i64 = 1
        if self._mask:
            self._age()
            count = self.estimate(node.hash) + 1
            if count > COUNT_MAX:
                count = COUNT_MAX
        node.count = (self._periods << 4) | count

    def hit(self, node: Node) -> None:
        """Count an access to a node."""
        if self._mask:
            self._age()
        count = self.of(node)
        if count < COUNT_MAX:
            count += 1
        node.count = (self._periods << 4) | count

    def leave(self, node: Node) -> None:
        """Remember the count of a node that leaves."""
        if self._mask:
            self._raise(node.hash, self.of(node))

    def of(self, node: Node) -> "i64":
        """The count of a node, 0 to COUNT_MAX."""
        noted = node.count
        halvings = self._periods - (noted >> 4)
        count = noted & COUNT_MAX
        if halvings == 0:
            return count
        return count >> halvings if halvings < 4 else 0

    def estimate(self, key_hash: "i64") -> "i64":
        """What is remembered of a hash: at least what was counted, as far as it is not forgotten."""
        if self._mask == 0:
            return 0
        place = self._place(key_hash)
        word = self._fresh(self._words[place])
        first = (word >> ((key_hash >> 24) & 12)) & COUNT_MAX
        second = (word >> (16 + ((key_hash >> 26) & 12))) & COUNT_MAX
        third = (word >> (32 + ((key_hash >> 28) & 12))) & COUNT_MAX
        least = first if first < second else second
        return least if least < third else third

    def _raise(self, key_hash: "i64", count: "i64") -> None:
        place = self._place(key_hash)
        word = self._fresh(self._words[place])
        shift: i64 = (key_hash >> 24) & 12
        if (word >> shift) & COUNT_MAX < count:
            word += (count - ((word >> shift) & COUNT_MAX)) << shift
        shift = 16 + ((key_hash >> 26) & 12)
        if (word >> shift) & COUNT_MAX < count:
            word += (count - ((word >> shift) & COUNT_MAX)) << shift
        shift = 32 + ((key_hash >> 28) & 12)
        if (word >> shift) & COUNT_MAX < count:
            word += (count - ((word >> shift) & COUNT_MAX)) << shift
        self._words[place] = word

    def _place(self, key_hash: "i64") -> "i64":
        # A shadow sees only hashes whose low bits are zero: multiply, and take bits from the middle.
        return ((key_hash * 0x1E3779B1) >> 16) & self._mask

    def _fresh(self, word: "i64") -> "i64":
        """The word with the halvings that it missed."""
        missed = (self._periods - (word >> PERIOD_SHIFT)) & PERIOD_MASK
        if missed == 0:
            return word
        counters = word & COUNTERS_MASK
        if missed >= 4:
            counters = 0
        while missed and counters:
            counters = (counters >> 1) & HALF_MASK
            missed -= 1
        return counters | ((self._periods & PERIOD_MASK) << PERIOD_SHIFT)

    def _age(self) -> None:
        accesses = self._accesses + 1
        if accesses >= self._period:
            accesses = 0
            self._periods += 1
        self._accesses = accesses
        # So each word is visited long before its period comes round again modulo 1024.
        if accesses & 7 == 0:
            words = self._words
            place = ((self._periods * self._period + accesses) >> 3) & self._mask
            words[place] = self._fresh(words[place])
