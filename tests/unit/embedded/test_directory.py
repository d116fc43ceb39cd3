import errno
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from headrace.embedded.directory import (
    SOCKET_PATH_BYTES_MAX,
    DirectoryLock,
    Owner,
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
from headrace.errors import DirectoryInUse, DirectoryUnusable

ME = Owner(os.geteuid(), os.getegid())
STRANGER = Owner(12345, 12345)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "Free some space"), (errno.EROFS, "writable"), (errno.EACCES, "writable")],
)
def test_an_os_error_becomes_a_directory_unusable_with_the_path_and_a_fix(number: int, words: str) -> None:
    """What the system says about a directory reaches the user with the directory's name and what to do."""
    with pytest.raises(DirectoryUnusable) as caught, usable(Path("/data/headrace")):
        raise OSError(number, os.strerror(number), "/data/headrace/file")
    assert "/data/headrace cannot hold" in caught.value.message
    assert os.strerror(number) in caught.value.message
    assert "/data/headrace/file" in caught.value.message
    assert words in caught.value.fix


def test_made_directories_are_closed_to_others_and_existing_ones_keep_their_mode(tmp_path: Path) -> None:
    """Directories that are made cannot be listed or written by others; one that exists is left as it is."""
    existing = tmp_path / "mine"
    existing.mkdir(mode=0o755)
    existing.chmod(0o755)
    make_directory(existing / "a" / "b")
    assert mode(existing) == 0o755
    assert mode(existing / "a") & 0o066 == 0
    assert mode(existing / "a" / "b") & 0o066 == 0


def test_a_file_in_the_way_of_a_directory_is_refused(tmp_path: Path) -> None:
    """A path that leads to or through a file is a DirectoryUnusable, not a raw OSError."""
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DirectoryUnusable, match="Not a directory"):
        make_directory(file)
    with pytest.raises(DirectoryUnusable, match="Not a directory"):
        make_directory(file / "below")


def test_a_private_directory_is_made_once_and_found_again(tmp_path: Path) -> None:
    """A private directory has mode 0700, and making it again changes nothing."""
    private = tmp_path / "run"
    make_private(private, ME)
    (private / "kept").write_text("")
    make_private(private, ME)
    assert mode(private) == 0o700
    assert (private / "kept").exists()


