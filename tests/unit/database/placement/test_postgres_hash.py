"""Our hash is Postgres' hash: values that a Postgres 15 server printed."""

import uuid

import pytest

from headrace.database.placement.postgres_hash import hash_bytes, hash_integer, hash_key
from headrace.errors import CallerError


@pytest.mark.parametrize("key", [True, 1.5, None, ("a",)])
def test_a_key_of_another_type_is_refused(key):
    """Only types whose hash both sides agree on may be keys."""
    with pytest.raises(CallerError, match="Shard by"):
        hash_key(key)


def test_an_integer_beyond_bigint_is_refused():
    """2**63 does not fit the column, so it has no slot."""
    with pytest.raises(CallerError, match="bigint"):
        hash_integer(2**63)


def test_text_hashes_as_its_utf8_bytes():
    """A text key and its encoding have one hash."""
    assert hash_key("Mühlgraben") == hash_bytes("Mühlgraben".encode())


def test_a_uuid_hashes_as_its_bytes():
    """A UUID key hashes as the 16 bytes that Postgres stores."""
    key = uuid.UUID(int=7)
    assert hash_key(key) == hash_bytes(key.bytes)
