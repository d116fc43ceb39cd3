"""A sealed entry is what its writer made of it, at the place that it was made for, or it is nothing."""

import zlib

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headrace.cache.codec import HEAD_BYTES, Codec, Envelope, Rejected
from headrace.cache.seal import Encryption, Seal, Signature

SEALS = [Signature, Encryption]
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
values = st.none() | st.integers(-(2**63), 2**63) | st.text(max_size=60) | st.lists(st.text(max_size=10), max_size=5)
secrets = st.text(st.characters(codec="ascii"), min_size=16, max_size=60)
ids = st.text(st.sampled_from("abcXYZ019._-"), min_size=1, max_size=32)
keyrings = st.dictionaries(ids, secrets, min_size=2, max_size=4)
kinds = st.sampled_from(SEALS)
ENTRY = Envelope(
    {"name": "ada", "n": [1, 2, 3]}, 1_700_000_000_000, 60_000, 1000, 12, 2**62 + 7, (("t", b"12345678"),)
)


def sealed_by(seal: Seal | None, key: str = "user:42", value: object = "v") -> bytes:
    return Codec(seal=seal).seal(key, Envelope(value, 1_700_000_000_000, 60_000, 0))


@pytest.mark.parametrize("kind", SEALS)
@pytest.mark.parametrize("compress_min", [None, 0], ids=["as it is", "packed"])
def test_every_flipped_bit_is_refused(kind, compress_min):
    """Of a whole entry, header, key id, salt, nonce, body and tag, no bit can be changed."""
    codec = Codec(seal=kind({"new": "s" * 16, "old": "t" * 16}, namespace="shop"), compress_min=compress_min)
    data = codec.seal("user:42", ENTRY)
    assert codec.open("user:42", data) == ENTRY
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert isinstance(codec.open("user:42", bytes(changed)), Rejected), f"bit {bit}"


@pytest.mark.parametrize("kind", SEALS)
def test_every_truncation_is_refused_as_such(kind):
    """A tail that is missing, from one byte to all, is told as a cut."""
    codec = Codec(seal=kind({"a": "s" * 16}, namespace="shop"))
    data = codec.seal("user:42", ENTRY)
    reasons = [codec.open("user:42", data[:length]) for length in range(len(data))]
    assert {reason.reason for reason in reasons} == {
        "shorter than a header",
        "cut",
        "cut, or longer than it was written",
    }


@given(kinds, keyrings, texts, values, st.data())
@settings(max_examples=150)
def test_any_flipped_bit_of_any_entry_is_refused(kind, keyring, key, value, data):
    """What holds of one entry holds of all, whatever their values, keys and key ids."""
    codec = Codec(seal=kind(keyring, namespace="shop"))
    sealed = codec.seal(key, Envelope(value, 1, 2, 3))
    bit = data.draw(st.integers(0, 8 * len(sealed) - 1))
    changed = bytearray(sealed)
    changed[bit // 8] ^= 1 << bit % 8
    assert isinstance(codec.open(key, bytes(changed)), Rejected)


@given(kinds, keyrings, texts, values)
def test_keys_rotate(kind, keyring, key, value):
    """The first id writes, every id reads, and what a removed id wrote is a miss that names it."""
    (new, _), *older = keyring.items()
    old, secret = older[-1]
    before = kind({old: secret}, namespace="shop")
    after = kind(keyring, namespace="shop")
    gone = kind({name: each for name, each in keyring.items() if name != old}, namespace="shop")
    entry = sealed_by(before, key, value)
    assert Codec(seal=after).open(key, entry).value == value
    assert Codec(seal=gone).open(key, sealed_by(after, key, value)).value == value
    rejected = Codec(seal=gone).open(key, entry)
    assert isinstance(rejected, Rejected)
    assert rejected.reason.endswith(f"key has the id {old!r}")
    assert sealed_by(after, key, value)[HEAD_BYTES + 5 :].startswith(new.encode())


@given(kinds, secrets, secrets)
def test_the_same_id_with_another_secret_reads_nothing(kind, secret, other):
    """An id is a name, not a proof."""
    assume(secret.encode() != other.encode())
    # HMAC pads short secrets with zero bytes, so that a secret and the same with zeros behind it are one.
    assume(secret.rstrip("\0") != other.rstrip("\0"))
    entry = sealed_by(kind({"a": secret}, namespace="shop"))
    assert isinstance(Codec(seal=kind({"a": other}, namespace="shop")).open("user:42", entry), Rejected)


@given(kinds, texts, texts, texts, texts)
def test_an_entry_is_bound_to_its_namespace_and_key(kind, namespace, key, other_namespace, other_key):
    """Moved to another key, another namespace, or a place whose parts only read the same when joined, it is a miss."""
    assume((namespace, key) != (other_namespace, other_key))
    here, there = (kind({"a": "s" * 16}, namespace=each) for each in (namespace, other_namespace))
    opened = Codec(seal=there).open(other_key, sealed_by(here, key))
    assert opened == Rejected("written for another key or namespace")


@pytest.mark.parametrize("kind", SEALS)
def test_the_place_is_proved_and_not_only_noted(kind):
    """Two keys whose legible checks are equal are still two keys."""
    key, other = "user:1fdc0ee9", "user:5fb19e8e"
    seal = kind({"a": "s" * 16}, namespace="shop")
    assert zlib.crc32(seal.place(key)) == zlib.crc32(seal.place(other))
    opened = Codec(seal=seal).open(other, sealed_by(seal, key))
    assert isinstance(opened, Rejected)
    assert opened.reason.startswith(("signature does not match", "cannot be decrypted"))


@given(st.sampled_from([None, *SEALS]), st.sampled_from([None, *SEALS]), texts, values)
def test_the_seal_is_chosen_by_the_configuration_alone(wanted, written, key, value):
    """Plain, signed and encrypted entries count only where their kind is configured: there is no way down, nor up."""
    assume(wanted is not written)
    reader, writer = (kind and kind({"a": "s" * 16}, namespace="shop") for kind in (wanted, written))
    found, asked = ((seal.kind if seal else "plain") for seal in (writer, reader))
    entry = sealed_by(writer, key, value)
    assert Codec(seal=reader).open(key, entry) == Rejected(f"{found}, where only {asked} entries are accepted")
    relabelled = entry[:3] + bytes([entry[3] & ~0x60 | (reader.flag if reader else 0)]) + entry[4:]
    assert isinstance(Codec(seal=reader).open(key, relabelled), Rejected)


@given(texts, st.text("abcdefgh", min_size=8, max_size=60), texts)
def test_nothing_of_the_body_is_legible(key, value, tag):
    """Neither the value nor the names of tags are in the bytes, and equal values look different each time."""
    seal = Encryption({"a": "s" * 16}, namespace="shop")
    entry = Envelope(value, 1, 2, 3, tags=((f"tag {tag}", b"12345678"),))
    first, second = (Codec(seal=seal, compress_min=None).seal(key, entry) for _ in range(2))
    assert value.encode() not in first
    assert f"tag {tag}".encode() not in first
    body_from = HEAD_BYTES + 5 + 1 + 16
    assert first[:body_from] == second[:body_from]
    assert first[body_from:] != second[body_from:]
