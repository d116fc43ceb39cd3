"""The log file of one embedded server: appended to by the server, read for error messages, bounded at every start."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.embedded.directory import usable

_BYTES_MAX = 8 * 1024 * 1024
_TAIL_BYTES = 64 * 1024


class ServerLog:
    """What a server writes to stdout and stderr. One earlier file is kept, and a start moves on from 8 MiB."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._from = 0

    @contextmanager
    def writing(self) -> Iterator[int]:
        """A descriptor for a server that starts now; `tail` quotes nothing older than this moment."""
        with usable(self.path.parent):
            if self.path.exists() and self.path.stat().st_size > _BYTES_MAX:
                self.path.replace(self.path.with_name(f"{self.path.name}.1"))
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._from = os.fstat(file).st_size
            yield file
        finally:
            os.close(file)

    def tail(self, lines: int) -> str:
        """The last `lines` lines of the present run, without the closing newline; empty when there is no log."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._from, size - _TAIL_BYTES))
                text = file.read(_TAIL_BYTES).decode("utf-8", "replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:]) if lines > 0 else ""
