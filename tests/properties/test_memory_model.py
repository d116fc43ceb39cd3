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

    @initialize()
    def start(self):
        """Fresh ones."""
        self.clock = FakeClock()
        self.cache = MemoryCache(ENTRIES_MAX, ttl=50.0, policy=self.policy, weight_max=WEIGHT_MAX, clock=self.clock)
        self.model = {}
        self.written = 0

    @rule(key=keys, ttl=st.one_of(st.none(), st.integers(0, 100)), weight=st.integers(1, WEIGHT_MAX + 1), tags=tags)
    def set(self, key, ttl, weight, tags):
        """Store a value that was never stored before."""
        self.written += 1
        stored = self.cache.set(key, self.written, ttl=ttl, weight=weight, tags=tags)
        assert stored == (ttl != 0 and weight <= WEIGHT_MAX)
        self.model.pop(key, None)
        if stored:
            deadline = float("inf") if ttl is None else self.clock.monotonic() + ttl
            self.model[key] = (self.written, deadline, tags)

    @rule(key=keys)
    def get(self, key):
        """What is found is the newest value, and not expired."""
        found = self.cache.get(key, "absent")
        value, deadline, _ = self.model.get(key, (None, 0.0, ()))
        assert found == "absent" or (found == value and deadline > self.clock.monotonic())

    @rule(key=keys)
    def delete(self, key):
        """Gone, whatever it was."""
        self.cache.delete(key)
        self.model.pop(key, None)
        assert key not in self.cache

    @rule(tag=st.sampled_from(["red", "green"]))
    def invalidate(self, tag):
        """All members are gone."""
        self.cache.invalidate_tag(tag)
        self.model = {key: held for key, held in self.model.items() if tag not in held[2]}

    @rule(seconds=st.integers(1, 200))
    def wait(self, seconds):
        """Time passes."""
        self.clock.advance(seconds)

    @rule(entries_max=st.integers(1, ENTRIES_MAX))
    def shrink_and_grow(self, entries_max):
        """Resizing evicts at once and forgets nothing else."""
        self.cache.resize(entries_max=entries_max)
        assert len(self.cache) <= entries_max
        self.cache.resize(entries_max=ENTRIES_MAX)

    @invariant()
    def bounds_hold(self):
        """Neither too many nor too heavy, and nothing that was deleted."""
        assert len(self.cache) <= ENTRIES_MAX
        assert self.cache.statistics().weight <= WEIGHT_MAX
        assert all(key in self.model for key in range(10) if key in self.cache)


@pytest.mark.parametrize("policy", ["adaptive", "lru", "s3fifo", "sieve", "wtinylfu"])
def test_it_never_invents(policy):
    """For every policy, over random calls."""
    machine = type(f"{policy.title()}Machine", (MemoryMachine,), {"policy": policy}).TestCase
    machine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
    machine("runTest").runTest()
    assert machine.settings.max_examples == 60
