"""What the counts of accesses promise beyond being right: limits and bounded work."""

from headrace.cache.policies.frequencies import COUNT_MAX, PERIOD_PER_NODE, Frequencies
from headrace.cache.policies.node import Node, spread


def test_nothing_is_kept_until_something_leaves():
    """A cache that never fills pays for no sketch."""
    frequencies = Frequencies()
    node = Node(spread(1), 1)
    frequencies.arrive(node)
    for _ in range(3):
        frequencies.hit(node)
    assert frequencies.of(node) == 4
    frequencies.leave(node)
    assert frequencies.estimate(node.hash) == 0


def test_a_count_survives_departure_up_to_its_limit():
    """What was asked for fifteen times or more comes back with fifteen."""
    frequencies = Frequencies()
    node = Node(spread(1), 1)
    frequencies.arrive(node)
    frequencies.fit(100)
    for _ in range(30):
        frequencies.hit(node)
    assert frequencies.of(node) == COUNT_MAX
    frequencies.leave(node)
    assert frequencies.estimate(node.hash) == COUNT_MAX
    again = Node(node.hash, 1)
    frequencies.arrive(again)
    assert frequencies.of(again) == COUNT_MAX


def test_forgotten_stays_forgotten_however_long_the_cache_lives():
    """A word that nobody looks at for thousands of periods is not taken for a fresh one."""
    frequencies = Frequencies()
    frequencies.fit(4)
    departed = Node(spread(1), 1)
    frequencies.arrive(departed)
    for _ in range(7):
        frequencies.hit(departed)
    frequencies.leave(departed)
    resident = Node(spread(2), 1)
    frequencies.arrive(resident)
    for period in range(1100):
        for _ in range(4 * PERIOD_PER_NODE):
            frequencies.hit(resident)
        if period >= 4:
            assert frequencies.estimate(departed.hash) == 0


def test_a_cache_that_grows_gets_a_larger_sketch():
    """Counts of what left before are given up, those of what is there are not."""
    frequencies = Frequencies()
    frequencies.fit(10)
    node = Node(spread(1), 1)
    frequencies.arrive(node)
    frequencies.hit(node)
    frequencies.fit(10_000)
    assert frequencies.of(node) == 2
    assert len(frequencies._words) >= 2 * 10_000
