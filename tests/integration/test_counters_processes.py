"""Several real processes that count in one file.

Whoever finds the file's lock taken at its first count does not wait for it, but counts in private until it settles. So
every process here settles before it ends or says that it has counted, as a worker does at each tick.
"""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from headrace.monitor.counters import Counters
from headrace.monitor.slots import Series

ADDS = 100_000
FORK_SLOTS = 16  # a parent, four children and four grandchildren may all live at once

COUNT = """
import sys
from pathlib import Path
from headrace.monitor.counters import Counters

counters = Counters.open(Path(sys.argv[1]), slots=8)
hits, wait = counters.counter("hits_total"), counters.histogram("wait_seconds")
own = counters.counter("own_total", worker=sys.argv[2])
sys.stdin.readline()
for _ in range(int(sys.argv[3])):
    hits.add()
    wait.record(0.15)
own.add(int(sys.argv[2]))
while not counters.settle():
    continue
print("counted", flush=True)
sys.stdin.readline()
"""

# Forks with counters that are already in use, as a pre-forking server does, and lets every child count at once.
FORK = """
import os, sys
from pathlib import Path
from headrace.monitor.counters import Counters

def end():
    while not counters.settle():
        continue
    os._exit(0)

counters = Counters.open(Path(sys.argv[1]), slots=int(sys.argv[2]))
hits, depth, wait = counters.counter("hits_total"), counters.gauge("depth"), counters.histogram("wait_seconds")
hits.add(1_000)
depth.set(5.0)
children = []
for number in range(4):
    child = os.fork()
    if child == 0:
        for _ in range(10_000):
            hits.add()
            wait.record(0.3)
        grandchild = os.fork()
        if grandchild == 0:
            hits.add(7)
            end()
        os.waitpid(grandchild, 0)
        counters.counter("late_total").add()
        end()
    children.append(child)
hits.add(1)
for child in children:
    _, status = os.waitpid(child, 0)
    assert status == 0, status
while not counters.settle():
    continue
print("done", flush=True)
sys.stdin.readline()
"""


def started(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go_on(process: subprocess.Popen[str]) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def ended(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=100)
    assert process.returncode == 0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "counters"


@pytest.fixture
def reader(path: Path):
    counters = Counters.open(path, slots=8)
    yield counters
    counters.close()


def test_four_processes_lose_nothing(path, reader):
    """Four processes that add 100,000 each at the same time make 400,000, and no reading on the way goes back."""
    workers = [started(COUNT, path, number, ADDS) for number in range(1, 5)]
    for worker in workers:
        go_on(worker)

    seen = [0]
    while seen[-1] < 4 * ADDS:
        seen.append(reader.fold().counters.get(Series("hits_total"), 0))
    counted = [worker.stdout.readline() for worker in workers]
    folded = reader.fold()

    assert seen == sorted(seen)
    assert counted == ["counted\n"] * 4
    assert folded.counters[Series("hits_total")] == 4 * ADDS
    assert sum(value for series, value in folded.counters.items() if series.name == "own_total") == 1 + 2 + 3 + 4
    wait = folded.histograms[Series("wait_seconds")]
    assert (wait.count, wait.over(0.1), wait.over(0.2)) == (4 * ADDS, 4 * ADDS, 0)
    assert wait.sum_s == pytest.approx(4 * ADDS * 0.15)
    assert sorted(slot.pid for slot in folded.slots) == sorted(worker.pid for worker in workers)
    for worker in workers:
        ended(worker)


def test_totals_stay_when_processes_end(path, reader):
    """Processes that come and go, more of them than slots, leave their counts and take their gauges along."""
    for number in range(12):
        worker = started(COUNT, path, number, 1_000)
        go_on(worker)
        assert worker.stdout.readline() == "counted\n"
        ended(worker)

    folded = reader.fold()

    assert folded.counters[Series("hits_total")] == 12_000
    assert folded.histograms[Series("wait_seconds")].count == 12_000
    assert (folded.slots, folded.retired) == ((), 12)


def test_forked_children_count_in_slots_of_their_own(path):
    """Parent, children and grandchildren share bound counters, and nothing is lost or counted twice."""
    reader = Counters.open(path, slots=FORK_SLOTS)
    parent = started(FORK, path, FORK_SLOTS)
    assert parent.stdout.readline() == "done\n"

    folded = reader.fold()

    assert folded.counters[Series("hits_total")] == 1_000 + 1 + 4 * (10_000 + 7)
    assert folded.counters[Series("late_total")] == 4
    assert folded.histograms[Series("wait_seconds")].count == 40_000
    assert [slot.pid for slot in folded.slots] == [parent.pid]
    assert folded.slots[0].gauges == {Series("depth"): 5.0}
    assert folded.slots[0].contents.counters == {Series("hits_total"): 1_001}
    assert folded.retired == 8
    reader.close()
    ended(parent)


def test_readers_that_race_with_deaths_see_totals_that_only_grow(path):
    """While a hundred short lives count and end, two folding readers agree on a total that never goes back."""
    lives = """
import os, sys
from pathlib import Path
from headrace.monitor.counters import Counters

counters = Counters.open(Path(sys.argv[1]), slots=8)
hits, wait = counters.counter("hits_total"), counters.histogram("wait_seconds")
for _ in range(100):
    child = os.fork()
    if child == 0:
        hits.add(10)
        wait.record(0.2)
        while not counters.settle():
            continue
        os._exit(0)
    os.waitpid(child, 0)
"""
    readers = [Counters.open(path, slots=8) for _ in range(2)]
    seen: list[list[int]] = [[], []]
    process = subprocess.Popen([sys.executable, "-c", lives, str(path)])

    def watch(reader: Counters, totals: list[int]) -> None:
        while process.poll() is None or not totals:
            totals.append(reader.fold().counters.get(Series("hits_total"), 0))

    threads = [threading.Thread(target=watch, args=pair) for pair in zip(readers, seen, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert process.wait() == 0
    for reader, totals in zip(readers, seen, strict=True):
        assert totals == sorted(totals)
        folded = reader.fold()
        assert folded.counters == {Series("hits_total"): 1_000}
        assert folded.histograms[Series("wait_seconds")].count == 100
        assert folded.retired == 100
        reader.close()


def test_private_counters_of_a_forked_child_begin_empty(tmp_path):
    """Without a file, a child has the parent's counters but not the parent's counts."""
    script = """
import os
from headrace.monitor.counters import Counters
counters = Counters.open(None)
hits = counters.counter("hits_total")
hits.add(5)
child = os.fork()
if child == 0:
    before = dict(counters.fold().counters)
    hits.add(2)
    after = list(counters.fold().counters.values())
    os._exit(0 if (before, after) == ({}, [2]) else 1)
assert os.waitpid(child, 0)[1] == 0
assert list(counters.fold().counters.values()) == [5]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
