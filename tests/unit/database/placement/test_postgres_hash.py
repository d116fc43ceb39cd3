"""Our hash is Postgres' hash: values that a Postgres 15 server printed."""

import datetime
import uuid
from decimal import Decimal
from enum import IntEnum, StrEnum

import pytest

from headrace.database.placement.postgres_hash import hash_bytes, hash_integer, hash_key
from headrace.errors import CallerError


@pytest.mark.parametrize("key", [1.5, None, ("a",), datetime.time(12), "\ud800"])
def test_a_key_of_another_type_is_refused(key):
    """Only types whose hash both sides agree on may be keys."""
    with pytest.raises(CallerError, match=r"Shard by|no Unicode text"):
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


def test_equal_numbers_have_one_hash():
    """Whatever their scale; but a number and its text are different keys."""
    assert hash_key(Decimal("1.50")) == hash_key(Decimal("1.5")) == hash_key(Decimal("15e-1"))
    assert hash_key(5) != hash_key("5")
    assert hash_key(5) != hash_key(Decimal(5))


def test_an_instant_has_one_hash_in_every_time_zone():
    """A timestamptz column holds instants."""
    east = datetime.timezone(datetime.timedelta(hours=9))
    noon = datetime.datetime(2026, 7, 1, 12, tzinfo=datetime.UTC)
    assert hash_key(noon) == hash_key(noon.astimezone(east))


def test_members_of_enums_are_their_values():
    """As the driver sends them."""
    assert hash_key(IntEnum("Level", {"ONE": 1}).ONE) == hash_key(1)
    assert hash_key(StrEnum("Name", {"ACME": "acme"}).ACME) == hash_key("acme")
