"""The names of the parts of a two-phase transaction, and what recovery does with them."""

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.database.postgres.two_phase import Part, due


@given(st.text(min_size=1), st.uuids(), st.text(min_size=1))
def test_a_name_says_everything(decision_shard, id, shard):
    """Whoever finds a part knows whose it is and where its decision stands, unless a shard's name looks like one."""
    read = Part.of(Part(decision_shard, id, shard).gid)
    assert read is not None
    assert read.id == id or id.hex in (decision_shard + shard)


def test_a_colon_in_a_name_does_not_confuse():
    """Shards may be called as their owners like."""
    part = Part("eu:1", uuid.UUID(int=7), "eu:2")
    assert Part.of(part.gid) == part


@pytest.mark.parametrize("gid", ["", "mine", "headrace:x", "headrace:a:123:b", "other:a:" + 32 * "0" + ":b"])
def test_what_is_not_ours_is_left_alone(gid):
    """Other programs prepare transactions, too."""
    assert Part.of(gid) is None


@pytest.mark.parametrize(
    ("is_committed", "age_s", "verdict"),
    [(True, 0.0, True), (False, 0.0, False), (None, 29.9, None), (None, 30.0, False)],
)
def test_recovery_obeys_the_decision_or_waits(is_committed, age_s, verdict):
    """Without one only age says that nobody will make it."""
    assert due(is_committed=is_committed, age_s=age_s, abandoned_s=30.0) is verdict
