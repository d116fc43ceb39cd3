"""What a policy orders: nodes in queues. Every operation is O(1) and allocates nothing.

The links live in the nodes themselves, so a queue costs no memory of its own, removal from the middle needs no search,
and no code of a key (`__eq__`, `__hash__`) ever runs while a policy rearranges its queues.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, cast

from headrace.errors import BugError

if TYPE_CHECKING:
    from mypy_extensions import i64

MASK_32: Final = 0xFFFFFFFF


def spread(key_hash: "i64") -> "i64":
    """Mix a Python hash into 32 well spread bits, never negative.

    Python's hash of an int is the int itself; sampling and counting by hash need bits that look random. Two rounds of
    xor-shift and multiply, after T. Mueller; the factor keeps products below 2**62, where mypyc's integers are fast.
    """
    low: i64 = (key_hash ^ (key_hash >> 32)) & MASK_32
    low = ((low ^ (low >> 16)) * 0x119DE1F3) & MASK_32
    low = ((low ^ (low >> 16)) * 0x119DE1F3) & MASK_32
    return low ^ (low >> 16)


class Held:
    """What a hit reads.

    Fields lie in memory in the order of the classes that bring them. These come first, next to the object's head, so
    that a hit touches fewer cache lines of an entry, which is a tenth of what it costs.
    """

    __slots__ = ("deadline", "value")

    deadline: float
    value: Any


class Link(Held):
    """A place in a ring of links."""

    __slots__ = ("newer", "older")

    def __init__(self) -> None:
        self.newer: Link = self
        self.older: Link = self


class Queue:
    """Nodes from oldest to newest, with their number and their total weight."""

    __slots__ = ("count", "ring", "weight")

    def __init__(self) -> None:
        self.ring = Link()
        """Both ends: newer than it is the oldest node, older than it the newest."""
        self.count: i64 = 0
        self.weight: i64 = 0

    def push(self, node: "Node") -> None:
        """Add a node that is in no queue, as the newest."""
        ring = self.ring
        newest = ring.older
        node.queue = self
        node.newer = ring
        node.older = newest
        newest.newer = node
        ring.older = node
        self.count += 1
        self.weight += node.weight

    def remove(self, node: "Node") -> None:
        """Take a node of this queue out, wherever it stands."""
        newer = node.newer
        older = node.older
        newer.older = older
        older.newer = newer
        # No link may keep its neighbours alive, nor itself: what was removed dies with its last reader.
        node.newer = NOWHERE
        node.older = NOWHERE
        node.queue = NO_QUEUE
        self.count -= 1
        self.weight -= node.weight

    def refresh(self, node: "Node") -> None:
        """Make a node of this queue the newest."""
        ring = self.ring
        newest = ring.older
        if newest is node:
            return
        newer = node.newer
        older = node.older
        newer.older = older
        older.newer = newer
        node.newer = ring
        node.older = newest
        newest.newer = node
        ring.older = node

    def oldest(self) -> "Node":
        """The node that came first. There must be one."""
        return cast("Node", self.ring.newer)

    def nodes(self) -> "Iterator[Node]":
        """Every node, oldest first."""
        ring = self.ring
        link = ring.newer
        while link is not ring:
            yield cast("Node", link)
            link = link.newer

    def validate(self) -> None:
        """Raise BugError unless the ring, the count and the weight agree."""
        count = weight = 0
        for node in self.nodes():
            count += 1
            weight += node.weight
            if node.queue is not self or node.newer.older is not node or node.older.newer is not node:
                raise BugError(f"a node of {node.hash:#x} is linked wrongly.")
        if count != self.count or weight != self.weight:
            raise BugError(f"a queue of {count} nodes weighing {weight} says {self.count} and {self.weight}.")


NOWHERE: Final = Link()
NO_QUEUE: Final = Queue()
"""Where a node is that no policy has charge of."""


class Node(Link):
    """What a policy knows of an entry."""

    __slots__ = ("count", "hash", "marks", "queue", "weight")

    def __init__(self, key_hash: "i64", weight: "i64") -> None:
        self.newer = NOWHERE
        self.older = NOWHERE
        self.queue = NO_QUEUE
        self.hash: i64 = key_hash
        """32 spread bits of the key's hash. Two keys may share them."""
        self.weight: i64 = weight
        self.marks: i64 = 0
        """What the policy in charge notes: a visited bit, a small number of visits."""
        self.count: i64 = 0
        """What `Frequencies` notes; it outlives a change of policy."""
