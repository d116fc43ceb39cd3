"""`headrace doctor`: what is in force, and what this machine can do."""

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

if TYPE_CHECKING:
    from headrace.config import CacheConfig, Config
    from headrace.database import DatabaseConfig, ShardMap
    from headrace.database.postgres.nodes import Node

_EXTENSIONS = ("hypopg", "pg_stat_statements")
_CAPABILITIES = """
SELECT current_setting('server_version'),
       coalesce(array_agg(name) FILTER (WHERE name = ANY('{hypopg,pg_stat_statements}')), '{}'),
       current_setting('wal_level'), current_setting('max_slot_wal_keep_size')
FROM pg_available_extensions"""

State = Literal["ok", "fallback", "missing"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    detail: str
    """What was found; for a fallback, what is used instead."""


@click.command()
@click.option("--config", "config_path", type=click.Path(dir_okay=False, path_type=Path), help="A TOML file.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def doctor(*, config_path: Path | None, as_json: bool) -> None:
    """Print the configuration in force and what this machine can do; exit with 1 if something needed is missing."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from headrace.config import leaves, load_config

    config = load_config(config_path, environment=os.environ)
    findings = [*_interpreter(), *_libraries(), *_servers(config.embedded.postgres), *_kernel(), *_isolation()]
    findings += asyncio.run(_reachable(config))
    settings = [(name, str(value)) for name, value in leaves(config)]
    if as_json:
        found = {"findings": [asdict(each) for each in findings], "settings": dict(settings)}
        click.echo(json.dumps(found, indent=2))
    else:
        console = Console()
        marks = {"ok": ("ok", "green"), "fallback": ("fallback", "yellow"), "missing": ("missing", "red")}
        table = Table("", "what", "found", title="This machine", title_justify="left")
        for finding in findings:
            mark, colour = marks[finding.state]
            table.add_row(Text(mark, style=colour), finding.name, Text(finding.detail))
        console.print(table)
        table = Table("setting", "value", title="In force", title_justify="left")
        for name, value in settings:
            table.add_row(name, Text(value))
        console.print(table)
    if any(finding.state == "missing" for finding in findings):
        sys.exit(1)


def _interpreter() -> Iterator[Finding]:
    from headrace.build import is_compiled

    implementation = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()}"
    yield Finding("Python", "ok", implementation)
    yield (
        Finding("hot modules", "ok", "compiled by mypyc")
        if is_compiled()
        else Finding("hot modules", "fallback", "plain Python: no C compiler when it was installed")
    )


def _libraries() -> Iterator[Finding]:
    for name, instead in (
        ("uvloop", "asyncio's own loop"),
        ("httptools", "h11"),
        ("hiredis", "redis-py's own parser"),
        ("psycopg-binary", "the libpq of the system"),
        ("sqlglotc", "sqlglot in plain Python"),
    ):
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "fallback", f"{instead} is used")
    has_stdlib_zstd = importlib.util.find_spec("compression") is not None
    has_zstd = has_stdlib_zstd or importlib.util.find_spec("backports.zstd") is not None
    yield Finding("zstd", "ok" if has_zstd else "missing", "cached values are compressed with it")


def _servers(postgres_major: int) -> Iterator[Finding]:
    from headrace.embedded.binaries import find_postgres, find_redis
    from headrace.errors import EmbeddedServerFailed

    try:
        redis = find_redis()
        yield Finding("embedded Redis", "ok", f"{redis.version_text} at {redis.path}")
    except EmbeddedServerFailed as error:
        yield Finding("embedded Redis", "missing", str(error))
    try:
        postgres = find_postgres(None, major=postgres_major)
        yield Finding("embedded Postgres", "ok", f"{postgres.version_text} at {postgres.path}")
    except EmbeddedServerFailed as error:
        yield Finding("embedded Postgres", "missing", str(error))


def _kernel() -> Iterator[Finding]:
    import psutil

    from headrace.embedded.identity import candidates
    from headrace.server.supervisor import cpus

    yield Finding("CPUs", "ok", f"{cpus()} may be used")
    yield Finding("memory", "ok", f"{psutil.virtual_memory().total / 2**30:.1f} GiB in the machine")
    yield Finding("embedded Postgres runs as", "ok", " or else ".join(map(str, candidates())))
    is_tied = sys.platform == "linux"
    yield Finding(
        "orphans",
        "ok" if is_tied else "fallback",
        "the kernel ends the children of a killed `up`" if is_tied else "the next `up` ends what a killed one left",
    )


def _isolation() -> Iterator[Finding]:
    from headrace.agents.isolation import probe

    found = probe()
    if found.level == "process":
        yield Finding("isolation of agents", "ok", f"process: every part works; Landlock ABI {found.landlock_abi}")
    else:
        lacking = "; ".join(map(str, found.missing))
        yield Finding("isolation of agents", "fallback", f"trusted only; `process` is refused, it lacks {lacking}")


async def _reachable(config: "Config") -> list[Finding]:
    """Ask the servers that the configuration names."""
    found = []
    if config.cache.remote is None:
        found.append(Finding("shared cache", "ok", "none configured: `headrace up` starts one"))
    else:
        found.append(await _redis(config.cache))
    if not config.database.shards:
        found.append(Finding("shards", "ok", "none configured: `headrace up` starts them"))
    else:
        found += await _shards(config.database)
    return found


async def _redis(config: "CacheConfig") -> Finding:
    from headrace.cache import Cache

    async with Cache(memory=None, remote=config.remote, namespace=config.namespace) as cache:
        await cache.get("headrace-doctor")
        is_up = cache.statistics().remote_available
    address = config.remote.address if config.remote else ""
    return Finding("shared cache", "ok" if is_up else "missing", f"{address} {'answers' if is_up else 'is away'}")


async def _shards(config: "DatabaseConfig") -> list[Finding]:
    from headrace.database import Database

    # The nodes are asked one by one, without opening the Database: that would make a new shard keep the map.
    database = Database(config)
    names = [shard.name for shard in config.shards]
    return list(await asyncio.gather(*(_shard(node, database.shard_map, names) for node in database.nodes.values())))


async def _shard(node: "Node", shard_map: "ShardMap", names: list[str]) -> Finding:
    from headrace.database.kept_map import KeptMap, check_fits, check_map, read_map
    from headrace.errors import HeadraceError

    try:
        await node.open()
        rows = await node.fetch(_CAPABILITIES, read_only=True)
        kept = await read_map(node)
        if kept is not None:
            check_map(kept, KeptMap(node.name, shard_map))
            if kept.shard_map.epoch > shard_map.epoch:
                check_fits(kept.shard_map, shard_map, names)
    except HeadraceError as error:
        return Finding(node.name, "missing", f"{error.message} ({node.address})")
    finally:
        await node.close()
    version, extensions, wal_level, keep = rows[0]
    lacking = sorted(set(_EXTENSIONS) - set(extensions))
    detail = f"Postgres {version}" + (f", without {', '.join(lacking)}" if lacking else "")
    if wal_level != "logical":
        detail += f"; query cache invalidation: own writes and TTL only (wal_level is {wal_level}, not logical)"
    elif keep == "-1":
        detail += "; query cache: max_slot_wal_keep_size is not set, a stuck change stream could fill the disk"
    return Finding(node.name, "fallback" if lacking or wal_level != "logical" else "ok", detail)
