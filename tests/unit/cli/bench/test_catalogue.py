import pytest

from headrace.cli.bench.catalogue import SCENARIOS, chosen
from headrace.cli.bench.targets import TARGETS
from headrace.errors import ConfigError


def test_no_name_means_every_scenario():
    """What nobody restricted runs whole, in the order of the catalogue."""
    assert chosen(()) == SCENARIOS


def test_a_group_or_a_name_chooses_and_repetition_adds():
    """`--only agents --only api-status` is the union, each scenario once, in the order of the catalogue."""
    names = [scenario.name for scenario in chosen(("agents", "api-status", "agent-cold-start"))]

    assert names == ["api-status", "agent-cold-start", "agent-warm-start"]


@pytest.mark.parametrize(("name", "suggestion"), [("apii", "'api'"), ("agent-cold", "'agent-cold-start'")])
def test_an_unknown_name_is_an_error_with_a_suggestion(name, suggestion):
    """A slip of the pen is answered with what was probably meant."""
    with pytest.raises(ConfigError, match=f"Did you mean {suggestion}"):
        chosen((name,))


def test_an_unknown_name_unlike_any_other_lists_what_there_is():
    """Without a good guess, the error shows the choice."""
    with pytest.raises(ConfigError, match=r"--list.*api-status"):
        chosen(("zzz",))


def test_names_are_unique_and_targets_known():
    """A name means one thing, and what a scenario measures appears in the list of targets."""
    names = [scenario.name for scenario in SCENARIOS]

    assert len(set(names)) == len(names)
    assert not set(names) & {scenario.group for scenario in SCENARIOS}
    assert {target for scenario in SCENARIOS for target in scenario.targets} <= set(TARGETS)
