"""All scenarios, in the order in which they run, and how to choose among them."""

from collections.abc import Sequence
from difflib import get_close_matches

from headrace.cli.bench import agents, api, memory
from headrace.cli.bench.scenario import Scenario
from headrace.errors import ConfigError

SCENARIOS: tuple[Scenario, ...] = (
    api.STATUS,
    api.EXECUTE,
    api.THROUGHPUT,
    memory.SERVER,
    agents.COLD_START,
    agents.WARM_START,
)


def chosen(names: Sequence[str], scenarios: Sequence[Scenario] = SCENARIOS) -> tuple[Scenario, ...]:
    """The scenarios that `names` (of scenarios or groups) mean; all of them for no names."""
    known = {scenario.name for scenario in scenarios} | {scenario.group for scenario in scenarios}
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            guess = f"Did you mean {close[0]!r}?" if close else "`headrace bench --list` shows what there is."
            fix = f"{guess} Known: {', '.join(sorted(known))}."
            raise ConfigError(f"{name!r} is neither a scenario nor a group of `headrace bench`.", fix=fix)
    return tuple(scenario for scenario in scenarios if not names or scenario.name in names or scenario.group in names)
