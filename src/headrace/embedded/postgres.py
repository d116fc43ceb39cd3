"""A Postgres of one's own, as a shard or the replica of one: on a private Unix socket, durable, made in one piece."""

import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

import psutil

from headrace.embedded import parameters, replica
from headrace.embedded.binaries import INSTALL, Program, find_postgres
from headrace.embedded.directory import (
    first_unreachable,
    give,
    make_directory,
    make_private,
    remove_sockets,
    rename_durably,
    socket_directory,
    usable,
    write_file,
)
from headrace.embedded.identity import Identity, candidates
from headrace.embedded.log import ServerLog
from headrace.embedded.process import TOOL_TIMEOUT_S, Ladder, attempt, end_leftovers, run, spawn, stop
from headrace.errors import DirectoryUnusable, EmbeddedServerFailed, HeadraceError

DATABASE = "headrace"
USER = "headrace"

_PORT = 5432
_SOCKET = f".s.PGSQL.{_PORT}"
_PROGRAMS = frozenset({"postgres", "initdb", "pg_basebackup"})
_STOP_TIMEOUT_S = 10.0
_LEFTOVER_TIMEOUT_S = 3.0  # what a killed run left behind must not hold up the next; nothing acknowledged is lost
_QUIT_PATIENCE_S = 6.0  # an immediate shutdown kills its own children after 5
_KILL_PATIENCE_S = 5.0
_READY_TIMEOUT_S = 2
_PRIMARY_TIMEOUT_S = 30  # one that is not there refuses at once; one that is busy has to be asked all the same
_BACKUP_TIMEOUT_S = 3600.0
_INITDB_OPTIONS = (
    f"--username={USER}",
    "--auth-local=trust",  # the socket is in a directory that only its owner can enter
    "--auth-host=reject",
    "--encoding=UTF8",
    # Sorting by code point never changes under an index; the sort orders of a libc do.
    "--lc-collate=C",
    "--lc-ctype=C.UTF-8" if sys.platform == "linux" else "--lc-ctype=C",
    "--data-checksums",
    "--no-instructions",
)


