"""What the commands print: tables and reports on a terminal, JSON for programs."""

import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

console = Console()

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""The characters of Unicode's category Cc but for tab and new line."""

_COLOURS = {
    "completed": "green",
    "deployed": "green",
    "active": "green",
    "queued": "yellow",
    "running": "yellow",
    "cancelling": "yellow",
    "deploying": "yellow",
    "testing": "yellow",
    "superseded": "dim",
}


def show_json(value: Any) -> None:
    """An answer of the API as it is."""
    click.echo(json.dumps(value, indent=2))


def show_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str) -> None:
    """A table; columns whose cells are all numbers stand to the right."""
    show_table({"title": title, "columns": list(columns), "rows": [list(row) for row in rows]})


def show_execution(execution: dict[str, Any]) -> None:
    """An execution: what it found, and what it cost."""
    output = execution["output"]
    if _is_report(output):
        console.rule(plain(output["title"]), align="left")
        show_pairs(dict(output.get("summary", [])))
        for table in output.get("tables", []):
            show_table(table)
    elif output is not None:
        console.print_json(json.dumps(output))
    if execution["error"]:
        console.print(plain(execution["error"]), style="red")
    console.print(
        f"[{colour_of(execution['status'])}]{execution['status']}[/] in {execution['run_ms']:.1f} ms"
        f" ({execution['cpu_ms']:.1f} ms CPU) · {execution['agent_id']} {execution['version']}"
        f" · {execution['execution_id']}"
    )


def show_table(contents: dict[str, Any]) -> None:
    """A table that was sent as title, columns and rows."""
    table = Table(title=plain(contents.get("title", "")), title_justify="left")
    rows = contents.get("rows", [])
    for index, name in enumerate(contents.get("columns", [])):
        is_number = all(isinstance(row[index], int | float) for row in rows if row[index] is not None)
        table.add_column(plain(name), justify="right" if rows and is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(plain("" if cell is None else cell) for cell in row))
    console.print(table)


def show_pairs(pairs: dict[str, Any]) -> None:
    """Names and values, a line each."""
    table = Table.grid(padding=(0, 2))
    for name, value in pairs.items():
        table.add_row(plain(name), plain(value))
    console.print(table)


def colour_of(status: str) -> str:
    """The colour of a status; what nobody wished for is red."""
    return _COLOURS.get(status, "red")


def at(seconds: float | None) -> str:
    """A time since 1970 as it is read."""
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def plain(value: Any) -> Text:
    """A value as it is read; never as markup, which an agent's output must not be able to write."""
    if isinstance(value, float):
        return Text(f"{value:,.2f}")
    if isinstance(value, int) and not isinstance(value, bool):
        return Text(f"{value:,}")
    if isinstance(value, dict | list):
        return Text(json.dumps(value))
    return Text("" if value is None else visible(str(value)))


def visible(text: str) -> str:
    """The text without what a terminal obeys: an agent's words must not write its clipboard or move its cursor."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


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
