"""Results for people."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from headrace.cli.bench.results import Results
from headrace.cli.bench.scenario import Scenario, State
from headrace.cli.bench.targets import TARGETS, Direction, Target

NOTHING = "—"
STYLES = {
    State.MET: "green",
    State.MISSED: "bold red",
    State.GENERATOR_BOUND: "yellow",
    State.NOT_MEASURED: "dim",
}


def results_table(results: Results) -> Table:
    """A line a measurement, a section a scenario, and at the end what nobody measures yet."""
    machine = results.machine
    caption = (
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 1e9:.0f} GB, {machine.python}, "
        f"{machine.build} build; rounds: {results.config.rounds}, of which the median counts; "
        "spread is lowest to highest round"
    )
    table = Table("what", "case", title="headrace bench", caption=caption, title_justify="left")
    for column in ("target", "measured", "spread"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("note", style="dim")
    previous: Scenario | None = None
    for scenario, measurement in results.measurements:
        if previous not in (None, scenario):
            table.add_section()
        previous = scenario
        target, spread, state = measurement.target, measurement.spread, measurement.state
        table.add_row(
            target.title,
            measurement.case,
            limit(target),
            NOTHING if measurement.measured is None else figure(measurement.measured, target.unit),
            NOTHING if spread is None else f"{figure(spread[0])} … {figure(spread[1])}",
            Text(state, style=STYLES[state]),
            Text(measurement.note),
        )
    table.add_section()
    for target in results.unmeasured:
        table.add_row(target.title, "", limit(target), NOTHING, NOTHING, Text(State.NOT_MEASURED, style="dim"), "")
    return table


def targets_table(scenarios: Sequence[Scenario]) -> Table:
    """Every target, with what measures it."""
    table = Table("what", title="what headrace promises, and what measures it", title_justify="left")
    table.add_column("target", justify="right", no_wrap=True)
    table.add_column("measured by")
    for target in TARGETS:
        names = ", ".join(scenario.name for scenario in scenarios if target in scenario.targets)
        table.add_row(target.title, limit(target), names or Text("not measured yet", style="dim"))
    return table


def scenarios_table(scenarios: Sequence[Scenario]) -> Table:
    """What `--only` takes."""
    table = Table("group", "scenario", "what it does", title="what --only takes", title_justify="left")
    for scenario in scenarios:
        table.add_row(scenario.group, scenario.name, scenario.title)
    return table


def limit(target: Target) -> str:
    """A target's limit, as in `< 100 ms`."""
    sign = "<" if target.direction is Direction.BELOW else "≥"
    return f"{sign} {figure(target.limit, target.unit)}"


def figure(value: float, unit: str = "") -> str:
    """Three significant digits are more than most benchmarks deserve."""
    if value >= 100 or value == int(value):
        text = f"{value:,.0f}"
    elif value >= 10:
        text = f"{value:.1f}"
    else:
        text = f"{value:.2f}" if value >= 1 else f"{value:.3g}"
    return f"{text}{'' if unit in {'', '/s', '%'} else ' '}{unit}"