class EmbeddedPostgres:
    """One Postgres in `directory`, with an empty database `headrace` that belongs to its superuser `headrace`.

    The programs are those in the folder `binaries`, else of the `major` asked for (see `find_postgres`). `settings`
    are configuration parameters over `parameters.DEFAULTS`. With `replica_of` it is a hot standby that streams from
    that server, which must run when the standby is prepared for the first time; it takes the same `settings`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        name: str,
        binaries: Path | None = None,
        major: int = 16,
        settings: Mapping[str, parameters.Value] = MappingProxyType({}),
        replica_of: "EmbeddedPostgres | None" = None,
    ) -> None:
        self.name = name
        self.directory = directory.resolve()
        self._binaries = binaries
        self._major = major
        self._wanted = dict(settings)
        self._replica_of = replica_of
        self._data = self.directory / "data"
        self._partial = self.directory / "data.partial"
        self._sockets = socket_directory(self.directory, _SOCKET)
        self._log = ServerLog(self.directory / "postgres.log")

    @property
    def url(self) -> str:
        """A libpq connection string for the database `headrace`."""
        return f"postgresql:///{DATABASE}?host={quote(str(self._sockets), safe='')}&port={_PORT}&user={USER}"

    @cached_property
    def program(self) -> Program:
        """The server program and its version."""
        return find_postgres(self._binaries, major=self._major)

    @cached_property
    def identity(self) -> Identity:
        """Who the server runs as: the first of `candidates` that can run the program and reach the directory."""
        refusals = []
        for candidate in candidates():
            blocked = first_unreachable(self.program.path, uid=candidate.owner.uid, gids=candidate.groups)
            if blocked is not None and candidate.mode != "own":
                refusals.append(f"{candidate} cannot pass {blocked} to the program")
                continue
            outcome = attempt([self.program.path, "--version"], identity=candidate)
            if outcome.returncode == 0:
                return candidate
            refusals.append(outcome.stdout.strip())
        raise EmbeddedServerFailed(
            "Postgres runs neither as root nor as a uid without an account, and "
            f"{self.program.path} cannot be run as anyone else here: {'; '.join(refusals) or 'there is no account'}.",
            fix=f"Start headrace as an ordinary user, or install it where other accounts can reach it. {INSTALL}.",
        )

    def prepare(self) -> None:
        """See `Server.prepare`."""
        text = parameters.text(self._wanted, self._door())
        self._check_reachable()
        make_directory(self.directory)
        end_leftovers(self.directory, _PROGRAMS, self._ladder(_LEFTOVER_TIMEOUT_S))
        owner = self.identity.owner
        make_private(self._sockets, owner)
        with usable(self.directory):
            if self._partial.exists():  # an initdb or a base backup that did not finish
                shutil.rmtree(self._partial)
        if self._holds_data():
            give(self._data, owner)
        self._build()
        write_file(self._data / parameters.FILE, text, owner)
        self._remove_misleading_locks()

    def spawn(self) -> subprocess.Popen[bytes]:
        """See `Server.spawn`."""
        return spawn(
            [self.program.path, "-D", self._data],
            directory=self._data,
            log=self._log,
            # A fast shutdown writes a checkpoint: unlogged tables and statistics survive, and no recovery is needed.
            death_signal=signal.SIGINT,
            identity=self.identity,
        )

    def is_ready(self) -> bool:
        """Whether it accepts a connection to `headrace` and answers SELECT 1."""
        return self._answers(_READY_TIMEOUT_S)

    def _answers(self, timeout_s: float) -> bool:
        from psycopg import Error, pq  # loaded by the first who asks: only a process that supervises does

        # Nothing that blocks: libpq would do so with the interpreter's lock in its hands, and a server that is stopped
        # right here must hold up neither who watches it nor anybody else.
        wire = pq.PGconn.connect_start(self.url.encode())
        try:
            step = pq.PollingStatus.WRITING
            while step in (pq.PollingStatus.READING, pq.PollingStatus.WRITING):  # ends: each is a step of the welcome
                if not _is_due(wire.socket, timeout_s, writing=step == pq.PollingStatus.WRITING):
                    return False
                step = pq.PollingStatus(wire.connect_poll())
            wire.send_query(b"SELECT 1")
            while wire.is_busy():  # ends: an answer of one row comes in a packet or two
                if not _is_due(wire.socket, timeout_s):
                    return False
                wire.consume_input()
            answer = wire.get_result()
            return answer is not None and answer.get_value(0, 0) == b"1"
        except Error:  # not connected, or the connection broke
            return False
        finally:
            wire.finish()

    def stop(self, process: subprocess.Popen[bytes], *, timeout_s: float = _STOP_TIMEOUT_S) -> None:
        """A fast shutdown; an immediate one when that takes longer than `timeout_s`; then SIGKILL for all of it."""
        if stop(process, self._ladder(timeout_s)) is signal.SIGKILL:
            end_leftovers(self.directory, _PROGRAMS, [(signal.SIGKILL, _KILL_PATIENCE_S)])
        remove_sockets(self._sockets, self.directory)

    def log_tail(self, lines: int = 20) -> str:
        """See `Server.log_tail`."""
        return self._log.tail(lines)

    @staticmethod
    def _ladder(timeout_s: float) -> Ladder:
        return [
            (signal.SIGINT, timeout_s),
            (signal.SIGQUIT, min(timeout_s, _QUIT_PATIENCE_S)),
            (signal.SIGKILL, _KILL_PATIENCE_S),
        ]

    def _door(self) -> dict[str, parameters.Value]:
        """The settings that nobody else may change: how the server is reached, and whom it follows."""
        door: dict[str, parameters.Value] = {
            "cluster_name": self.name,
            "listen_addresses": "",
            "port": _PORT,
            "unix_socket_directories": '"' + str(self._sockets).replace('"', '""') + '"',
            "unix_socket_permissions": "0700",
        }
        if self._replica_of is not None:
            door |= replica.settings(self._replica_of.url, self.name)
        return door

    def _check_reachable(self) -> None:
        identity = self.identity
        if identity.mode == "own":
            return  # then making the directory has shown it
        blocked = first_unreachable(self.directory, uid=identity.owner.uid, gids=identity.groups)
        if blocked is not None:
            raise DirectoryUnusable(
                f"Postgres runs as {identity} here, which cannot pass {blocked} to {self.directory}.",
                fix=f"Choose a directory outside {blocked} with `--directory`, or start headrace as its owner.",
            )

    def _holds_data(self) -> bool:
        """Whether there is a data directory to go on with; raises when it is not one for this server."""
        with usable(self.directory):
            if not self._data.exists():
                return False
            found = (self._data / "PG_VERSION").read_text().strip() if (self._data / "PG_VERSION").exists() else None
        if found is None:
            raise DirectoryUnusable(f"{self._data} exists, but is no Postgres data directory: PG_VERSION is missing.")
        ours = self.program
        if found != str(ours.version[0]):
            raise DirectoryUnusable(
                f"{self._data} was made by Postgres {found}, and {ours.path} is {ours.version_text}.",
                fix=f"Start it with Postgres {found}, or dump it with that version's pg_dump and load the dump into a "
                "new directory (`--directory`).",
            )
        follows = (self._data / replica.SIGNAL).exists()
        if follows != (self._replica_of is not None):
            is_one, asked = ("replica", "primary") if follows else ("primary", "replica")
            raise DirectoryUnusable(f"{self._data} is a {is_one}'s, but {self.name} is to be a {asked}.")
        return True

    def _build(self) -> None:
        """Make the data directory if there is none that will do."""
        exists = self._data.exists()
        if self._replica_of is None:
            if not exists:
                self._build_with(self._initialise)
            return
        primary_url = self._replica_of.url
        if exists:
            if not self._replica_of._answers(_PRIMARY_TIMEOUT_S) or replica.can_go_on(primary_url, self.name):
                return  # without its primary it answers reads, and catches up when that is back
            with usable(self.directory):
                self._data.rename(self._partial)
                shutil.rmtree(self._partial)
        replica.reserve(primary_url, self.name)
        self._build_with(partial(self._back_up, primary_url))

    def _build_with(self, fill: Callable[[], None]) -> None:
        """Let `fill` make `data.partial`, and give it its name when it is whole and on disk."""
        make_private(self._partial, self.identity.owner)
        try:
            fill()
            rename_durably(self._partial, self._data)
        except HeadraceError:
            shutil.rmtree(self._partial, ignore_errors=True)  # to give back its space; the error is what counts
            raise

    def _initialise(self) -> None:
        create = f"CREATE DATABASE {DATABASE};\n"
        self._run("initdb", "-D", self._partial, *_INITDB_OPTIONS, "--no-sync")
        self._run(
            "postgres", "--single", "-F", "-c", "exit_on_error=on", "-D", self._partial, "template1", stdin=create
        )
        with usable(self.directory), (self._partial / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.write(f"\ninclude '{parameters.FILE}'\n")
        # One sync of everything at the end is cheaper than a durable initdb and then a durable CREATE DATABASE.
        self._run("initdb", "-D", self._partial, "--sync-only")

    def _back_up(self, primary_url: str) -> None:
        source = ("-d", replica.conninfo(primary_url, self.name), "-S", replica.slot(self.name))
        options = ("--wal-method=stream", "--checkpoint=fast", "--no-password")
        self._run("pg_basebackup", "-D", self._partial, *source, *options, timeout_s=_BACKUP_TIMEOUT_S)
        write_file(self._partial / replica.SIGNAL, "", self.identity.owner)

    def _run(self, tool: str, *arguments: str | Path, stdin: str = "", timeout_s: float = TOOL_TIMEOUT_S) -> None:
        command = [self.program.path.with_name(tool), *arguments]
        run(command, identity=self.identity, directory=self.directory, stdin=stdin, timeout_s=timeout_s)

    def _remove_misleading_locks(self) -> None:
        """Remove lock files whose pid belongs to someone else by now: Postgres would believe that it still runs.

        After a reboot that is likely, because pids begin anew: shard-0's old one may be shard-1's. A file whose
        process is gone, or cannot be looked at, is left for Postgres to judge.
        """
        for lock in (self._data / "postmaster.pid", self._sockets / f"{_SOCKET}.lock"):
            with usable(self.directory):
                words = lock.read_text("utf-8", "replace").split() if lock.exists() else []
                if words and words[0].lstrip("-").isdigit() and _lives_elsewhere(abs(int(words[0])), self.directory):
                    lock.unlink()


def _is_due(descriptor: int, timeout_s: float, *, writing: bool = False) -> bool:
    """Whether it can be read from, or written to, within the time."""
    readers, writers = ([], [descriptor]) if writing else ([descriptor], [])
    return any(select.select(readers, writers, [], timeout_s))


def _lives_elsewhere(pid: int, directory: Path) -> bool:
    try:
        process = psutil.Process(pid)
        return process.name() not in _PROGRAMS or not Path(process.cwd()).is_relative_to(directory)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
