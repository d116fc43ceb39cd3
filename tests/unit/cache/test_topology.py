"""Cluster arithmetic: slots, redirections and who serves what, from the words of the specification."""

import pytest

from headrace.cache.topology import SlotMap, parse_addresses, primaries, redirection, slot_of


@pytest.mark.parametrize(
    ("key", "slot"),
    [
        # The first two are the values of the cluster specification and of CLUSTER KEYSLOT's documentation.
        (b"123456789", 0x31C3),
        (b"somekey", 11058),
        (b"foo{hash_tag}", 2515),
        (b"bar{hash_tag}", 2515),
    ],
)
def test_slots_are_those_of_the_specification(key, slot):
    """CRC16 of the hash tag, or of the whole key."""
    assert slot_of(key) == slot


@pytest.mark.parametrize(
    ("one", "other"),
    [(b"foo{}{bar}", b"foo{}{bar}"), (b"foo{{bar}}zap", b"{bar"), (b"foo{bar}{zap}", b"bar"), (b"{user}:l", b"user")],
)
def test_hash_tags_end_at_the_first_closing_brace(one, other):
    """An empty tag counts for nothing, and of nested braces the first pair decides."""
    assert slot_of(one) == slot_of(other)


@pytest.mark.parametrize(
    ("message", "meaning"),
    [
        ("MOVED 3999 127.0.0.1:6381", ("MOVED", 3999, ("127.0.0.1", 6381))),
        ("ASK 3999 ::1:6381", ("ASK", 3999, ("::1", 6381))),
        ("MOVED 3999 :6381", ("MOVED", 3999, ("asked", 6381))),
        ("MOVED 99999 127.0.0.1:6381", None),
        ("MOVED 3999 nowhere", None),
        ("ERR unknown command", None),
        ("", None),
    ],
)
def test_redirections(message, meaning):
    """MOVED and ASK name a slot and a node; an empty host is the node that was asked."""
    assert redirection(message, ("asked", 1)) == meaning


def test_a_slots_reply_names_primaries():
    """Of each range the first node is the primary; replicas and metadata are passed over."""
    reply = [
        [0, 5460, [b"10.0.0.1", 7000, b"id", []], [b"10.0.0.9", 7003, b"id", []]],
        [5461, 16383, [b"", 7001, b"id"]],
    ]
    assert primaries(reply, ("asked", 1)) == [(0, 5460, ("10.0.0.1", 7000)), (5461, 16383, ("asked", 7001))]


@pytest.mark.parametrize("reply", [None, b"OK", [[0, 99999, [b"h", 1]]], [[5, 1, [b"h", 1]]], [["x"]]])
def test_a_reply_that_is_no_slot_map_is_refused(reply):
    """Nonsense does not replace what is known."""
    assert primaries(reply, ("asked", 1)) is None


def test_the_map_follows_moves_and_replacements():
    """MOVED changes one slot, a whole reply all of them."""
    slots = SlotMap()
    assert slots.owner(0) is None
    slots.replace([(0, 16383, ("a", 1))])
    slots.move(7, ("b", 2))
    assert (slots.owner(6), slots.owner(7)) == (("a", 1), ("b", 2))
    assert slots.addresses() == {("a", 1), ("b", 2)}
    slots.replace([(0, 10, ("c", 3))])
    assert (slots.owner(7), slots.owner(11)) == (("c", 3), None)


def test_addresses_of_a_url():
    """Hosts with and without ports, IPv6 in brackets; nonsense is an error."""
    assert parse_addresses("a:1,b,[::1]:3,[::1]") == [("a", 1), ("b", 6379), ("::1", 3), ("::1", 6379)]
    for text in ("", "a:b", "a:1,,b:2"):
        with pytest.raises(ValueError, match="not host:port"):
            parse_addresses(text)
