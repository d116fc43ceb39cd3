"""Any value comes back as it was; any other bytes are rejected, never believed and never an exception."""

import math
import zlib

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headrace.cache.codec import FOREVER_MS, Codec, Envelope, Rejected
from headrace.cache.seal import Encryption, Signature
from headrace.errors import UnencodableValue

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=50),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)
keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
tags = st.lists(st.tuples(st.text(max_size=10), st.binary(min_size=8, max_size=8)), max_size=3).map(tuple)
milliseconds = st.integers(0, FOREVER_MS)
secrets = {"new": "0123456789abcdef", "old": "fedcba9876543210"}
signature = Signature(secrets, namespace="shop")
encryption = Encryption(secrets, namespace="shop")
codecs = st.sampled_from(
    [
        Codec(),
        Codec(compress_min=0),
        Codec(compress_min=None),
        Codec(seal=signature),
        Codec(seal=signature, compress_min=0),
        Codec(seal=encryption),
        Codec(seal=encryption, compress_min=0),
    ]
)


def envelope(value: object, **changes: object) -> Envelope:
    fields = {"created_ms": 1_700_000_000_000, "fresh_ms": 1000, "stale_ms": 0, **changes}
    return Envelope(value=value, **fields)  # type: ignore[arg-type]


@given(codecs, keys, plain, milliseconds, milliseconds, milliseconds, tags)
def test_what_is_sealed_opens_as_it_was(codec, key, value, created_ms, fresh_ms, stale_ms, tags):
    """Every plain value, time and tag survives the round trip in every configuration."""
    sealed = envelope(value, created_ms=created_ms, fresh_ms=fresh_ms, stale_ms=stale_ms, tags=tags, version=7)
    assert codec.open(key, codec.seal(key, sealed)) == sealed


@given(codecs, keys, plain, st.data())
@settings(max_examples=300)
def test_one_changed_byte_is_noticed(codec, key, value, data):
    """No single byte can be changed without the entry being rejected."""
    sealed = codec.seal(key, envelope(value, tags=(("t", b"12345678"),)))
    at = data.draw(st.integers(0, len(sealed) - 1))
    new = data.draw(st.integers(0, 255).filter(lambda byte: byte != sealed[at]))
    assert isinstance(codec.open(key, sealed[:at] + bytes([new]) + sealed[at + 1 :]), Rejected)


@given(codecs, keys, plain, st.data())
def test_a_cut_or_lengthened_entry_is_noticed(codec, key, value, data):
    """Neither a missing tail nor bytes at the end are accepted."""
    sealed = codec.seal(key, envelope(value))
    cut = data.draw(st.integers(0, len(sealed) - 1))
    assert isinstance(codec.open(key, sealed[:cut]), Rejected)
    assert isinstance(codec.open(key, sealed + data.draw(st.binary(min_size=1, max_size=20))), Rejected)


@given(codecs, keys, keys, plain)
def test_an_entry_of_another_key_is_rejected(codec, key, other, value):
    """Bytes that were copied from one key to another are not believed."""
    assume(key != other)
    assert isinstance(codec.open(other, codec.seal(key, envelope(value))), Rejected)


@given(codecs, keys, st.binary(max_size=200))
@settings(max_examples=300)
def test_foreign_bytes_are_rejected(codec, key, data):
    """Arbitrary bytes, also such that begin like ours, are a rejection."""
    for prefix in (b"", b"hr\x01", b"hr\x01\x00", b"hr\x01\x10", b"hr\x01\x20", b"hr\x01\x40"):
        assert isinstance(codec.open(key, prefix + data), Rejected)


@given(st.integers(1, 500))
def test_a_bomb_is_not_unpacked(times):
    """A small packed payload that unpacks beyond value_bytes_max is rejected."""
    bomb = Codec(compress_min=0).seal("k", envelope("x" * (1000 * times + 1)))
    opened = Codec(value_bytes_max=1000).open("k", bomb)
    assert isinstance(opened, Rejected)
    assert "value_bytes_max" in opened.reason


def test_endless_nesting_is_rejected():
    """A payload that is nested deeper than can be read is no exception, also when its checksum is right."""
    codec = Codec(compress_min=None)
    data = codec.seal("k", envelope(b"\x91" * 100_000), serializer="raw")
    flags = data[3] & ~0x03
    check = zlib.crc32(data[8:], zlib.crc32(b"k", flags)).to_bytes(4, "little")
    opened = codec.open("k", data[:3] + bytes([flags]) + check + data[8:])
    assert isinstance(opened, Rejected)
    assert "recursion" in opened.reason


def test_values_unequal_to_themselves_survive():
    """NaN inside a container is written although it is not equal to itself."""
    codec = Codec()
    opened = codec.open("k", codec.seal("k", envelope([1, math.nan])))
    assert isinstance(opened, Envelope)
    assert math.isnan(opened.value[1])


@pytest.mark.parametrize("value", [{1: "one"}, [math.nan], {"a": {2.5: None}}])
def test_json_refuses_what_would_come_back_as_something_else(value):
    """A key that would turn into text, a NaN that would turn into null."""
    with pytest.raises(UnencodableValue, match="unequal to itself"):
        Codec().seal("k", envelope(value), serializer="json")
