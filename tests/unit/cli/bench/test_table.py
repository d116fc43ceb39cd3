from io import StringIO

import pytest
from rich.console import Console

from headrace.cli.bench.catalogue import SCENARIOS
from headrace.cli.bench.table import figure, limit, results_table, scenarios_table, targets_table
from headrace.cli.bench.targets import API_PEAK, SERVER_MEMORY, TARGETS
from tests.unit.cli.bench.circumstances import results


def lines(table) -> list[str]:
    """The table as text, a line each, borders replaced by one bar."""
    out = StringIO()
    Console(file=out, width=220).print(table)
    return [" ".join(line.replace("│", "|").split()) for line in out.getvalue().splitlines()]


def test_a_result_shows_target_median_spread_and_state():
    """One line a measurement, in the target's unit."""
    shown = lines(results_table(results()))

    assert "| API response time, p50 | 1,000/s | < 100 ms | 12.2 ms | 11 … 14.5 | met | |" in shown
    assert "| API response time, p99 | 1,000/s | < 500 ms | 700 ms | 650 … 720 | missed | 3 x timeout |" in shown


def test_what_could_not_be_measured_says_why_and_what_nobody_measures_is_listed():
    """Silence would look like success."""
    shown = lines(results_table(results()))

    assert any("API server memory" in line and "not measured | The server went away. |" in line for line in shown)
    assert "| API response time, p99 | | < 500 ms | — | — | not measured | |" in shown


def test_the_caption_says_on_what_machine():
    """A number without its machine is an anecdote."""
    caption = " ".join(lines(results_table(results()))[-2:])

    assert (
        "Difference Engine, 2 cores, 8 GB, CPython 3.11.0, plain build; rounds: 3, of which the median counts"
        in caption
    )


def test_the_list_shows_every_target_and_what_measures_it():
    """With the honest words for those that nothing measures."""
    shown = lines(targets_table(SCENARIOS))

    assert "| API throughput, peak | ≥ 10,000/s | api-throughput |" in shown
    assert "| agent start, cold | < 2,000 ms | agent-cold-start |" in shown
    assert "| database query, analytics | < 1,000 ms | not measured yet |" in shown
    assert all(any(f"| {target.title} |" in line for line in shown) for target in TARGETS)


def test_the_list_shows_what_only_takes():
    """Groups and scenarios, with a line on each."""
    shown = lines(scenarios_table(SCENARIOS))

    assert all(any(f"| {each.group} | {each.name} | {each.title} |" in line for line in shown) for each in SCENARIOS)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (12_345.6, "/s", "12,346/s"),
        (100.0, "ms", "100 ms"),
        (12.34, "ms", "12.3 ms"),
        (1.234, "ms", "1.23 ms"),
        (0.01234, "GB", "0.0123 GB"),
        (3.0, "", "3"),
        (42.25, "%", "42.2%"),
    ],
)
def test_figures_have_three_digits_and_their_unit(value, unit, text):
    """Enough to compare, not more than was measured."""
    assert figure(value, unit) == text


def test_limits_show_their_direction():
    """Below, or at least."""
    assert (limit(SERVER_MEMORY), limit(API_PEAK)) == ("< 2 GB", "≥ 10,000/s")
