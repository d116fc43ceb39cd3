"""The directories that embedded servers live in: made, locked, reachable, private, and short enough for a socket."""

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from headrace.embedded.failure import FREE_SPACE, WRITABLE
from headrace.errors import DirectoryInUse, DirectoryUnusable

SOCKET_PATH_BYTES_MAX = 103
"""`sun_path` holds 108 bytes on Linux and 104 on macOS, the closing NUL included."""

_FIXES = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EROFS: WRITABLE,
    errno.EACCES: WRITABLE,
    errno.EPERM: WRITABLE,
}


class Owner(NamedTuple):
    """Whom a file belongs to."""

    uid: int
    gid: int


@contextmanager
def usable(directory: Path) -> Iterator[None]:
    """Turn an OSError of the body into a DirectoryUnusable that names `directory` and what is wrong with it."""
    try:
        yield
    except OSError as error:
        where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
        raise DirectoryUnusable(
            f"{directory} cannot hold embedded servers: {error.strerror or error}{where}.",
            fix=_FIXES.get(error.errno or 0),
        ) from error


def make_directory(directory: Path) -> None:
    """Make `directory` and what is missing above it; what exists keeps its owner and mode.

    Others get no access. Only root lets them pass through (not list): its Postgres may have to run as another account,
    and what lies below is closed again.
    """
    mode = 0o711 if os.geteuid() == 0 else 0o700
    with usable(directory):
        for level in reversed((directory, *directory.parents)):
            if level.exists():
                continue
            try:
                level.mkdir(mode=mode)
            except FileExistsError:
                continue  # a sibling made it at the same moment
            level.chmod(mode)  # mkdir's mode is cut by the umask
        if not directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))


def make_private(directory: Path, owner: Owner) -> None:
    """Make `directory` for one user alone, or check that it is so; never widens or takes over a stranger's."""
    with usable(directory):
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            pass
        else:
            os.chown(directory, *owner)
        found, above = directory.lstat(), directory.parent.stat()
        only_we_could_make_it = above.st_uid == os.geteuid() and not above.st_mode & 0o022
        if found.st_uid != owner.uid and only_we_could_make_it:  # by a run under another identity
            os.chown(directory, *owner, follow_symlinks=False)
            found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner.uid or found.st_mode & 0o077:
        raise DirectoryUnusable(
            f"{directory} must be a directory of uid {owner.uid} that nobody else can enter, but it has mode "
            f"{stat.filemode(found.st_mode)} and belongs to uid {found.st_uid}.",
            fix=f"Remove {directory}, or choose another directory with `--directory`.",
        )


def first_unreachable(path: Path, *, uid: int, gids: Iterable[int]) -> Path | None:
    """The first directory on the way to `path`, itself included, that an ordinary user `uid` may not pass."""
    groups = frozenset(gids)
    for level in reversed((path, *path.parents)):
        if not level.is_dir():
            continue
        found = level.stat()
        if found.st_uid == uid:
            needed = stat.S_IXUSR
        elif found.st_gid in groups:
            needed = stat.S_IXGRP
        else:
            needed = stat.S_IXOTH
        if not found.st_mode & needed:
            return level
    return None


def give(tree: Path, owner: Owner) -> None:
    """Let everything in `tree` belong to `owner`. The top changes last, so that a killed run is taken up again."""
    with usable(tree):
        if tree.lstat().st_uid == owner.uid:
            return
        for folder, folders, files in os.walk(tree, topdown=False):
            for name in (*files, *folders):
                os.chown(Path(folder, name), *owner, follow_symlinks=False)
        os.chown(tree, *owner, follow_symlinks=False)


def write_file(path: Path, text: str, owner: Owner) -> None:
    """Replace `path` by a private file with `text`, whole or not at all, and on disk."""
    partial = path.with_name(f"{path.name}.partial")
    with usable(path.parent):
        partial.unlink(missing_ok=True)
        partial.touch(mode=0o600, exist_ok=False)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chown(partial, *owner)
        partial.replace(path)
        _sync_names(path.parent)


def rename_durably(source: Path, target: Path) -> None:
    """Rename, and return only when the new name would survive a power cut."""
    with usable(target.parent):
        source.rename(target)
        _sync_names(target.parent)


def _sync_names(directory: Path) -> None:
    """A renamed file is on disk only when the folder that holds its name is."""
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def socket_directory(directory: Path, socket_name: str) -> Path:
    """Where the Unix socket of the server in `directory` goes: `directory/run`, if clients can name that.

    They cannot when it does not fit into `sun_path`, or holds a comma, which separates hosts for libpq. Then it is a
    folder of the temp directory whose name is a digest of `directory` and our uid: every run, and every process that
    only wants to connect, finds the same one without asking. `make_private` refuses a squatter's.
    """
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:12]
    short = f"headrace-{os.geteuid()}-{digest}"
    for candidate in (directory / "run", Path(tempfile.gettempdir(), short)):
        path = os.fsencode(candidate / socket_name)
        if len(path) <= SOCKET_PATH_BYTES_MAX and b"," not in path:
            return candidate
    return Path("/tmp", short)  # noqa: S108 - make_private checks whose it is; TMPDIR would not do either


def remove_sockets(sockets: Path, directory: Path) -> None:
    """Remove a stopped server's socket directory if it lies outside `directory`, where nobody would look for it."""
    if not sockets.is_relative_to(directory):
        shutil.rmtree(sockets, ignore_errors=True)  # what stays is private, empty of use, and found again by its name


class DirectoryLock:
    """Keeps a data directory for one process: a second one gets DirectoryInUse with the pid of the first.

    The kernel drops the lock when its holder ends, however it ends, so there is never a stale one. (A child that was
    forked without exec shares it: then the directory stays in use until that child has ended too.)
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / "headrace.lock"
        self._file: int | None = None

    def __enter__(self) -> Self:
        make_directory(self._directory)
        with usable(self._directory):
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._take(file)
        except BaseException:
            os.close(file)
            raise
        self._file = file
        return self

    def _take(self, file: int) -> None:
        with usable(self._directory):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(file, 32, 0).decode("ascii", "replace").strip()
                raise DirectoryInUse(
                    f"{self._directory} is in use by another headrace, pid {holder or 'unknown as yet'}.",
                    fix=f"Stop it (`kill {holder}`), or choose another directory." if holder else None,
                ) from None
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode("ascii"), 0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            # The file stays: removing it would let a third process lock a new one beside a second that waits for this.
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None
