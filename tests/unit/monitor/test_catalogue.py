"""The names that rooms hand their statistics in under."""

import pytest

from headrace.errors import CallerError
from headrace.monitor import catalogue
from headrace.monitor.catalogue import HELP, statistic
from headrace.monitor.slots import COUNTER, GAUGE, Series


def test_every_name_has_its_help():
    """No metric of ours leaves without a sentence about it."""
    names = {value for key, value in vars(catalogue).items() if key.isupper() and str(value).startswith("headrace_")}

    assert names == set(HELP)


@pytest.mark.parametrize(
    ("key", "kind", "series"),
    [
        ("memory_hits", COUNTER, Series("headrace_cache_hits_total", (("tier", "memory"),))),
        ("remote_misses", COUNTER, Series("headrace_cache_misses_total", (("tier", "remote"),))),
        ("entries", GAUGE, Series("headrace_cache_entries", (("tier", "memory"),))),
        ("executions_running", GAUGE, Series("headrace_agent_executions_running")),
        ("pool_waits_total", COUNTER, Series("headrace_pool_waits_total")),
        ("pool_connections", GAUGE, Series("headrace_pool_connections")),
    ],
)
def test_a_key_stands_for_a_series(key, kind, series):
    """Known keys have a meaning, others are counters or gauges by their ending."""
    assert statistic(key) == (kind, series)


@pytest.mark.parametrize("key", ["", "Hits", "9lives", "hit rate", "a" * 101])
def test_a_key_that_is_no_name_is_refused(key):
    """It is named, with what would be right."""
    with pytest.raises(CallerError, match="cannot be the name"):
        statistic(key)
