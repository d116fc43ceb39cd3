"""Names in the shared tier: what is built is recognised, and nothing else is."""

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cache.fence import Fence
from headrace.cache.keyspace import Keyspace, check_key
from headrace.cache.topology import slot_of
from headrace.errors import InvalidKey

keys = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"], include_characters=" "), min_size=1, max_size=40)


def space() -> Keyspace:
    keyspace = Keyspace("app")
    keyspace.enter(b"e0123")
    return keyspace


def valid(key: str) -> bool:
    try:
        return check_key(key) == key
    except InvalidKey:
        return False


@given(keys.filter(valid))
def test_names_are_recognised(key):
    """Entries, tags and the generation are told apart; leases and other generations are nobody's."""
    keyspace = space()
    assert keyspace.parse(keyspace.name(key)) == ("entry", key)
    assert keyspace.parse(keyspace.tag(key)) == ("tag", key)
    assert keyspace.parse(keyspace.lease(key)) is None
    older = keyspace.name(key)
    keyspace.enter(b"c9999")
    assert keyspace.parse(older) is None
    assert keyspace.parse(keyspace.generation_key) == ("generation", "")


@given(keys.filter(valid))
def test_entry_and_lease_share_a_slot(key):
    """A script touches both, so they must live on one node, whatever braces are in the key."""
    keyspace = space()
    assert slot_of(keyspace.name(key)) == slot_of(keyspace.lease(key))


@given(keys.filter(valid), st.sampled_from(["*", "a*", "?", "[ab]*", "[!ab]*", "x?y*"]))
def test_the_matcher_is_the_glob(key, glob):
    """What is removed by pattern is exactly what the glob says, entries and leases alike."""
    keyspace = space()
    kind = keyspace.matcher(glob)
    matches = fnmatch.fnmatchcase(key, glob)
    assert kind(keyspace.name(key)) is (True if matches else None)
    assert kind(keyspace.lease(key)) is (False if matches else None)
    assert kind(b"app:@tag:" + key.encode()) is None


def test_there_are_no_entries_before_the_generation_is_known():
    """Without a generation an entry has no name."""
    assert Keyspace("app").entry("k") is None
    with pytest.raises(InvalidKey):
        Keyspace("a{b}")


def test_a_fence_turns_away_what_was_noted_before():
    """An epoch holds until its key, or everything, is invalidated."""
    fence = Fence()
    epoch = fence.epoch("k")
    assert fence.holds("k", epoch)
    fence.raise_for("k")
    assert not fence.holds("k", epoch)
    epoch = fence.epoch("k")
    fence.raise_for_all()
    assert not fence.holds("k", epoch)
