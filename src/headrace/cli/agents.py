"""`headrace agents`: deploy, run and look at agents of a running service."""

import base64
import hashlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from headrace.cli.client import Client
from headrace.errors import CallerError

_AGENTS = "/api/v1/agents"
_POLL_S = 0.1
_FINISHED = {"completed", "failed", "timeout", "cancelled", "interrupted"}

_console = Console()


@click.group()
@click.option("--url", envvar="HEADRACE_URL", default="http://127.0.0.1:8000", show_default=True, show_envvar=True)
@click.option("--token", envvar="HEADRACE_SERVER_TOKEN", show_envvar=True, help="The token that the service wants.")
@click.pass_context
def agents(context: click.Context, *, url: str, token: str | None) -> None:
    """Deploy, run and look at agents of a running service."""
    context.obj = Client(url, token=token)


@agents.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--id", "agent_id", help="The agent's id.  [default: the file's name]")
@click.option("--version", help="A semantic version.  [default: 1.0.0, or one patch above when the source changed]")
@click.option("--entrypoint", default="Agent", show_default=True, help="The class or async function to execute.")
@click.pass_obj
def deploy(client: Client, *, file: Path, agent_id: str | None, version: str | None, entrypoint: str) -> None:
    """Put a Python FILE into service as an agent."""
    source = file.read_bytes()
    agent_id = agent_id or file.stem
    deployed = client.post(
        f"{_AGENTS}/deploy",
        {
            "agent_metadata": {"agent_id": agent_id, "version": version or _next_version(client, agent_id, source)},
            "agent_code": {"source_code": base64.b64encode(source).decode(), "entrypoint": entrypoint},
        },
    )
    _console.print(
        f"[green]deployed[/] {deployed['agent_id']} {deployed['version']} in {deployed['compile_ms']:.1f} ms"
    )


@agents.command()
@click.argument("agent_id")
@click.option("--input", "text", metavar="JSON", help="The whole input.")
@click.option("--file", "files", multiple=True, metavar="KEY=PATH", help="Text of a file as a key of the input.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A JSON value as a key of the input.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print the execution as JSON.")
@click.pass_obj
def run(
    client: Client,
    *,
    agent_id: str,
    text: str | None,
    files: tuple[str, ...],
    settings: tuple[str, ...],
    timeout: float | None,
    as_json: bool,
) -> None:
    """Execute an agent, watch its progress and print what it found."""
    request: dict[str, Any] = {"input": _input(text, files, settings), "async": True}
    if timeout is not None:
        request["timeout"] = timeout
    execution = _watched(client, client.post(f"{_AGENTS}/{agent_id}/execute", request))
    if as_json:
        click.echo(json.dumps(execution, indent=2))
    else:
        _show(execution)
    if execution["status"] != "completed":
        sys.exit(1)


@agents.command(name="list")
@click.pass_obj
def list_agents(client: Client) -> None:
    """List the agents in service."""
    page = client.get(f"{_AGENTS}?limit=200")
    table = Table("agent", "version", "completed", "failed", "timeout", title=f"{page['total']} agents")
    for column in table.columns[2:]:
        column.justify = "right"
    for agent in page["agents"]:
        totals = agent["executions"]
        table.add_row(
            agent["agent_id"], agent["version"], *(str(totals[name]) for name in ("completed", "failed", "timeout"))
        )
    _console.print(table)


@agents.command()
@click.argument("agent_id")
@click.pass_obj
def status(client: Client, *, agent_id: str) -> None:
    """Show the version in service and its totals."""
    _show_pairs(client.get(f"{_AGENTS}/{agent_id}/status"))


def _next_version(client: Client, agent_id: str, source: bytes) -> str:
    try:
        agent = client.get(f"{_AGENTS}/{agent_id}")
    except CallerError:
        return "1.0.0"
    if agent["source_sha256"] == hashlib.sha256(source).hexdigest():
        return str(agent["version"])
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", agent["version"])
    if match is None:
        raise CallerError(f"{agent['version']!r} is no semantic version.", fix="Name the new one with --version.")
    return f"{match[1]}.{match[2]}.{int(match[3]) + 1}"


