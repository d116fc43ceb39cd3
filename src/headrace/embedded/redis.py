"""A Redis or Valkey of one's own, as a cache: on a Unix socket, bounded in memory, on disk only if asked."""

import signal
import socket
import subprocess
from functools import cached_property
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from headrace.embedded.binaries import Program, find_redis
from headrace.embedded.directory import make_directory, make_private, remove_sockets, socket_directory, write_file
from headrace.embedded.identity import OWN
from headrace.embedded.log import ServerLog
from headrace.embedded.process import end_leftovers, spawn, stop
from headrace.errors import DirectoryUnusable

Eviction = Literal["allkeys-lfu", "allkeys-lru", "volatile-lfu", "volatile-lru", "volatile-ttl", "noeviction"]

_SOCKET = "redis.sock"
_PROGRAMS = frozenset({"redis-server", "valkey-server"})
_KILL_PATIENCE_S = 5.0
_STOP_TIMEOUT_S = 10.0
_LEFTOVER_TIMEOUT_S = 3.0  # what a killed run left behind must not hold up the next; nothing acknowledged is lost
_PING_TIMEOUT_S = 1.0
_MULTI_PART_AOF_MAJOR = 7


class EmbeddedRedis:
    """One redis-server or valkey-server in `directory`.

    `maxmemory_bytes` bounds the data; beyond it keys are dropped as `eviction` says. `appendonly` keeps data over a
    restart and loses at most a second of it in a power cut. `port` opens 127.0.0.1 as well, to every user of the
    machine and without a password; the Unix socket is open to this user alone.
    """

    def __init__(
        self,
        directory: Path,
        *,
        name: str = "redis",
        binary: Path | None = None,
        maxmemory_bytes: int = 256 * 1024 * 1024,
        eviction: Eviction = "allkeys-lfu",
        appendonly: bool = False,
        port: int | None = None,
    ) -> None:
        self.name = name
        self.directory = directory.resolve()
        self._binary = binary
        self._maxmemory_bytes = maxmemory_bytes
        self._eviction = eviction
        self._appendonly = appendonly
        self._port = port
        self._data = self.directory / "data"
        self._settings = self.directory / "redis.conf"
        self._sockets = socket_directory(self.directory, _SOCKET)
        self._log = ServerLog(self.directory / "redis.log")

    @property
    def url(self) -> str:
        """For redis-py and every other client that knows `unix://`."""
        return f"unix://{quote(str(self._sockets / _SOCKET))}"

    @cached_property
    def program(self) -> Program:
        """The server program and its version."""
        return find_redis(self._binary)

    def prepare(self) -> None:
        """See `Server.prepare`."""
        owner = OWN.owner
        make_directory(self.directory)
        end_leftovers(self.directory, _PROGRAMS, self._ladder(_LEFTOVER_TIMEOUT_S))
        make_private(self._data, owner)
        make_private(self._sockets, owner)
        self._refuse_older_program()
        write_file(self._settings, self._settings_text(), owner)

    def spawn(self) -> subprocess.Popen[bytes]:
        """See `Server.spawn`."""
        command = [self.program.path, self._settings]
        return spawn(command, directory=self._data, log=self._log, death_signal=signal.SIGTERM)

    def is_ready(self) -> bool:
        """Whether PING is answered by PONG: not while it still loads an append-only file."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(_PING_TIMEOUT_S)
                connection.connect(str(self._sockets / _SOCKET))
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False

    def stop(self, process: subprocess.Popen[bytes], *, timeout_s: float = _STOP_TIMEOUT_S) -> None:
        """See `Server.stop`."""
        stop(process, self._ladder(timeout_s))
        remove_sockets(self._sockets, self.directory)

    def log_tail(self, lines: int = 20) -> str:
        """See `Server.log_tail`."""
        return self._log.tail(lines)

    @staticmethod
    def _ladder(timeout_s: float) -> tuple[tuple[signal.Signals, float], ...]:
        return (signal.SIGTERM, timeout_s), (signal.SIGKILL, _KILL_PATIENCE_S)

    def _refuse_older_program(self) -> None:
        # From 7 on the append-only file is a folder; a 6.2 does not see it and would start empty without a word.
        newer = self._data / "appendonlydir"
        if self._appendonly and newer.exists() and self.program.version[0] < _MULTI_PART_AOF_MAJOR:
            raise DirectoryUnusable(
                f"{newer} was written by Redis 7 or newer, and {self.program.path} is {self.program.version_text}.",
                fix="Put a redis-server 7 or newer on PATH, or choose another directory with `--directory`.",
            )

    def _settings_text(self) -> str:
        door = {"bind": "127.0.0.1"} if self._port else {}
        settings = {
            **door,
            "port": str(self._port or 0),
            "unixsocket": str(self._sockets / _SOCKET),
            "unixsocketperm": "700",
            "dir": str(self._data),
            "daemonize": "no",
            "logfile": "",
            "save": "",
            "appendonly": "yes" if self._appendonly else "no",
            "maxmemory": str(self._maxmemory_bytes),
            "maxmemory-policy": self._eviction,
            # Freeing a large value on the main thread would hold up every other client.
            "lazyfree-lazy-eviction": "yes",
            "lazyfree-lazy-expire": "yes",
            "lazyfree-lazy-server-del": "yes",
            "lazyfree-lazy-user-del": "yes",
        }
        lines = [f"{key} {_quoted(value)}" for key, value in settings.items()]
        return "\n".join(["# Written by headrace at every start.", *lines, ""])


def _quoted(value: str) -> str:
    r"""A value as redis.conf reads it: `"…"` with `\"`, `\\` and `\xHH`."""
    escaped = "".join(f"\\x{ord(c):02x}" if c < " " else f"\\{c}" if c in '"\\' else c for c in value)
    return f'"{escaped}"'
