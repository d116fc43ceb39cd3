"""Directories that are read-only, full or limited: the error names them, quotes the server and says what to do."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.embedded import DirectoryLock, EmbeddedPostgres, EmbeddedRedis, started
from headrace.errors import DirectoryUnusable
from tests.running import wait_until

PREPARE = """
import resource, sys
from pathlib import Path
from headrace.embedded import EmbeddedPostgres
from headrace.errors import DirectoryUnusable

resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * 1024, 1024 * 1024))
try:
    EmbeddedPostgres(Path(sys.argv[1]), name="shard-0").prepare()
except DirectoryUnusable as error:
    print(error)
"""


def mounted(directory: Path, options: str) -> bool:
    """Whether a tmpfs could be mounted there: it takes root, and a container that lets it."""
    command = ["mount", "-t", "tmpfs", "-o", options, "headrace-test", str(directory)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


def fill(file: Path) -> None:
    """Write zeros until the disk takes no more and raises."""
    with file.open("wb", buffering=0) as ballast:
        while ballast.write(b"\0" * 65536):
            continue


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory in which nothing can be made."""
    directory = tmp_path / "read-only"
    directory.mkdir()
    if mounted(directory, "ro"):
        yield directory
        subprocess.run(["umount", str(directory)], check=True)
    elif os.geteuid() == 0:
        yield Path("/sys")  # not even root makes directories there
    else:
        directory.chmod(0o500)
        yield directory
        directory.chmod(0o700)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB, where a fresh cluster takes 46."""
    directory = tmp_path / "small"
    directory.mkdir()
    if not mounted(directory, "size=16m,mode=0711"):
        pytest.skip("mounting a tmpfs is forbidden here; the file-size limit below stands in for it")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_a_read_only_directory_is_refused_by_name(read_only: Path) -> None:
    """Lock, Redis and Postgres say the same: which directory, what is wrong, what to do."""
    for attempt in (
        DirectoryLock(read_only / "data").__enter__,
        EmbeddedRedis(read_only / "redis").prepare,
        EmbeddedPostgres(read_only / "shard-0", name="shard-0").prepare,
    ):
        with pytest.raises(DirectoryUnusable, match=str(read_only)) as caught:
            attempt()
        assert "writable" in caught.value.fix
        assert "--directory" in caught.value.fix


def test_a_disk_too_small_for_a_shard_is_said_in_postgres_words(small_disk: Path) -> None:
    """The message of initdb surfaces, its remains are removed, and the next try succeeds once there is room."""
    shard = EmbeddedPostgres(small_disk / "shard-0", name="shard-0")
    with pytest.raises(DirectoryUnusable, match="No space left on device") as caught:
        shard.prepare()
    assert "Free some space" in caught.value.fix
    # Its socket is elsewhere where the path is too long for one.
    assert {path.name for path in shard.directory.iterdir()} <= {"run"}
    subprocess.run(["mount", "-o", "remount,size=128m", str(small_disk)], check=True)
    with started(shard):
        wait_until(shard.is_ready)


def test_a_disk_that_is_full_at_the_next_start_is_said_so(small_disk: Path) -> None:
    """A shard and a Redis that once ran refuse to start on a full disk, and start again when it is not."""
    subprocess.run(["mount", "-o", "remount,size=128m", str(small_disk)], check=True)
    servers = [EmbeddedPostgres(small_disk / "shard-0", name="shard-0"), EmbeddedRedis(small_disk / "redis")]
    for server in servers:
        with started(server):
            pass
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"):
        fill(ballast)
    for server in servers:
        with pytest.raises(DirectoryUnusable, match="No space left on device") as caught, started(server):
            pytest.fail("it started on a full disk")
        assert "Free some space" in caught.value.fix
    ballast.unlink()
    for server in servers:
        with started(server):
            wait_until(server.is_ready)


def test_a_file_size_limit_is_said_in_postgres_words(tmp_path: Path) -> None:
    """A process limit looks like a full disk to Postgres: its message surfaces, with the fix for this case."""
    outcome = subprocess.run(
        [sys.executable, "-c", PREPARE, tmp_path / "shard-0"], capture_output=True, text=True, check=True
    )
    assert "File too large" in outcome.stdout
    assert "ulimit -f" in outcome.stdout
    assert not (tmp_path / "shard-0" / "data").exists()
    assert not (tmp_path / "shard-0" / "data.partial").exists()
