import os
from pathlib import Path

from headrace.embedded.log import ServerLog


def write(log: ServerLog, text: str) -> None:
    with log.writing() as file:
        os.write(file, text.encode())


def test_the_tail_is_the_last_lines(tmp_path: Path) -> None:
    """The tail holds as many lines as asked for, the newest last."""
    log = ServerLog(tmp_path / "log")
    write(log, "one\ntwo\nthree\n")
    assert log.tail(2) == "two\nthree"
    assert log.tail(0) == ""
    assert log.tail(9) == "one\ntwo\nthree"


def test_the_tail_holds_nothing_of_an_earlier_run(tmp_path: Path) -> None:
    """Yesterday's full disk is not quoted as the reason of today's failure, though the file still has it."""
    log = ServerLog(tmp_path / "log")
    write(log, "No space left on device\n")
    write(log, "ready\n")
    assert log.tail(9) == "ready"
    assert (tmp_path / "log").read_text() == "No space left on device\nready\n"


def test_a_server_that_never_ran_has_no_tail(tmp_path: Path) -> None:
    """Asking before the first start is not an error."""
    assert ServerLog(tmp_path / "log").tail(5) == ""


def test_bytes_that_are_no_text_do_not_hide_the_rest(tmp_path: Path) -> None:
    """A log is shown even when a line of it is not UTF-8."""
    log = ServerLog(tmp_path / "log")
    with log.writing() as file:
        os.write(file, b"\xff\xfe\nready\n")
    assert log.tail(1) == "ready"


def test_a_large_log_is_set_aside_at_the_next_start(tmp_path: Path) -> None:
    """A log of more than 8 MiB moves to `.1`, of which there is one, so that restarts cannot fill the disk."""
    log = ServerLog(tmp_path / "log")
    for run in ("first", "second", "third"):
        write(log, f"{run} {'x' * (8 * 1024 * 1024)}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]
    assert (tmp_path / "log.1").read_text().startswith("second")
    assert (tmp_path / "log").read_text().startswith("third")


def test_only_the_owner_can_read_a_log(tmp_path: Path) -> None:
    """Logs quote statements, so they are private."""
    log = ServerLog(tmp_path / "log")
    write(log, "")
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0
