"""W-TinyLFU."""

from collections.abc import Iterator

from headrace.cache.policies.eviction import EvictionPolicy
from headrace.cache.policies.node import Node, Queue
from headrace.cache.policies.sketch import COUNT_MAX, Sketch


class WTinyLfu(EvictionPolicy):
    """x"""

    __slots__ = (
        "_epoch",
        "_main_hits",
        "_probation",
        "_protected",
        "_sample",
        "_sketch",
        "_width",
        "_window",
        "share",
        "tick",
    )

    def __init__(self, share: float = 0.01) -> None:
        self.share = share
        self._window = Queue()
        self._probation = Queue()
        self._protected = Queue()
        self._width = 512
        self._sketch = Sketch(self._width)
        self._sample = 0
        self._epoch = 0
        self.tick = 0

    def _count(self) -> int:
        return self._window.count + self._probation.count + self._protected.count

    def _frequency(self, node: Node) -> int:
        marks = node.marks
        age = self._epoch - (marks >> 4)
        if age == 0:
            return marks & 15
        return (marks & 15) >> min(age, 4)

    def _access(self) -> None:
        self._sample += 1
        count = self._count()
        if self._sample >= 10 * count and self._sample > 512:
            self._sample = 0
            self._epoch += 1
            if self._width < 8 * count:
                while self._width < 8 * count:
                    self._width *= 2
                self._sketch = Sketch(self._width)
            else:
                self._sketch.halve()

    def insert(self, node: Node) -> None:
        self._access()
        count = min(self._sketch.estimate(node.hash) + 1, COUNT_MAX)
        self._sketch.raise_to(node.hash, count)
        node.marks = (self._epoch << 4) | count
        window = self._window
        window.push(node)
        total = window.weight + self._probation.weight + self._protected.weight
        for _ in range(2):
            if window.count > 1 and window.weight > total * self.share:
                oldest = window.oldest()
                window.remove(oldest)
                self._probation.push(oldest)

    def hit(self, node: Node) -> None:
        self._access()
        node.marks = (self._epoch << 4) | min(self._frequency(node) + 1, COUNT_MAX)
        queue = node.queue
        if queue is self._probation:
            queue.remove(node)
            protected = self._protected
            protected.push(node)
            main = protected.weight + self._probation.weight
            while protected.weight * 5 > main * 4 and protected.count > 1:
                oldest = protected.oldest()
                protected.remove(oldest)
                self._probation.push(oldest)
        else:
            queue.refresh(node)

    def remove(self, node: Node) -> None:
        self._sketch.raise_to(node.hash, self._frequency(node))
        node.queue.remove(node)

    def evict(self) -> Node:
        window = self._window
        probation = self._probation
        protected = self._protected
        total = window.weight + probation.weight + protected.weight
        victim = probation.oldest() if probation.count else (protected.oldest() if protected.count else None)
        if window.count and (victim is None or window.weight + 1 > total * self.share):
            candidate = window.oldest()
            if victim is None:
                self.remove(candidate)
                return candidate
            cf = self._frequency(candidate)
            vf = self._frequency(victim)
            self.tick += 1
            if cf > vf or (cf >= 6 and self.tick & 127 == 0):
                window.remove(candidate)
                self.remove(victim)
                probation.push(candidate)
                return victim
            self.remove(candidate)
            return candidate
        assert victim is not None
        self.remove(victim)
        return victim

    def nodes(self) -> Iterator[Node]:
        yield from self._window.nodes()
        yield from self._probation.nodes()
        yield from self._protected.nodes()
