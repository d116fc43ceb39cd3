"""`headrace indexes`: which indexes to make and which to drop, doing it, and what was done."""

import asyncio
import json
import os
import re
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from headrace.cli.shards import with_embedded
from headrace.errors import CallerError

if TYPE_CHECKING:
    from headrace.database import Database, DatabaseConfig, IndexAdvice, IndexChange, Workload

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
_JSON = click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
_WORKLOAD = click.option(
    "--workload",
    "workload_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file of statements, each ended by `;` and weighing the same, instead of those observed.",
)


def _size(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """Bytes: `500MiB`, `2G`, `1048576`."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:i?b)?", value.strip().lower())
    if found is None:
        raise click.BadParameter(f"{value!r} is no size: write 500MiB, 2GiB or a number of bytes", context, option)
    return int(float(found[1]) * _UNITS[found[2]])


_BUDGET = click.option(
    "--budget", callback=_size, help="All new indexes together, on all shards: 500MiB.  [default: as the tables]"
)


@click.group()
@click.option("--config", "config_path", type=click.Path(dir_okay=False, path_type=Path), help="A TOML file.")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Of a service with embedded shards.  [default: .headrace]",
)
@click.pass_context
def indexes(context: click.Context, *, config_path: Path | None, directory: Path | None) -> None:
    """Which indexes to make and which to drop; doing it, measured; what was done."""
    from headrace.config import load_config

    config = load_config(config_path, environment=os.environ)
    context.obj = with_embedded(config, directory or config.embedded.directory)


@indexes.command()
@_BUDGET
@_WORKLOAD
@click.option("--rejected", is_flag=True, help="Also what was looked at and is not advised.")
@_JSON
@click.pass_obj
def advise(
    config: "DatabaseConfig", *, budget: int | None, workload_path: Path | None, rejected: bool, as_json: bool
) -> None:
    """Print what to create and what to drop, with the evidence. Changes nothing.

    The statements are those of pg_stat_statements, unless --workload names a file.
    """
    advice = _with_database(config, lambda db, tell: _advised(db, budget, workload_path, tell))
    if not rejected and not as_json:
        advice = [each for each in advice if each.verdict != "reject"]
    if as_json:
        click.echo(json.dumps([asdict(each) for each in advice], indent=2))
    else:
        _print_advice(advice)


@indexes.command()
@click.argument("names", nargs=-1)
@_BUDGET
@_WORKLOAD
@click.option("--dry-run", is_flag=True, help="Print the statements instead of running them.")
@_JSON
@click.pass_obj
def apply(
    config: "DatabaseConfig",
    *,
    names: tuple[str, ...],
    budget: int | None,
    workload_path: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Follow the advice, or only what it says of the indexes NAMES; measured, and taken back where it does no good.

    Exits with 2 if anything was taken back.
    """
    found = _with_database(
        config, lambda db, tell: _applied(db, names, budget, workload_path, dry_run=dry_run, tell=tell)
    )
    if as_json:
        click.echo(json.dumps([asdict(each) for each in found], indent=2))
    elif dry_run:
        for each in found:
            click.echo(f"{each.sql};")
    else:
        _print_changes(found)
    if any(getattr(each, "state", "") in {"failed", "restored"} or _was_undone(each) for each in found):
        sys.exit(2)


@indexes.command()
@_JSON
@click.pass_obj
def history(config: "DatabaseConfig", *, as_json: bool) -> None:
    """Print what was done to the indexes of every shard, the latest first."""
    changes = _with_database(config, lambda db, _: db.indexes.history())
    if as_json:
        click.echo(json.dumps([asdict(each) for each in changes], indent=2))
    else:
        _print_changes(changes)


def _with_database(config: "DatabaseConfig", work: Callable[..., Awaitable[Any]]) -> Any:
    from headrace.database import Database

    async def run(tell: Callable[[str], None]) -> Any:
        async with Database(config) as database:
            return await work(database, tell)

    with _progress() as tell:
        return asyncio.run(run(tell))


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Says on stderr what is being done, in one line that changes; nothing where nobody watches."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda words: None
        return
    with console.status("connecting") as status:
        yield lambda words: status.update(words)


def _workload(path: Path | None) -> "Workload | None":
    from headrace.database import Query, Workload
    from headrace.database.indexes.workload import Sample, statements

    if path is None:
        return None
    texts = statements(path.read_text(encoding="utf-8"))
    if not texts:
        raise CallerError(f"{path} holds no statement.", fix="Write SQL statements into it, each ended by `;`.")
    return Workload(tuple(Query(text, samples=(Sample(text),)) for text in texts), str(path))


async def _advised(
    database: "Database", budget: int | None, workload_path: Path | None, tell: Callable[[str], None]
) -> "list[IndexAdvice]":
    workload = await asyncio.to_thread(_workload, workload_path)
    return await database.indexes.advise(workload, budget_bytes=budget, progress=tell)


async def _applied(
    database: "Database",
    names: Sequence[str],
    budget: int | None,
    workload_path: Path | None,
    *,
    dry_run: bool,
    tell: Callable[[str], None],
) -> "Sequence[IndexAdvice | IndexChange]":
    workload = await asyncio.to_thread(_workload, workload_path)
    advice = await database.indexes.advise(workload, budget_bytes=budget, progress=tell)
    wanted = [each for each in advice if each.verdict != "reject" and (not names or each.name in names)]
    unknown = set(names) - {each.name for each in wanted}
    if unknown:
        raise CallerError(
            f"Nothing is advised for {', '.join(sorted(unknown))}.", fix="`headrace indexes advise` prints the names."
        )
    return wanted if dry_run else await database.indexes.apply(wanted, workload, progress=tell)


def _was_undone(found: "IndexAdvice | IndexChange") -> bool:
    return getattr(found, "state", "") == "dropped" and found.sql.startswith("CREATE")


def _print_advice(advice: "Sequence[IndexAdvice]") -> None:
    from headrace.cli.display import console, plain, show_rows

    if not advice:
        click.echo("Nothing is advised.")
        return
    rows = [
        (each.verdict.value, each.name, each.sql.partition(" ON ")[2], _mib(each.size_bytes), _gain(each), each.reason)
        for each in advice
    ]
    show_rows(("advice", "index", "on", "MiB", "saves", "because"), rows, title="Indexes")
    for line in dict.fromkeys(line for each in advice if each.verdict == "create" for line in each.evidence):
        console.print(plain(f"- {line}"))


def _gain(advice: "IndexAdvice") -> str:
    if advice.gain is not None:
        return f"{advice.gain:.1%}"
    return "unavailable" if advice.verdict == "create" else ""


def _print_changes(changes: "Sequence[IndexChange]") -> None:
    from headrace.cli.display import at, show_rows

    if not changes:
        click.echo("Nothing was done.")
        return
    columns = ("shard", "index", "state", "MiB", "ms before", "ms after", "begun", "because")
    rows = [
        (
            each.shard,
            each.name,
            each.state.value,
            _mib(each.size_bytes),
            each.before_ms,
            each.after_ms,
            at(each.begun_at or None),
            each.reason,
        )
        for each in changes
    ]
    show_rows(columns, rows, title="Changes of indexes")


def _mib(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else size_bytes / 2**20
