"""The file that processes count in: joining it, refusing what it is not, reading what others write."""

import fcntl
import os
import threading

import pytest

from headrace.errors import CountersUnusable
from headrace.monitor.counters import Counters
from headrace.monitor.slot_file import LAYOUT, PAGE, SlotFile
from headrace.monitor.slots import COUNTER, SLOT_BYTES_MIN, Series, Slot

SHAPE = {"slots": 2, "slot_bytes": SLOT_BYTES_MIN}


def opened(path, **shape):
    return SlotFile.open(path, **{**SHAPE, **shape})


def test_the_file_has_its_size_from_the_start(tmp_path):
    """A header, two retired areas and the slots; the disk holds none of the slots yet."""
    path = tmp_path / "counters"
    opened(path, slots=64, slot_bytes=2_097_152).close()

    assert path.stat().st_size == PAGE + 66 * 2_097_152
    assert path.stat().st_blocks * 512 < 1_000_000


def test_a_claimed_slot_has_its_disk_space(tmp_path):
    """Space is taken when a slot is claimed, so that no later store can meet a full disk."""
    path = tmp_path / "counters"
    file = opened(path, slots=4, slot_bytes=2_097_152)
    if path.stat().st_blocks * 512 > 1_000_000:
        pytest.skip("this file system does not keep sparse files")

    file.claim()

    assert 2_097_152 <= path.stat().st_blocks * 512 < 3_000_000
    file.close()


def test_two_openings_share_one_file(tmp_path):
    """What one counts, the other folds."""
    one, two = Counters.open(tmp_path / "counters"), Counters.open(tmp_path / "counters")
    one.counter("x_total").add(3)
    two.counter("x_total").add(4)

    assert one.fold().counters == two.fold().counters == {Series("x_total"): 7}
    assert one.fold().identity == two.fold().identity
    one.close()
    two.close()


def test_totals_outlive_everyone(tmp_path):
    """Closed counters are folded into the retired totals, also by someone who opens the file much later."""
    for _ in range(3):
        counters = Counters.open(tmp_path / "counters", **SHAPE)
        counters.counter("x_total").add(5)
        counters.gauge("depth").set(1.0)
        counters.histogram("wait_seconds").record(0.5)
        counters.close()
    reader = Counters.open(tmp_path / "counters", **SHAPE)

    folded = reader.fold()

    assert folded.counters == {Series("x_total"): 15}
    assert folded.histograms[Series("wait_seconds")].count == 3
    assert (folded.retired, folded.slots) == (3, ())
    reader.close()


def test_more_owners_than_slots_over_time(tmp_path):
    """Two slots serve a hundred owners one after the other; every count is in the total."""
    reader = Counters.open(tmp_path / "counters", **SHAPE)
    for number in range(100):
        counters = Counters.open(tmp_path / "counters", **SHAPE)
        counters.counter("x_total", parity=str(number % 2)).add()
        assert counters.settle()
        counters.close()

    assert reader.fold().counters == {Series("x_total", (("parity", p),)): 50 for p in "01"}
    assert reader.fold().retired == 100
    reader.close()


def test_without_a_free_slot_counts_are_private_until_there_is_one(tmp_path):
    """The third of two counts where only it sees it, and hands over everything once a slot is free."""
    path = tmp_path / "counters"
    first, second, third = (Counters.open(path, **SHAPE) for _ in range(3))
    for counters in (first, second, third):
        counters.counter("x_total").add(10)
        counters.gauge("depth").set(2.0)
        counters.histogram("wait_seconds").record(0.3)
    assert not third.settle()
    assert first.fold().counters == {Series("x_total"): 20}
    assert third.fold().counters == {Series("x_total"): 30}
    assert [slot.slot for slot in third.fold().slots] == [0, 1, -1]

    first.close()
    third.counter("x_total").add(1)
    assert third.settle()

    assert second.fold().counters == third.fold().counters == {Series("x_total"): 31}
    assert second.fold().histograms[Series("wait_seconds")].count == 3
    assert [slot.gauges[Series("depth")] for slot in second.fold().slots] == [2.0, 2.0]
    second.close()
    third.close()


