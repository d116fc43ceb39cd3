"""Limits that nothing could run under are refused when they are written down."""

from typing import Any

import pytest

from headrace.agents.isolation import IsolationConfig, Limits
from headrace.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"memory_bytes": 0}, "Limits.memory_bytes is 0"),
        ({"cpu_s": -1.0}, "Limits.cpu_s is -1"),
        ({"scratch_bytes": -1}, "Limits.scratch_bytes is -1"),
        ({"processes": 16, "threads": 16}, "must be above Limits.threads"),
    ],
)
def test_impossible_limits_are_refused(changes: dict[str, Any], named: str) -> None:
    """The message names the field and the rule."""
    with pytest.raises(ConfigError, match=named):
        Limits(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"workers_max": 0}, "IsolationConfig.workers_max is 0"),
        ({"warm_min": 3, "warm_max": 2}, "warm_min"),
        ({"workers_max": 4, "warm_max": 4}, "workers_max"),
    ],
)
def test_an_impossible_pool_is_refused(changes: dict[str, Any], named: str) -> None:
    """The message names the field and the rule."""
    with pytest.raises(ConfigError, match=named):
        IsolationConfig(**changes)


def test_zero_may_mean_none() -> None:
    """No scratch space and no warm worker are possible wishes."""
    assert Limits(scratch_bytes=0).scratch_bytes == 0
    assert IsolationConfig(warm_min=0).warm_min == 0
