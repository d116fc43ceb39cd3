"""The options of the monitor."""

import pytest

from headrace.errors import ConfigError
from headrace.monitor.config import MonitorConfig


def test_the_defaults_keep_an_hour_a_day_and_four_weeks():
    """Steps of five seconds, a minute and five minutes."""
    config = MonitorConfig()

    assert config.steps_max * config.step_s == 3_600.0
    assert config.minutes_max == 24 * 60
    assert config.five_minutes_max * 5 == 28 * 24 * 60


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tick_s", 0.0),
        ("tick_s", 6.0),
        ("step_s", 61.0),
        ("window_s", 0.5),
        ("loop_probe_s", -1.0),
        ("steps_max", 0),
        ("endpoints_max", 0),
        ("summary_minutes", (5, 0)),
    ],
)
def test_a_value_that_breaks_a_rule_is_named(option, value):
    """The message has the option, the value and the rule."""
    with pytest.raises(ConfigError, match=r"monitor\.\w+ is .*must"):
        MonitorConfig(**{option: value})
