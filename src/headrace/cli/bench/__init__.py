"""`headrace bench`: measures the promises on this machine, against a real server."""

from pathlib import Path

import click


@click.command()
@click.option("--only", multiple=True, metavar="NAME", help="A scenario or a group of them; may be repeated.")
@click.option("--list", "listing", is_flag=True, help="Show every target and what measures it, and measure nothing.")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Measure so many times.")
@click.option(
    "--seconds",
    type=click.FloatRange(0.2, 3600),
    default=5.0,
    show_default=True,
    help="Length of a measurement under load; up to a second of warm-up comes on top.",
)
@click.option(
    "--connections", type=click.IntRange(1, 10_000), default=128, show_default=True, help="Keep-alive connections."
)
@click.option(
    "--workers", type=click.IntRange(1, 256), default=2, show_default=True, help="Workers of the server it starts."
)
@click.option("--url", metavar="URL", help="Measure this running server instead of starting one.")
@click.option("--token", envvar="HEADRACE_SERVER_TOKEN", show_envvar=True, help="The token that this server wants.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write every value of every round to FILE.",
)
@click.option("--strict", is_flag=True, help="Exit with 1 unless every measured target is met.")
def bench(
    *,
    only: tuple[str, ...],
    listing: bool,
    rounds: int,
    seconds: float,
    connections: int,
    workers: int,
    url: str | None,
    token: str | None,
    json_file: Path | None,
    strict: bool,
) -> None:
    """Measure what headrace promises: latency under constant load, throughput, memory, start of agents.

    Starts `headrace up` in a temporary directory and stops it again, unless --url names a server. The exit code is 0
    even if a target is missed (see --strict), and 1 if something could not be measured.
    """
    # Imported here, so that `headrace --help` stays fast.
    from headrace.cli.bench.catalogue import SCENARIOS, chosen
    from headrace.cli.bench.context import BenchConfig
    from headrace.cli.bench.http1 import Endpoint
    from headrace.cli.bench.results import write_json
    from headrace.cli.bench.screen import measure, show_results, show_targets
    from headrace.errors import CallerError

    if listing:
        show_targets(SCENARIOS)
        return
    try:
        scenarios = chosen(only)
        if url is not None:
            Endpoint.parse(url)
    except CallerError as error:
        raise click.UsageError(str(error)) from None
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise click.BadParameter(f"the directory of {str(json_file)!r} does not exist", param_hint="--json")
    config = BenchConfig(
        rounds=rounds,
        seconds=seconds,
        warmup_s=min(1.0, seconds),
        connections=connections,
        workers=workers,
        url=url,
        token=token,
    )
    results = measure(scenarios, config, is_complete=not only)
    if json_file is not None:
        write_json(json_file, results)
    show_results(results)
    if results.failures or (strict and not results.all_met):
        click.get_current_context().exit(1)
