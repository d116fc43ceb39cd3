"""Values as bytes and back: nothing comes back as something else, and no bytes do anything but fail."""

import contextlib
import datetime
import decimal
import math
import subprocess
import sys
import uuid
import zoneinfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cache.integrations.packing import Kind, Packer, Unreadable
from headrace.errors import UnencodableValue

PACKER = Packer()

ZONES = st.sampled_from([None, datetime.UTC, datetime.timezone(datetime.timedelta(hours=9, seconds=1))])
HASHABLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(),
    st.decimals(allow_nan=False),
    st.uuids(),
    st.complex_numbers(allow_nan=False),
    st.datetimes(timezones=ZONES),
    st.dates(),
    st.times(timezones=ZONES),
    st.timedeltas(),
)
KEYS = st.recursive(HASHABLE, lambda inner: st.one_of(st.tuples(inner, inner), st.frozensets(inner)), max_leaves=4)
VALUES = st.recursive(
    st.one_of(KEYS, st.binary().map(bytearray)),
    lambda inner: st.one_of(
        st.lists(inner),
        st.tuples(inner, inner),
        st.sets(KEYS),
        st.dictionaries(KEYS, inner),
        st.dictionaries(st.text(), inner),
    ),
    max_leaves=12,
)


def shape(value: object) -> object:
    """The types of a value and of all its parts."""
    if isinstance(value, dict):
        return dict, [(shape(key), shape(part)) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return value.__class__, [shape(part) for part in value]
    if isinstance(value, (set, frozenset)):
        return value.__class__, sorted(str(shape(part)) for part in value)
    return value.__class__


@given(VALUES)
def test_a_value_comes_back_equal_and_of_the_same_types(value):
    """Whatever is packed is unpacked as what it was, down to its last part."""
    found = PACKER.unpack(PACKER.pack(value))
    assert found == value
    assert shape(found) == shape(value)


@given(VALUES, st.data())
def test_altered_bytes_are_unreadable_or_another_value(value, data):
    """Whatever is done to the bytes, the outcome is a value or Unreadable, and no other error."""
    packed = bytearray(PACKER.pack(value))
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] = data.draw(st.integers(0, 255))
    for altered in (bytes(packed), bytes(packed[:place])):
        with contextlib.suppress(Unreadable):
            PACKER.unpack(altered)


def test_a_time_keeps_its_zone_and_its_fold():
    """A named zone comes back by its name, and the second of two equal hours stays the second."""
    moment = datetime.datetime(2026, 10, 25, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"), fold=1)
    found = PACKER.unpack(PACKER.pack(moment))
    assert (found.tzinfo.key, found.fold, found.utcoffset()) == ("Europe/Berlin", 1, moment.utcoffset())


def test_what_is_not_a_number_comes_back():
    """NaN and the infinities survive, also as decimals."""
    assert math.isnan(PACKER.unpack(PACKER.pack([math.nan]))[0])
    assert PACKER.unpack(PACKER.pack(decimal.Decimal("NaN"))).is_nan()
    assert PACKER.unpack(PACKER.pack((math.inf, -math.inf))) == (math.inf, -math.inf)


class Text(str):
    """A subclass: what it would come back as is unknown."""


class OddZone(datetime.tzinfo):
    """A zone that only its own code knows."""


@pytest.mark.parametrize(
    "value",
    [
        *(object(), len, uuid.UUID, Text("x"), {"a": [Text("x")]}, {Text("k"): 1}, "\ud800", range(3)),
        datetime.datetime(2026, 1, 1, tzinfo=OddZone()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_unknown_is_refused_with_its_name(value):
    """Nothing is stored as something else, wherever in a value it is."""
    with pytest.raises(UnencodableValue):
        PACKER.pack(value)


def test_a_value_in_itself_is_refused():
    """A circle is an error, not a crash."""
    circle: dict[str, object] = {}
    circle["self"] = [circle]
    with pytest.raises(UnencodableValue, match="in itself"):
        PACKER.pack(circle)


def test_deeply_nested_bytes_are_unreadable():
    """What another program nests beyond all bounds does not end the process."""
    with pytest.raises(Unreadable):
        PACKER.unpack(b"\x91" * 100_000 + b"\xc0")


def test_an_unknown_extension_is_unreadable():
    """Bytes of a later version are a miss to an earlier one."""
    packer = Packer([Kind(64, Text, str.__str__, Text)])
    packed = packer.pack([Text("x")])
    assert packer.unpack(packed)[0].__class__ is Text
    with pytest.raises(Unreadable):
        PACKER.unpack(packed)


PROBE = """
import sys, headrace.cache, headrace.cache.integrations, headrace.testing.plugin
print([name for name in ("django", "dogpile", "fastapi", "starlette", "litestar", "redis") if name in sys.modules])
"""


def test_no_framework_is_imported_before_its_module():
    """Whoever uses the cache alone does not pay for the integrations."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "[]\n"
