"""The terminal around a run: progress to stderr, tables to stdout."""

import asyncio
import secrets
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.text import Text

from headrace.cli.bench.context import BenchConfig
from headrace.cli.bench.frame import run
from headrace.cli.bench.machine import machine
from headrace.cli.bench.results import Results
from headrace.cli.bench.scenario import Scenario
from headrace.cli.bench.server import up_command
from headrace.cli.bench.table import results_table, scenarios_table, targets_table
from headrace.cli.bench.targets import TARGETS
from headrace.clock import SystemClock

PIPE_COLUMNS = 160
"""Width of tables that do not go to a terminal."""
TERMINATED = 143


def measure(
    scenarios: Sequence[Scenario],
    config: BenchConfig,
    *,
    is_complete: bool,
    command: Callable[[Path], list[str]] | None = None,
) -> Results:
    """Run `scenarios` and show what is being done; `is_complete` lists the targets that nobody measures yet, too.

    `command` starts a server that keeps its data in a directory; `headrace up` by default.
    """
    clock = SystemClock()
    measured = {target for scenario in scenarios for target in scenario.targets}
    unmeasured = tuple(target for target in TARGETS if target not in measured) if is_complete else ()
    results = Results(machine=machine(clock), config=config, unmeasured=unmeasured)
    with TemporaryDirectory(prefix="headrace-bench-", ignore_cleanup_errors=True) as directory, _progress() as say:
        work = run(
            scenarios,
            results,
            clock=clock,
            run_id=secrets.token_hex(4),
            directory=Path(directory),
            say=say,
            command=command or partial(up_command, workers=config.workers),
        )
        try:
            asyncio.run(_cancelled_by_sigterm(work))
        except asyncio.CancelledError:
            sys.exit(TERMINATED)
    return results


async def _cancelled_by_sigterm(work: Coroutine[None, None, None]) -> None:
    """SIGTERM ends the run as Ctrl-C does: by cancelling it, so that the server is stopped on the way out."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await work


def show_results(results: Results) -> None:
    """The table, and in full what kept scenarios from measuring."""
    _stdout().print(results_table(results))
    errors = Console(stderr=True)
    for name, why in results.failures.items():
        errors.print(Text(f"{name}: {why}", style="red"))


def show_targets(scenarios: Sequence[Scenario]) -> None:
    """The tables of `--list`."""
    console = _stdout()
    console.print(targets_table(scenarios))
    console.print(scenarios_table(scenarios))


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line that changes on a terminal; a line each where there is none."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what: console.print(Text(what), soft_wrap=True)
        return
    with console.status("") as status:
        yield lambda what: status.update(Text(what))


def _stdout() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=PIPE_COLUMNS)