def test_a_directory_that_others_can_enter_is_not_taken_for_private(tmp_path: Path) -> None:
    """A socket never goes into a directory that is open to others."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o755)
    with pytest.raises(DirectoryUnusable, match="drwxr-xr-x"):
        make_private(tmp_path / "run", ME)


def test_a_symlink_is_not_taken_for_a_private_directory(tmp_path: Path) -> None:
    """A link that somebody put in place of the directory is refused, wherever it leads."""
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DirectoryUnusable, match="lrwx"):
        make_private(tmp_path / "run", ME)


@as_root
def test_a_directory_that_only_we_could_make_is_taken_back(tmp_path: Path) -> None:
    """What an earlier run gave to the account that it used is ours again when the identity changes."""
    given = tmp_path / "run"
    make_private(given, STRANGER)
    assert given.stat().st_uid == STRANGER.uid
    make_private(given, ME)
    assert given.stat().st_uid == ME.uid


@as_root
def test_a_strangers_directory_is_not_taken_over(tmp_path: Path) -> None:
    """Where everybody may write, a directory that another user made under the expected name is left to them."""
    tmp_path.chmod(0o1777)
    squatted = tmp_path / "run"
    squatted.mkdir(mode=0o700)
    os.chown(squatted, *STRANGER)
    with pytest.raises(DirectoryUnusable, match="belongs to uid 12345"):
        make_private(squatted, ME)
    assert squatted.stat().st_uid == STRANGER.uid


@as_root
def test_own_files_are_given_to_the_account_that_the_server_runs_as(tmp_path: Path) -> None:
    """A whole tree changes hands, links by themselves and not by what they point to."""
    outside = tmp_path / "outside"
    outside.write_text("")
    tree = tmp_path / "data"
    (tree / "base").mkdir(parents=True)
    (tree / "base" / "1").write_text("")
    (tree / "link").symlink_to(outside)
    give(tree, STRANGER)
    assert {path.lstat().st_uid for path in (tree, tree / "base", tree / "base" / "1", tree / "link")} == {12345}
    assert outside.stat().st_uid == ME.uid


def test_the_first_directory_that_a_user_cannot_pass_is_named(tmp_path: Path) -> None:
    """The way to a path is judged as the kernel judges an ordinary user: as owner, else as group, else as other."""
    closed = tmp_path / "closed"
    (closed / "data").mkdir(parents=True)
    closed.chmod(0o710)
    reach = tmp_path.stat().st_gid
    blocked_above = first_unreachable(tmp_path, uid=54321, gids=[])
    assert first_unreachable(closed / "data" / "not-yet", uid=ME.uid, gids=[]) is None
    assert first_unreachable(closed / "data", uid=54321, gids=[]) == (blocked_above or closed)
    if blocked_above is None:
        assert first_unreachable(closed / "data", uid=54321, gids=[reach]) is None


def test_a_file_is_replaced_whole_and_private(tmp_path: Path) -> None:
    """A written file is complete, readable by its owner alone, and leaves no second file behind."""
    path = tmp_path / "redis.conf"
    path.write_text("old")
    write_file(path, "new", ME)
    assert path.read_text() == "new"
    assert mode(path) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_rename_moves_the_tree(tmp_path: Path) -> None:
    """The finished directory appears under its name, the unfinished name is gone."""
    (tmp_path / "data.partial").mkdir()
    (tmp_path / "data.partial" / "PG_VERSION").write_text("16")
    rename_durably(tmp_path / "data.partial", tmp_path / "data")
    assert (tmp_path / "data" / "PG_VERSION").read_text() == "16"
    assert not (tmp_path / "data.partial").exists()


def test_a_socket_lies_in_the_servers_own_directory_when_it_fits() -> None:
    """A short directory holds its own socket."""
    assert socket_directory(Path("/srv/headrace/redis"), "redis.sock") == Path("/srv/headrace/redis/run")


def test_a_socket_of_a_long_directory_lies_in_a_short_one_that_everybody_finds_again() -> None:
    """A directory too long for sun_path gets a short one: the same for each process, another for each directory."""
    deep = Path("/", *["directory"] * 12)
    found = socket_directory(deep, "redis.sock")
    command = (
        "import sys; from pathlib import Path; from headrace.embedded.directory import socket_directory;"
        "print(socket_directory(Path(sys.argv[1]), 'redis.sock'))"
    )
    elsewhere = subprocess.run([sys.executable, "-c", command, deep], capture_output=True, text=True, check=True)
    assert found.parent == Path(tempfile.gettempdir())
    assert elsewhere.stdout.strip() == str(found)
    assert socket_directory(deep / "other", "redis.sock") != found


def test_a_socket_never_lies_below_a_comma() -> None:
    """A comma separates hosts for libpq, so clients could not name such a socket."""
    assert socket_directory(Path("/srv/a,b"), "redis.sock").parent == Path(tempfile.gettempdir())


@pytest.mark.parametrize("length", range(80, 120))
def test_a_socket_path_always_fits(length: int) -> None:
    """Around the limit there is no length of directory whose socket path would be cut."""
    directory = Path("/" + "d" * (length - 1))
    assert len(os.fsencode(socket_directory(directory, ".s.PGSQL.5432") / ".s.PGSQL.5432")) <= SOCKET_PATH_BYTES_MAX


def test_a_temp_directory_that_is_too_long_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long TMPDIR (macOS, test runners) does not bring the limit back."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("t" * 100)))
    assert socket_directory(Path("/" + "d" * 150), "redis.sock").parent == Path("/tmp")


def test_only_a_socket_directory_outside_is_removed_after_the_stop(tmp_path: Path) -> None:
    """The short directory goes away with its server; the server's own stays."""
    inside, outside = tmp_path / "shard-0" / "run", tmp_path / "headrace-0-abc"
    inside.mkdir(parents=True)
    outside.mkdir()
    (outside / "redis.sock").write_text("")
    remove_sockets(inside, tmp_path / "shard-0")
    remove_sockets(outside, tmp_path / "shard-0")
    assert inside.exists()
    assert not outside.exists()


def test_a_locked_directory_refuses_a_second_lock_and_names_the_holder(tmp_path: Path) -> None:
    """Who comes second learns who is first and where."""
    with DirectoryLock(tmp_path / "data"), pytest.raises(DirectoryInUse) as caught, DirectoryLock(tmp_path / "data"):
        pytest.fail("two locks on one directory")
    assert str(os.getpid()) in caught.value.message
    assert str(tmp_path / "data") in caught.value.message
    assert f"kill {os.getpid()}" in caught.value.fix


def test_a_released_lock_can_be_taken_again(tmp_path: Path) -> None:
    """Leaving the block gives the directory back and forgets the pid."""
    lock = DirectoryLock(tmp_path)
    with lock:
        assert (tmp_path / "headrace.lock").read_text() == f"{os.getpid()}\n"
    with lock, pytest.raises(DirectoryInUse), DirectoryLock(tmp_path):
        pytest.fail("two locks on one directory")
    assert (tmp_path / "headrace.lock").read_text() == ""