def _input(text: str | None, files: tuple[str, ...], settings: tuple[str, ...]) -> Any:
    if text is not None and not (files or settings):
        return _json(text, "--input")
    found = _json(text, "--input") if text is not None else {}
    if not isinstance(found, dict):
        raise CallerError(
            f"--input is {json.dumps(found)[:40]}, which has no keys for --file and --set.",
            fix="Write an object, --input '{...}', or leave --file and --set out.",
        )
    for option, pairs in (("--file", files), ("--set", settings)):
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals or not key:
                raise CallerError(f"{option} {pair!r} has no key.", fix=f"Write {option} key=value.")
            found[key] = _text_of(value) if option == "--file" else _json(value, f"--set {key}")
    return found


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise CallerError(f"{path} cannot be read: {error.strerror}.", fix="Correct the path.") from error
    except UnicodeDecodeError as error:
        raise CallerError(f"{path} is no UTF-8 text: {error.reason}.", fix="Convert it to UTF-8 first.") from error


def _json(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CallerError(f"{option} is no JSON: {error}.", fix="Quote strings: --set name='\"value\"'.") from error


def _watched(client: Client, execution: dict[str, Any]) -> dict[str, Any]:
    """Poll an execution to its end, drawing its progress on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(execution["agent_id"], total=None, note=execution["status"])
        while execution["status"] not in _FINISHED:
            time.sleep(_POLL_S)  # noqa: TID251 - a command line waits in its own time
            execution = client.get(execution["status_url"])
            reported = execution["progress"]
            if reported:
                progress.update(task, total=reported["total"], completed=reported["done"], note=reported["note"])
    return execution


def _show(execution: dict[str, Any]) -> None:
    colour = "green" if execution["status"] == "completed" else "red"
    output = execution["output"]
    if _is_report(output):
        _console.rule(_plain(output["title"]), align="left")
        _show_pairs(dict(output.get("summary", [])))
        for table in output.get("tables", []):
            _show_table(table)
    elif output is not None:
        _console.print_json(json.dumps(output))
    if execution["error"]:
        _console.print(execution["error"], style="red", markup=False)
    _console.print(
        f"[{colour}]{execution['status']}[/] in {execution['run_ms']:.1f} ms"
        f" ({execution['cpu_ms']:.1f} ms CPU) · {execution['agent_id']} {execution['version']}"
        f" · {execution['execution_id']}"
    )


def _is_report(output: Any) -> bool:
    """Whether an agent's output has the shape of a report: a title, a summary in pairs, tables with even rows.

    Anything else is as good an output, and printed as the JSON that it is.
    """
    if not isinstance(output, dict) or "title" not in output:
        return False
    summary, tables = output.get("summary", []), output.get("tables", [])
    has_pairs = isinstance(summary, dict) or (
        isinstance(summary, list)
        and all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in summary)
    )
    return has_pairs and isinstance(tables, list) and all(map(_is_table, tables))


def _is_table(contents: Any) -> bool:
    if not isinstance(contents, dict):
        return False
    columns, rows = contents.get("columns", []), contents.get("rows", [])
    return (
        isinstance(columns, list)
        and isinstance(rows, list)
        and all(isinstance(row, list) and len(row) == len(columns) for row in rows)
    )


def _show_table(contents: dict[str, Any]) -> None:
    table = Table(title=_plain(contents.get("title", "")), title_justify="left")
    rows = contents.get("rows", [])
    for index, name in enumerate(contents.get("columns", [])):
        is_number = all(isinstance(row[index], int | float) for row in rows if row[index] is not None)
        table.add_column(_plain(name), justify="right" if rows and is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_plain("" if cell is None else cell) for cell in row))
    _console.print(table)


def _show_pairs(pairs: dict[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in pairs.items():
        table.add_row(_plain(name), _plain(value))
    _console.print(table)


def _plain(value: Any) -> Text:
    """A value as it is read; never as markup, which an agent's output must not be able to write."""
    if isinstance(value, float):
        return Text(f"{value:,.2f}")
    if isinstance(value, int) and not isinstance(value, bool):
        return Text(f"{value:,}")
    return Text(str(value))
