"""Agents as the host would load and run them, and what holds for all their reports."""

import asyncio
import json
import types
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[3] / "examples"


class Context:
    """What the host lends to an execution; the deadline shrinks by `step_s` whenever it is asked for."""

    def __init__(self, remaining_s: float | None = None, step_s: float = 0.0) -> None:
        self.agent_id, self.version, self.execution_id = "agent", "1.0.0", "execution-1"
        self.reports: list[tuple[int, int, str]] = []
        self._remaining_s = remaining_s
        self._step_s = step_s

    def remaining_s(self) -> float | None:
        if self._remaining_s is not None:
            self._remaining_s -= self._step_s
        return self._remaining_s

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.reports.append((done, total, note))


def load_agent(name: str) -> types.ModuleType:
    """The module of an agent, made from its source in a namespace of its own, as the host makes it."""
    path = EXAMPLES / "agents" / f"{name}.py"
    module = types.ModuleType(f"deployed_{name}")
    exec(compile(path.read_text(encoding="utf-8"), f"<agent {name}>", "exec", dont_inherit=True), module.__dict__)
    return module


def check_report(report: dict[str, Any]) -> None:
    """The contract of the three agents: whatever the input was, the report can be stored, sent and shown."""
    text = json.dumps(report, allow_nan=False, ensure_ascii=False)
    assert text.encode("utf-8")
    assert all(character.isprintable() for character in text)
    assert isinstance(report["title"], str)
    for label, value in report["summary"]:
        assert isinstance(label, str)
        assert isinstance(value, str | int | float)
    for table in report["tables"]:
        assert isinstance(table["title"], str)
        assert table["rows"]
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}


async def report_or_error(module: types.ModuleType, input: dict[str, Any]) -> dict[str, Any] | str:
    """The report, or the message of the ValueError with which the agent refuses its input."""
    try:
        report: dict[str, Any] = await module.Agent().execute(input, Context())
    except ValueError as error:
        return str(error)
    return report


async def turns_during(work: Awaitable[Any]) -> tuple[Any, int]:
    """What `work` returns, and how often another task had its turn meanwhile."""
    turns = 0
    is_done = False

    async def run() -> Any:
        nonlocal is_done
        try:
            return await work
        finally:
            is_done = True

    async def count() -> None:
        nonlocal turns
        while not is_done:
            turns += 1
            await asyncio.sleep(0)

    result, _ = await asyncio.gather(run(), count())
    return result, turns