def test_what_was_counted_in_private_is_handed_over_at_the_end(tmp_path):
    """Closing is the last chance to find a free slot: a process that then ends loses nothing for want of one."""
    path = tmp_path / "counters"
    first, second, reader = (Counters.open(path, slots=1, slot_bytes=SLOT_BYTES_MIN) for _ in range(3))
    first.counter("x_total").add(10)
    second.counter("x_total").add(3)
    assert reader.fold().counters == {Series("x_total"): 10}
    first.close()

    second.close()

    assert reader.fold().counters == {Series("x_total"): 13}
    assert reader.fold().slots == ()
    reader.close()


def test_a_process_that_cannot_see_itself_counts_in_private(tmp_path, monkeypatch):
    """Where /proc is hidden everybody would look dead; counting in a shared slot would then lose counts."""
    monkeypatch.setattr("headrace.monitor.slot_file.started", lambda _pid: 0)
    counters = Counters.open(tmp_path / "counters", **SHAPE)
    counters.counter("x_total").add(3)

    assert not counters.settle()
    assert counters.fold().counters == {Series("x_total"): 3}
    counters.close()


def test_a_slot_has_a_new_generation_with_each_owner(tmp_path):
    """Readers can tell a slot's owners apart, though both are this process."""
    generations = []
    for _ in range(3):
        counters = Counters.open(tmp_path / "counters", slots=1, slot_bytes=SLOT_BYTES_MIN)
        counters.counter("x_total").add()
        generations += [slot.generation for slot in counters.fold().slots]
        counters.close()

    assert generations == [1, 2, 3]


def test_a_reader_follows_a_growing_directory(tmp_path):
    """Series declared after the first reading appear in the next."""
    writer, reader = Counters.open(tmp_path / "counters"), Counters.open(tmp_path / "counters")
    for number in range(5):
        writer.counter("x_total", n=str(number)).add(number)
        assert len(reader.fold().counters) == number + 1
    writer.close()
    reader.close()


def test_an_entry_that_is_not_yet_visible_is_read_later():
    """A published length may be seen before the entry itself; what fails its checksum waits for the next reading."""
    memory = memoryview(bytearray(SLOT_BYTES_MIN))
    writer, reader = Slot(memory), Slot(memory)
    writer.reset()
    assert writer.place(COUNTER, Series("a_total")) is not None
    begin = 64 + writer.cells[1]
    assert writer.place(COUNTER, Series("b_total")) is not None
    whole = bytes(memory[begin : begin + 64])

    memory[begin + 10 : begin + 64] = bytes(54)
    assert [entry.series.name for entry in reader.entries()] == ["a_total"]
    memory[begin : begin + 64] = whole
    assert [entry.series.name for entry in reader.entries()] == ["a_total", "b_total"]


def test_processes_that_disagree_on_a_kind_do_not_disturb_each_other(tmp_path):
    """A name may be a counter in one version of a service and a histogram in the next; folding keeps both whole."""
    old, new = Counters.open(tmp_path / "counters", **SHAPE), Counters.open(tmp_path / "counters", **SHAPE)
    old.counter("wait", overflow="true").add(3)
    old.counter("other_total").add(4)
    new.histogram("wait", overflow="true").record(0.5)
    old.close()
    new.close()
    reader = Counters.open(tmp_path / "counters", **SHAPE)

    folded = reader.fold()

    assert folded.counters == {Series("wait", (("overflow", "true"),)): 3, Series("other_total"): 4}
    assert folded.histograms[Series("wait", (("overflow", "true"),))].count == 1
    reader.close()


def test_a_foreign_file_is_refused_and_left_alone(tmp_path):
    """Somebody's file under our path is neither mapped nor overwritten."""
    path = tmp_path / "counters"
    path.write_bytes(b"somebody's diary" * 1_000)

    with pytest.raises(CountersUnusable, match="not a counters file"):
        opened(path)

    assert path.read_bytes() == b"somebody's diary" * 1_000


@pytest.mark.parametrize("size", [1, 100, PAGE, PAGE + SLOT_BYTES_MIN])
def test_a_cut_file_is_refused(tmp_path, size):
    """Mapping a file that is shorter than its header says would end in a bus error."""
    path = tmp_path / "counters"
    opened(path).close()
    os.truncate(path, size)

    with pytest.raises(CountersUnusable):
        opened(path)


