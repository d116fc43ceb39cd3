"""`headrace shards`: where the data lives, where a key lives, where a statement would go."""

import asyncio
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from headrace.errors import CallerError, ConfigError, HeadraceError

if TYPE_CHECKING:
    from headrace.config import Config
    from headrace.database import DatabaseConfig, ShardMap
    from headrace.database.kept_map import KeptMap
    from headrace.database.placement.keys import Key
    from headrace.database.postgres.nodes import Node

_STATE = """
SELECT pg_database_size(current_database()),
       (SELECT coalesce(sum(CASE WHEN c.reltuples >= 0 THEN c.reltuples ELSE s.n_live_tup END), 0)::bigint
        FROM pg_class c JOIN pg_stat_user_tables s ON s.relid = c.oid WHERE s.relname NOT LIKE 'headrace\\_%'),
       (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()),
       current_setting('max_connections')::int"""
_KINDS = {"int": "integer", "bigint": "integer", "varchar": "text", "bytea": "bytes", "bool": "boolean"}


@dataclass(frozen=True, slots=True)
class ShardState:
    """What one shard is and holds."""

    shard: str
    address: str
    up: bool
    slots: int
    """As of the map in force."""
    epoch: int | None
    """Of the map that the shard keeps; None: it keeps none, or was not reached."""
    connections: int | None
    """Of everybody to its database, this look left out."""
    connections_max: int | None
    size_bytes: int | None
    rows_estimate: int | None
    """What Postgres' statistics say of all tables but ours."""
    problem: str | None


@click.group()
@click.option("--config", "config_path", type=click.Path(dir_okay=False, path_type=Path), help="A TOML file.")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Of a service with embedded shards.  [default: .headrace]",
)
@click.pass_context
def shards(context: click.Context, *, config_path: Path | None, directory: Path | None) -> None:
    """Where the data lives, where a key lives, and where a statement would go."""
    from headrace.config import load_config

    config = load_config(config_path, environment=os.environ)
    context.obj = with_embedded(config, directory or config.embedded.directory)


@shards.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.pass_obj
def status(config: "DatabaseConfig", *, as_json: bool) -> None:
    """Print every shard, what it holds and whether it answers; exit with 1 if one does not, or keeps another map."""
    shard_map, states = asyncio.run(_status(config))
    if as_json:
        click.echo(json.dumps({"epoch": shard_map.epoch, "shards": [asdict(each) for each in states]}, indent=2))
    else:
        _print_states(shard_map, states)
    if any(each.problem for each in states):
        sys.exit(1)


