"""`headrace up`: the whole service with one command."""

import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from headrace.config import ProtocolsConfig
    from headrace.server.supervisor import Supervisor


@click.command()
@click.argument("application", required=False, metavar="[MODULE:APP]")
@click.option("--config", "config_path", type=click.Path(dir_okay=False, path_type=Path), help="A TOML file.")
@click.option("--host", help="Address to bind; anything but loopback needs a token.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to bind; 0 takes a free one.  [default: 8000]")
@click.option("--workers", type=click.IntRange(1, 256), help="Serving processes.  [default: one for each CPU]")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Data of the embedded Redis and Postgres.  [default: .headrace]",
)
def up(
    *,
    application: str | None,
    config_path: Path | None,
    host: str | None,
    port: int | None,
    workers: int | None,
    directory: Path | None,
) -> None:
    """Serve agents, and MODULE:APP if one is named, with everything that they need.

    Starts a Redis and two Postgres shards in --directory for what the configuration does not name, worker processes
    and a controller. Ctrl-C or SIGTERM answers what was accepted and stops them all. SIGTTIN adds a worker, SIGTTOU
    removes one.
    """
    # Imported here, so that `headrace --help` stays fast.
    import uvloop

    from headrace.config import load_config
    from headrace.server import log
    from headrace.server.supervisor import Supervisor, with_overrides

    config = with_overrides(
        load_config(config_path, environment=os.environ), host=host, port=port, workers=workers, directory=directory
    )
    log.configure(config.log, process="supervisor")
    supervisor = Supervisor(config, config_path=config_path, application=application, observer=log.LogObserver())
    reference = "/headrace/docs" if application else "/docs"
    uvloop.run(supervisor.run(partial(_announce, reference=reference, protocols=config.protocols)))
    _say("headrace is down")


def _announce(supervisor: "Supervisor", *, reference: str, protocols: "ProtocolsConfig") -> None:
    url = supervisor.url
    doors = (("A2A", protocols.a2a, "/a2a"), ("MCP", protocols.mcp, "/mcp"), ("AG-UI", protocols.ag_ui, "/ag-ui"))
    _say(
        f"headrace is up: {url}",
        f"  dashboard  {url}/dashboard",
        f"  API        {url}{reference}",
        *(f"  {name:<9}  {url}{path}" for name, is_open, path in doors if is_open),
        f"  data       {supervisor.directory}",
        "  stop       Ctrl-C",
    )


def _say(*lines: str) -> None:
    """Print, if anybody still reads: a terminal that was closed is no reason to stop a service."""
    with suppress(OSError):
        for line in lines:
            click.echo(line)
        sys.stdout.flush()
