"""Processes that are killed while they count, fold or claim: no finished addition is lost, none counts twice."""

import contextlib
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.monitor.counters import Counters
from headrace.monitor.slots import SLOT_BYTES_MIN, Series

SLOTS = 4

# Tells the number of finished additions after each of them, so that whoever kills it knows what must not be lost.
WRITER = """
import os, struct, sys
from pathlib import Path
from headrace.monitor.counters import Counters

counters = Counters.open(Path(sys.argv[1]), slots=4, slot_bytes=65_536)
hits, wait, depth = counters.counter("hits_total"), counters.histogram("wait_seconds"), counters.gauge("depth")
depth.set(1.0)
done = 0
while True:
    hits.add()
    wait.record(0.15)
    done += 1
    os.write(1, struct.pack("<Q", done))
"""

# Stops itself dead before the n-th time that it stores into the file's header or into a slot on its way.
FOLDER = """
import os, signal, sys
from pathlib import Path
from headrace.monitor import slot_file, slots
from headrace.monitor.counters import Counters

counters = Counters.open(Path(sys.argv[1]), slots=4, slot_bytes=65_536)
room, name, when = sys.argv[2], sys.argv[3], sys.argv[4]
owner = getattr(slots, room, None) or getattr(slot_file, room)
step = getattr(owner, name)

def deadly(*arguments, **options):
    if when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    step(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, name, deadly)
counters.fold()
counters.counter("mine_total").add()
print("survived", flush=True)
"""


def fill(file: Path) -> None:
    """Write zeros until the disk takes no more."""
    with file.open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while ballast.write(bytes(4_096)):
            continue


def counters_at(path: Path) -> Counters:
    return Counters.open(path, slots=SLOTS, slot_bytes=SLOT_BYTES_MIN)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "counters"


@pytest.fixture
def reader(path: Path):
    counters = counters_at(path)
    yield counters
    counters.close()


def test_killed_writers_leave_every_finished_addition(path, reader):
    """Eight writers are killed wherever they are: readings hold all that was finished, and none goes back."""
    hits, wait = Series("hits_total"), Series("wait_seconds")
    finished, seen = 0, [0]
    for round_ in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        told = b""
        while len(told) < 8 * (60 + 61 * round_):
            told += writer.stdout.read1(65_536)
            seen.append(reader.fold().counters.get(hits, 0))
        writer.send_signal(signal.SIGKILL)
        told += writer.stdout.read()
        writer.stdout.close()
        writer.wait()
        (done,) = struct.unpack("<Q", told[len(told) // 8 * 8 - 8 : len(told) // 8 * 8])

        folded = reader.fold()
        seen.append(folded.counters[hits])
        finished += done
        # Each writer may have been killed between an addition and the word that it was finished.
        assert finished <= folded.counters[hits] <= finished + round_ + 1
        assert finished <= folded.histograms[wait].count <= folded.counters[hits]
        assert folded.slots == ()

    assert seen == sorted(seen)
    assert reader.fold().retired == 8


STEPS = [
    ("Slot", "reset", "before"),
    ("Slot", "reset", "after"),
    ("Slot", "store", "before"),
    ("Slot", "store", "after"),
    ("SlotFile", "_copy_folded", "before"),
    ("SlotFile", "_copy_folded", "after"),
    ("SlotFile", "_retire", "after"),
    ("SlotFile", "_own", "before"),
    ("SlotFile", "_own", "after"),
    ("SlotFile", "_claim", "after"),
]


@pytest.mark.parametrize(("room", "name", "when"), STEPS)
def test_killed_on_the_way_to_retiring_or_claiming(path, reader, room, name, when):
    """Whoever dies at any step of folding the dead or claiming a slot leaves totals that are exact, and no lock."""
    for _ in range(2):
        dead = counters_at(path)
        dead.counter("hits_total").add(21)
        dead.histogram("wait_seconds").record(0.5)
        assert dead.settle()
        dead.close()
    if name in {"_own", "_claim"}:
        reader.fold()

    killed = subprocess.run(
        [sys.executable, "-c", FOLDER, str(path), room, name, when], capture_output=True, timeout=100, check=False
    )

    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for _ in range(2):
        folded = reader.fold()
        assert folded.counters[Series("hits_total")] == 42
        assert folded.histograms[Series("wait_seconds")].count == 2
    assert folded.slots == ()
    latecomers = [counters_at(path) for _ in range(SLOTS)]
    for latecomer in latecomers:
        latecomer.counter("hits_total").add(2)
        assert latecomer.settle()
    assert reader.fold().counters[Series("hits_total")] == 42 + 2 * SLOTS
    for latecomer in latecomers:
        latecomer.close()


def test_a_stopped_lock_holder_does_not_stop_counting(path, reader):
    """A process that is frozen with the lock in its hands delays neither writers nor readers for long."""
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys\n"
            "lock = open(sys.argv[1], 'w')\n"
            "fcntl.flock(lock, fcntl.LOCK_EX)\n"
            "print('held', flush=True)\n"
            "sys.stdin.read()\n",
            str(path.with_name("counters.lock")),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    os.kill(holder.pid, signal.SIGSTOP)

    reader.counter("hits_total").add(3)

    assert reader.fold().counters == {Series("hits_total"): 3}
    assert not reader.settle()
    holder.kill()
    holder.communicate()
    assert reader.settle()
    assert reader.fold().counters == {Series("hits_total"): 3}


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 1 MB."""
    directory = tmp_path / "small"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "headrace-test", str(directory)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a file system of its own takes root, and a container that lets it mount one")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_on_a_full_disk_counting_goes_on_in_private(small_disk):
    """A slot that the disk cannot hold is not claimed: a store into it would be the end of the process."""
    counters = Counters.open(small_disk / "counters", slots=4, slot_bytes=2_097_152)
    counters.counter("hits_total").add(4)

    assert not counters.settle()
    assert counters.fold().counters == {Series("hits_total"): 4}
    counters.close()


def test_room_for_a_slot_but_not_for_the_retired_totals(small_disk):
    """When the dead cannot be folded for want of space, their counts are still in every reading."""
    ballast = small_disk / "ballast"
    dead, reader = (Counters.open(small_disk / "counters", slots=4, slot_bytes=262_144) for _ in range(2))
    dead.counter("hits_total").add(4)
    assert dead.settle()
    dead.close()
    fill(ballast)

    assert reader.fold().counters == reader.fold().counters == {Series("hits_total"): 4}

    ballast.unlink()
    assert reader.fold().counters == {Series("hits_total"): 4}
    assert reader.fold().retired == 1
    reader.close()
