"""MemoryCache beside an obvious model: a dict with deadlines. It may forget early, but it never invents."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from headrace.cache import MemoryCache
from headrace.testing import FakeClock

ENTRIES_MAX, WEIGHT_MAX = 6, 12
keys = st.integers(0, 9)
tags = st.lists(st.sampled_from(["red", "green"]), unique=True)


class MemoryMachine(RuleBasedStateMachine):
    """Random calls on both; `policy` is set by the subclass."""

    policy = "lru"

    @initialize(entries_max=st.integers(1, ENTRIES_MAX), is_weighed=st.booleans())
    def start(self, entries_max, is_weighed):
        """Fresh ones."""
        self.clock = FakeClock()
        self.entries_max = entries_max
        self.weight_max = WEIGHT_MAX if is_weighed else None
        self.cache = MemoryCache(
            entries_max, ttl=50.0, policy=self.policy, weight_max=self.weight_max, clock=self.clock
        )
        self.model = {}
        self.written = 0
        self.reads = 0
        self.gone = 0
        """Values that left for another reason than a bound or their time."""
        self.too_heavy = self.too_short = 0

    @rule(key=keys, ttl=st.one_of(st.none(), st.integers(0, 100)), weight=st.integers(1, WEIGHT_MAX + 1), tags=tags)
    def set(self, key, ttl, weight, tags):
        """Store a value that was never stored before."""
        self.written += 1
        self.gone += key in self.cache
        is_too_heavy = self.weight_max is not None and weight > self.weight_max
        stored = self.cache.set(key, self.written, ttl=ttl, weight=weight, tags=tags)
        assert stored == (ttl != 0 and not is_too_heavy)
        self.too_heavy += is_too_heavy
        self.too_short += ttl == 0 and not is_too_heavy
        self.model.pop(key, None)
        if stored:
            assert key in self.cache
            deadline = float("inf") if ttl is None else self.clock.monotonic() + ttl
            self.model[key] = (self.written, deadline, tags)

    @rule(key=keys)
    def get(self, key):
        """What is found is the newest value, and not expired."""
        self.reads += 1
        assert (key in self.cache) == (self.cache.get(key, "absent") != "absent")
        self.reads += 1
        found = self.cache.get(key, "absent")
        value, deadline, _ = self.model.get(key, (None, 0.0, ()))
        assert found == "absent" or (found == value and deadline > self.clock.monotonic())

    @rule(key=keys)
    def delete(self, key):
        """Gone, whatever it was."""
        was_there = key in self.cache
        assert self.cache.delete(key) == was_there
        self.gone += was_there
        self.model.pop(key, None)
        assert key not in self.cache

    @rule(tag=st.sampled_from(["red", "green"]))
    def invalidate(self, tag):
        """All members are gone, and only those."""
        members = {key for key, held in self.model.items() if tag in held[2] and key in self.cache}
        others = {key for key in self.model if key in self.cache} - members
        assert self.cache.invalidate_tag(tag) == len(members)
        self.gone += len(members)
        self.model = {key: held for key, held in self.model.items() if tag not in held[2]}
        assert all(key in self.cache for key in others)

    @rule(rest=st.integers(0, 2))
    def delete_where(self, rest):
        """All keys that match are gone, and only those."""
        matching = {key for key in self.model if key % 3 == rest and key in self.cache}
        assert self.cache.delete_where(lambda key: key % 3 == rest) == len(matching)
        self.gone += len(matching)
        self.model = {key: held for key, held in self.model.items() if key % 3 != rest}

    @rule()
    def clear(self):
        """Nothing is left."""
        before = self.cache.statistics()
        self.cache.clear()
        self.gone += before.size - (self.cache.statistics().expirations - before.expirations)
        self.model = {}
        assert len(self.cache) == 0

    @rule(seconds=st.one_of(st.floats(0.01, 2.0), st.integers(1, 300)))
    def wait(self, seconds):
        """Time passes."""
        self.clock.advance(seconds)

    @rule(entries_max=st.integers(1, ENTRIES_MAX))
    def resize(self, entries_max):
        """Shrinking evicts at once and as little as it can; growing evicts nothing."""
        before = len(self.cache)
        expirations = self.cache.statistics().expirations
        self.cache.resize(entries_max=entries_max)
        self.entries_max = entries_max
        assert len(self.cache) == min(before - (self.cache.statistics().expirations - expirations), entries_max)

    @invariant()
    def the_parts_agree(self):
        """Neither too many nor too heavy, nothing that was deleted, and every value is accounted for."""
        self.cache.validate()
        told = self.cache.statistics()
        assert told.size == len(self.cache) <= self.entries_max
        assert self.weight_max is None or told.weight <= self.weight_max
        assert all(key in self.model for key in range(10) if key in self.cache)
        assert told.hits + told.misses == self.reads
        left = told.evictions - self.too_heavy + told.expirations - self.too_short + self.gone
        assert told.sets == told.size + left


@pytest.mark.parametrize("policy", ["adaptive", "lru", "s3fifo", "sieve", "wtinylfu"])
def test_it_never_invents(policy):
    """For every policy, over random calls."""
    machine = type(f"{policy.title()}Machine", (MemoryMachine,), {"policy": policy}).TestCase
    machine.settings = settings(max_examples=60, stateful_step_count=60)
    machine("runTest").runTest()
    assert machine.settings.max_examples == 60
