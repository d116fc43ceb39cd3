"""Runs scenarios one after the other around one server."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from headrace.cli.bench.context import Context
from headrace.cli.bench.results import Results
from headrace.cli.bench.scenario import Scenario
from headrace.cli.bench.server import ServerUnderTest
from headrace.clock import Clock
from headrace.errors import BenchFailed, HeadraceError


async def run(
    scenarios: Sequence[Scenario],
    results: Results,
    *,
    clock: Clock,
    run_id: str,
    directory: Path,
    say: Callable[[str], None],
    command: Callable[[Path], list[str]],
) -> None:
    """Run `scenarios` into `results`. A server that this starts is stopped again, also on an error or a signal.

    `command` starts a server that keeps its data in a directory; `directory` is a place for that and for its log,
    which the caller removes.
    """
    config = results.config
    try:
        async with ServerUnderTest(command, directory=directory, clock=clock) as server:
            url = server.url if config.url is None else _given(config.url)
            for number, scenario in enumerate(scenarios, start=1):
                context = Context(
                    scenario=scenario.name,
                    config=config,
                    clock=clock,
                    run_id=run_id,
                    server=url,
                    say=partial(_say, say, f"{number} of {len(scenarios)} {scenario.name}"),
                    records=results.records,
                )
                context.say(scenario.title)
                await _measure(scenario, context, results)
    except BenchFailed as error:
        # What was measured stays true; that the server had to be killed is a finding of its own.
        results.failures["server"] = str(error)


async def _measure(scenario: Scenario, context: Context, results: Results) -> None:
    try:
        results.add(scenario, await scenario.run(context))
    except HeadraceError as error:
        results.fail(scenario, str(error))


def _say(say: Callable[[str], None], where: str, what: str) -> None:
    say(f"{where}: {what}")


def _given(url: str) -> Callable[[], Awaitable[str]]:
    async def given() -> str:
        return url

    return given
