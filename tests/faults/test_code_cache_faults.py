"""Processes that race, die, stop or find the disk full: code is compiled once, and what is read was written whole."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.agents import CodeCache
from headrace.events import CodeStoreRecovered, CodeStoreUnavailable

SECRET = "s" * 32
SOURCE = "def agent():\n    return [\n" + "".join(f"        {n} + x{n},\n" for n in range(3_000)) + "    ]\n"

# Says that it is there, waits for the word, compiles, and says what that took.
RACER = """
import json, sys
from dataclasses import asdict
from headrace.agents import CodeCache

cache = CodeCache(sys.argv[1], lock_wait_s=30.0)
print("ready", flush=True)
source = json.loads(sys.stdin.readline())
compiled = cache.compile("a", source)
cache.close(60)
print(json.dumps({**asdict(cache.statistics()), "key": compiled.key}), flush=True)
"""

# Kills itself with the n-th call of one of the system's functions while it writes a record: before, after or halfway.
SUICIDE = """
import os, signal, sys
from headrace.agents import CodeCache
from headrace.agents.code import store as code_store

directory, name, when = sys.argv[1:4]
cache = CodeCache(directory, signing_key="s" * 32)
real = getattr(os, name)

def deadly(*arguments, **options):
    if when == "halfway":
        descriptor, data = arguments
        real(descriptor, bytes(data)[: len(data) // 2])
    if when == "after":
        real(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)

def place(*arguments):
    setattr(os, name, deadly)
    return real_place(*arguments)

real_place, code_store._place = code_store._place, place
cache.compile("a", sys.stdin.read())
cache.flush(60)
print("survived", flush=True)
"""

# Compiles and writes one source after the other until it is killed, and tells of each that is on disk.
WRITER = """
import sys
from headrace.agents import CodeCache

cache = CodeCache(sys.argv[1], signing_key="s" * 32)
number = int(sys.argv[2])
while True:
    cache.compile("a", f"x = {number}\\n" * 200)
    cache.flush(60)
    print(number, flush=True)
    number += 1
"""

# Takes the lock of a record, says so, and keeps it.
HOLDER = """
import sys, signal
from headrace.agents import CodeCache

cache = CodeCache(sys.argv[1], signing_key="s" * 32)
lock = cache._store.lock(cache._request("a", sys.stdin.readline(), None).slot)
print("held", flush=True)
signal.pause()
"""

LIMITED = """
import resource, sys
from headrace.agents import CodeCache

class Events:
    def on(self, event):
        print(type(event).__name__, event.operation, event.reason)

resource.setrlimit(resource.RLIMIT_FSIZE, (2_048, 2_048))
cache = CodeCache(sys.argv[1], signing_key="s" * 32, observer=Events())
source = sys.stdin.read()
first = cache.compile("a", source)
cache.flush(60)
assert cache.compile("b", source) is first
print(cache.statistics().unwritten)
"""


class Events(list):
    """An observer that remembers."""

    def on(self, event):
        self.append(event)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "code"


@pytest.fixture
def start(directory: Path) -> Iterator:
    """Processes that are there no more when the test ends."""
    with contextlib.ExitStack() as stack:

        def start(script: str, *arguments: object) -> subprocess.Popen:
            command = [sys.executable, "-c", script, str(directory), *map(str, arguments)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def cache_on(directory: Path, **options: object) -> CodeCache:
    return CodeCache(directory, **({"signing_key": SECRET} | options))


def files(directory: Path) -> list[str]:
    """What is in it besides the lock file."""
    return sorted(path.name for path in directory.iterdir() if path.name != ".lock")


def test_processes_that_race_compile_once(start, directory):
    """Four begin at once on an empty directory, without even a key: one compiles, the others read what it wrote."""
    racers = [start(RACER) for _ in range(4)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write(json.dumps(SOURCE) + "\n")
        racer.stdin.flush()

    told = [json.loads(racer.stdout.readline()) for racer in racers]

    assert sum(each["compiles"] for each in told) == 1
    assert sum(each["disk_hits"] for each in told) == 3
    assert sum(each["written"] for each in told) == 1
    assert sum(each["rejected"] for each in told) == 0
    assert len({each["key"] for each in told}) == 1
    assert len(files(directory)) == 1


@pytest.mark.parametrize(
    ("name", "when", "is_there"),
    [
        ("write", "before", False),
        ("write", "halfway", False),
        ("write", "after", False),
        ("fsync", "before", False),
        ("fsync", "after", False),
        ("replace", "before", False),
        ("replace", "after", True),
    ],
)
def test_a_process_killed_while_it_writes_leaves_all_or_nothing(start, directory, name, when, is_there):
    """The next one reads clean: a miss or the record, never a part; what was left behind is cleared in time."""
    process = start(SUICIDE, name, when)
    out, _ = process.communicate(SOURCE)
    assert (process.returncode, out) == (-signal.SIGKILL, "")
    left = [path for path in directory.iterdir() if path.name.endswith(".new")]
    assert len(left) == (0 if is_there else 1)

    cache = cache_on(directory)
    found = cache.get("a", SOURCE)
    assert (found is not None) == is_there
    for path in directory.iterdir():
        os.utime(path, (1.0, 1.0))
    cache.compile("a", SOURCE)
    cache.compile("b", "x = 1")
    cache.close(60)

    assert cache.statistics().rejected == 0
    assert [file for file in files(directory) if not file.endswith(".code")] == []
    assert cache_on(directory).get("a", SOURCE) is not None


def test_processes_killed_anywhere_lose_nothing_that_was_written(start, directory):
    """Killed at any moment: what was told to be on disk is there, and nothing there is broken."""
    told = []
    for round_ in range(5):
        writer = start(WRITER, round_ * 1_000)
        for _ in range(3 + round_):
            told.append(int(writer.stdout.readline()))
        writer.send_signal(signal.SIGKILL)
        writer.wait()

    cache = cache_on(directory)

    assert all(cache.get("a", f"x = {number}\n" * 200) for number in told)
    assert cache.statistics().rejected == 0


def test_a_dead_holder_frees_its_lock(start, directory):
    """The kernel takes it back; who waited goes on, with the lock."""
    holder = start(HOLDER)
    holder.stdin.write("x = 1\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    cache = cache_on(directory, lock_wait_s=30.0)

    cache.compile("a", "x = 1\n")
    cache.close(60)

    assert cache.statistics().written == 1


def test_a_stopped_holder_does_not_hold_others_up_for_ever(start, directory):
    """After `lock_wait_s` the source is compiled here, too, and not written: that is the holder's right."""
    holder = start(HOLDER)
    holder.stdin.write("x = 1\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGSTOP)
    cache = cache_on(directory, lock_wait_s=0.05)

    cache.compile("a", "x = 1\n")
    cache.close(60)

    assert cache.statistics().compiles == 1
    assert cache.statistics().written == 0


def mounted(directory: Path, options: str) -> bool:
    """Whether a tmpfs could be mounted there: it takes root, and a container that lets it."""
    command = ["mount", "-t", "tmpfs", "-o", options, "headrace-test", str(directory)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


def unwritable(directory: Path) -> str | None:
    """Make a directory that nothing can be written to; how it is to be undone."""
    if mounted(directory, "ro,mode=0700"):
        return "mount"
    if os.geteuid() != 0:
        directory.chmod(0o500)
        return "mode"
    return None


def test_a_read_only_directory_is_memory_only(directory):
    """Agents run, somebody is told once, and reading is not what failed."""
    directory.mkdir(mode=0o700)
    undo = unwritable(directory)
    events = Events()
    place = directory if undo else Path("/sys/headrace-code")  # not even root makes directories there
    try:
        cache = cache_on(place, observer=events)
        for number in range(3):
            assert cache.compile("a", f"x = {number}") is cache.compile("b", f"x = {number}")
        cache.close(60)
    finally:
        if undo == "mount":
            subprocess.run(["umount", str(directory)], check=True)
        elif undo == "mode":
            directory.chmod(0o700)

    assert cache.statistics().compiles == 3
    assert {type(event) for event in events} == {CodeStoreUnavailable}
    assert "write" in {event.operation for event in events}
    assert len(events) == len({event.operation for event in events})


def test_a_directory_that_cannot_hold_a_key_is_memory_only(tmp_path):
    """Without a key nothing is signed, and what is not signed is not written."""
    (tmp_path / "code.key").mkdir()
    events = Events()
    cache = CodeCache(tmp_path / "code", observer=events)

    cache.compile("a", "x = 1")
    cache.close(60)

    assert files(tmp_path / "code") == []
    assert [event.operation for event in events] == ["write"]


def test_a_full_disk_is_memory_only_until_there_is_room(directory):
    """Nothing half written is left; when there is room again, that is told, too."""
    directory.mkdir()
    if not mounted(directory, "size=64k,mode=0700"):
        pytest.skip("mounting a tmpfs is forbidden here; the file-size limit below stands in for it")
    try:
        ballast = directory / "ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4_096)):
                continue
        events = Events()
        cache = cache_on(directory, observer=events)

        first = cache.compile("a", SOURCE)
        cache.flush(60)
        assert cache.compile("b", SOURCE) is first
        assert files(directory) == ["ballast"]
        ballast.unlink()
        cache.compile("a", "x = 2")
        cache.close(60)

        assert [type(event) for event in events] == [CodeStoreUnavailable, CodeStoreRecovered]
        assert "No space left" in events[0].reason
        assert cache_on(directory).get("a", "x = 2") is not None
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_a_file_size_limit_is_memory_only(start, directory):
    """The same where a process limit is what is full."""
    out, _ = start(LIMITED).communicate(SOURCE)

    assert out.splitlines() == ["CodeStoreUnavailable write [Errno 27] File too large", "1"]
    assert files(directory) == []