def test_an_empty_file_is_a_new_one(tmp_path):
    """A path made by `mktemp` is as good as none."""
    path = tmp_path / "counters"
    path.touch()

    opened(path).close()

    assert path.stat().st_size > 0


def test_another_layout_is_refused(tmp_path):
    """A file of another version of headrace is named as such."""
    path = tmp_path / "counters"
    opened(path).close()
    with path.open("r+b") as file:
        file.seek(8)
        file.write((LAYOUT + 1).to_bytes(8, "little"))

    with pytest.raises(CountersUnusable, match=f"layout {LAYOUT + 1}"):
        opened(path)


def test_another_shape_is_refused_while_someone_counts(tmp_path):
    """The number of slots cannot change under a running service; the message names the process."""
    counters = Counters.open(tmp_path / "counters", **SHAPE)
    counters.counter("x_total").add()

    with pytest.raises(CountersUnusable, match=f"process {os.getpid()}"):
        opened(tmp_path / "counters", slots=3)

    counters.close()


def test_another_shape_is_a_new_file_when_nobody_counts(tmp_path):
    """After a stop the service may start with other sizes, and begins at zero under a new identity."""
    before = Counters.open(tmp_path / "counters", **SHAPE)
    before.counter("x_total").add()
    identity = before.fold().identity
    before.close()

    after = Counters.open(tmp_path / "counters", slots=3, slot_bytes=SLOT_BYTES_MIN)

    assert after.fold().counters == {}
    assert after.fold().identity != identity
    after.close()


def test_a_missing_directory_is_named(tmp_path):
    """What the system says is passed on with the path."""
    with pytest.raises(CountersUnusable, match="No such file or directory"):
        opened(tmp_path / "nowhere" / "counters")


def test_a_held_lock_is_not_waited_for_while_counting_or_folding(tmp_path):
    """With the lock in other hands, writing goes to private memory and folding leaves the dead where they are."""
    path = tmp_path / "counters"
    dead, living = Counters.open(path, **SHAPE), Counters.open(path, **SHAPE)
    dead.counter("x_total").add(2)
    dead.close()
    with path.with_name("counters.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        living.counter("x_total").add(3)
        folded = living.fold()
        assert [slot.slot for slot in folded.slots] == [-1]
        assert folded.counters == {Series("x_total"): 5}

    folded = living.fold()

    assert [slot.slot for slot in folded.slots] == [1]
    assert folded.counters == {Series("x_total"): 5}
    living.close()


def test_a_lock_that_is_never_released_is_reported(tmp_path, monkeypatch):
    """Opening waits a bounded time and says what it waited for."""
    monkeypatch.setattr("headrace.monitor.slot_file._OPEN_TRIES", 3)
    path = tmp_path / "counters"
    with path.with_name("counters.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        with pytest.raises(CountersUnusable, match="kept the lock"):
            opened(path)


def test_counting_goes_on_without_the_directory(tmp_path):
    """When somebody removes the directory of a running service, its counters still count and fold."""
    directory = tmp_path / "run"
    directory.mkdir()
    counters = Counters.open(directory / "counters", **SHAPE)
    counters.counter("x_total").add()
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()

    counters.counter("x_total").add()

    assert counters.fold().counters == {Series("x_total"): 2}
    counters.close()


def test_moving_out_of_private_memory_under_load_loses_nothing(tmp_path):
    """Threads that count while their process moves into a freed slot end in an exact total."""
    path = tmp_path / "counters"
    first, second = (Counters.open(path, slots=1, slot_bytes=SLOT_BYTES_MIN) for _ in range(2))
    first.counter("x_total").add()
    hits, wait = second.counter("hits_total"), second.histogram("wait_seconds")
    hits.add()
    moved = []

    def work():
        for _ in range(30_000):
            hits.add()
            wait.record(0.3)

    def move():
        first.close()
        moved.append(second.settle())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    threads.append(threading.Thread(target=move))
    threads[-1].start()
    for thread in threads:
        thread.join()

    assert moved == [True]
    folded = second.fold()
    assert folded.counters == {Series("x_total"): 1, Series("hits_total"): 120_001}
    distribution = folded.histograms[Series("wait_seconds")]
    assert (distribution.count, distribution.over(0.2), distribution.sum_s) == (120_000, 120_000, 36_000.0)
    second.close()