@shards.command()
@click.argument("key")
@click.option("--type", "kind", help="int, text, uuid, bytes (hex), date, timestamp, timestamptz, numeric, boolean.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.pass_obj
def locate(config: "DatabaseConfig", *, key: str, kind: str | None, as_json: bool) -> None:
    """Print where KEY lives. A key of digits is taken as int, one like a UUID as uuid, any other as text."""
    shard_map, states = asyncio.run(_status(config))
    value, kind = _key(key, _KINDS.get(kind, kind) if kind else None)
    placement = shard_map.locate(value)
    if as_json:
        found = {**placement._asdict(), "key": key, "type": kind}
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(f"{kind} {key} lives on {placement.shard}, slot {placement.slot}, as of epoch {placement.epoch}")
    if not any(each.epoch == shard_map.epoch for each in states):
        click.echo("No shard that was reached keeps a map: this is what the configuration makes.", err=True)


@shards.command()
@click.argument("sql")
@click.argument("params", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.pass_obj
def explain(config: "DatabaseConfig", *, sql: str, params: tuple[str, ...], as_json: bool) -> None:
    """Print where SQL would go with PARAMS for $1, $2 ... (JSON where they look like it), without running it."""
    plan = asyncio.run(_explain(config, sql, tuple(map(_param, params))))
    if as_json:
        click.echo(json.dumps(plan, indent=2))
        return
    for name, value in plan.items():
        click.echo(f"{name + ':':9} {', '.join(value) if isinstance(value, list) else value}")


def with_embedded(config: "Config", directory: Path) -> "DatabaseConfig":
    """The configured shards, or those that `headrace up` starts in the directory."""
    from headrace.database import ShardConfig
    from headrace.embedded import EmbeddedPostgres

    if config.database.shards:
        return config.database
    folders = [directory / f"shard-{index}" for index in range(config.embedded.shards)]
    if not folders or not all(folder.is_dir() for folder in folders):
        raise ConfigError(
            f"There are no shards: database.shards names none, and {directory} holds none.",
            fix="Pass --config with [[database.shards]], or --directory of a service that `headrace up` has started.",
        )
    embedded = [EmbeddedPostgres(folder, name=folder.name) for folder in folders]
    return replace(config.database, shards=tuple(ShardConfig(name=each.name, dsn=each.url) for each in embedded))


async def _status(config: "DatabaseConfig") -> "tuple[ShardMap, list[ShardState]]":
    """The map in force, and every shard: asked one by one, for opening the Database would make new shards keep it."""
    from headrace.database import Database
    from headrace.database.kept_map import agreed_map

    database = Database(config)
    nodes = list(database.nodes.values())
    answers = await asyncio.gather(*(_asked(node, database.shard_map) for node in nodes))
    kept = [answer.kept for answer in answers if answer.kept is not None]
    shard_map = agreed_map(kept, kept[0].shard_map) if kept else database.shard_map
    return shard_map, [_state(node, shard_map, answer) for node, answer in zip(nodes, answers, strict=True)]


@dataclass(slots=True)
class _Answer:
    """What a shard said."""

    row: tuple[int, int, int, int] | None = None
    kept: "KeptMap | None" = None
    problem: str | None = None


async def _asked(node: "Node", plan: "ShardMap") -> _Answer:
    from headrace.database.kept_map import KeptMap, check_map, read_map

    answer = _Answer()
    try:
        await node.open()
        size, rows, connections, connections_max = (await node.fetch(_STATE, read_only=True))[0]
        answer.row = size, rows, connections, connections_max
        answer.kept = await read_map(node)
        if answer.kept is not None:
            check_map(answer.kept, KeptMap(node.name, plan))
    except HeadraceError as error:
        answer.problem = error.message
    finally:
        await node.close()
    return answer


def _state(node: "Node", shard_map: "ShardMap", answer: _Answer) -> ShardState:
    size, rows, connections, connections_max = answer.row or (None, None, None, None)
    return ShardState(
        shard=node.name,
        address=node.address,
        up=answer.row is not None,
        slots=shard_map.shards.count(node.name),
        epoch=answer.kept.shard_map.epoch if answer.kept is not None else None,
        connections=connections,
        connections_max=connections_max,
        size_bytes=size,
        rows_estimate=rows,
        problem=answer.problem,
    )


def _print_states(shard_map: "ShardMap", states: list[ShardState]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = f"Shard map of epoch {shard_map.epoch}: {shard_map.described()}"
    table = Table("shard", "address", "up", title=title, title_justify="left")
    for name in ("slots", "epoch", "connections", "size", "rows, about"):
        table.add_column(name, justify="right")
    for each in states:
        of = f"{each.connections} of {each.connections_max}" if each.up else "-"
        size = f"{each.size_bytes / 2**20:,.1f} MiB" if each.size_bytes is not None else "-"
        rows = f"{each.rows_estimate:,}" if each.rows_estimate is not None else "-"
        epoch = str(each.epoch) if each.epoch is not None else "none"
        up = Text("up", style="green") if each.up else Text("down", style="red")
        table.add_row(each.shard, Text(each.address), up, str(each.slots), epoch, of, size, rows)
    console = Console()
    console.print(table)
    for each in states:
        if each.problem:
            console.print(Text(f"{each.shard}: {each.problem}", style="red"))


def _key(text: str, kind: str | None) -> "tuple[Key, str]":
    """A key as its column holds it, and its kind: the one that is given, else the one that it looks like."""
    from headrace.database.placement.keys import read

    if kind is not None:
        return read(kind, text), kind
    for guess in ("integer", "uuid"):
        try:
            return read(guess, text), guess
        except CallerError:
            continue
    return text, "text"


def _param(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


async def _explain(config: "DatabaseConfig", sql: str, params: tuple[Any, ...]) -> dict[str, Any]:
    from headrace.database import Database

    _, states = await _status(config)
    if all(each.epoch is None for each in states):
        raise CallerError(
            "No shard that was reached keeps a shard map, and explaining shall not be what makes it keep one.",
            fix="Start the service once, or open the Database, before statements are explained.",
        )
    async with Database(config) as database:
        plan = await database.explain(sql, *params)
    # The plans that go to one shard name it; the others have `shards`, or for rows to insert a dict by shard.
    targets = [plan.shard] if hasattr(plan, "shard") else sorted(getattr(plan, "shards", getattr(plan, "rows", ())))
    found = {"plan": type(plan).__name__, "shards": targets}
    reason = getattr(plan, "reason", None) or getattr(getattr(plan, "gathering", None), "reason", None)
    return found | ({"reason": reason} if reason else {}) | ({"fix": plan.fix} if hasattr(plan, "fix") else {})
