"""What commands print of what agents said: their words, and nothing that a terminal obeys."""

import io

import pytest
from rich.console import Console

from headrace.cli import display

ATTACK = "fine\x1b]52;c;AAAA\x07\x1b[2J\x9b1m\r[/nothing][red]"
SHOWN = "fine\N{REPLACEMENT CHARACTER}]52;c;AAAA"


@pytest.fixture
def printed(monkeypatch):
    """What is printed on a terminal that obeys."""
    text = io.StringIO()
    monkeypatch.setattr(display, "console", Console(file=text, force_terminal=True, color_system=None, width=200))
    return text


def test_an_error_of_an_agent_is_printed_and_not_obeyed(printed):
    """Neither as a sequence of control characters nor as markup."""
    execution = {"output": None, "error": ATTACK, "status": "failed", "run_ms": 1.0, "cpu_ms": 1.0}
    display.show_execution({**execution, "agent_id": "a", "version": "1.0.0", "execution_id": "e"})

    assert SHOWN in printed.getvalue()
    assert "[/nothing][red]" in printed.getvalue()
    assert not set(printed.getvalue()) & set("\x1b\x07\x9b\r")


def test_a_report_of_an_agent_is_printed_and_not_obeyed(printed):
    """In its title, its names and its cells."""
    table = {"title": ATTACK, "columns": [ATTACK], "rows": [[ATTACK], [[ATTACK]]]}
    display.show_table(table)
    display.show_pairs({ATTACK: ATTACK})

    assert printed.getvalue().count(SHOWN) >= 5
    assert not set(printed.getvalue()) & set("\x1b\x07\x9b\r")


def test_a_tab_and_a_new_line_are_text():
    """An error may have several lines."""
    assert display.visible("one\n\ttwo \N{THIN SPACE}ü") == "one\n\ttwo \N{THIN SPACE}ü"
