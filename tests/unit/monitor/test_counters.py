"""Counting in one process: series, kinds, threads, lack of room, the end."""

import threading

import pytest

from headrace.errors import CallerError, ConfigError, NotOpen
from headrace.monitor.counters import Counters
from headrace.monitor.histogram import CELLS
from headrace.monitor.slots import SLOT_BYTES_MIN, Series


@pytest.fixture
def counters():
    counters = Counters.open(None)
    yield counters
    counters.close()


@pytest.fixture(params=["private", "shared"])
def small(request, tmp_path):
    """Counters with the smallest slot that there is, which holds a handful of histograms."""
    path = tmp_path / "counters" if request.param == "shared" else None
    counters = Counters.open(path, slots=2, slot_bytes=SLOT_BYTES_MIN)
    yield counters
    counters.close()


def test_a_counter_adds_up(counters):
    """Additions of one and of many end in one total."""
    hits = counters.counter("hits_total", tier="memory")

    hits.add()
    hits.add(41)

    assert counters.fold().counters == {Series("hits_total", (("tier", "memory"),)): 42}


def test_a_counter_never_goes_down(counters):
    """A negative step is refused with the value, and the total stays."""
    hits = counters.counter("hits_total")
    hits.add(3)

    with pytest.raises(CallerError, match="-1"):
        hits.add(-1)

    assert counters.fold().counters[Series("hits_total")] == 3


def test_a_gauge_is_what_was_said_last(counters):
    """Gauges belong to the process that sets them."""
    depth = counters.gauge("depth")

    depth.set(7.5)
    depth.set(-2.25)

    (slot,) = counters.fold().slots
    assert slot.gauges == {Series("depth"): -2.25}


def test_a_histogram_takes_durations(counters):
    """Its distribution is in the fold under its series."""
    counters.histogram("wait_seconds", queue="a").record(0.2)

    distribution = counters.fold().histograms[Series("wait_seconds", (("queue", "a"),))]
    assert (distribution.count, distribution.sum_s) == (1, 0.2)


def test_the_order_of_labels_does_not_matter(counters):
    """A series is its name and its set of labels, and asking again gives the same counter."""
    assert counters.counter("x_total", a="1", b="2") is counters.counter("x_total", b="2", a="1")


def test_a_name_has_one_kind(counters):
    """A counter cannot be a gauge under other labels: no reader could make sense of it."""
    counters.counter("x_total")

    for labels in ({}, {"tier": "memory"}):
        with pytest.raises(CallerError, match="is a counter already, not a gauge"):
            counters.gauge("x_total", **labels)


@pytest.mark.parametrize(
    ("name", "labels"), [("1x", {}), ("x-y", {}), ("", {}), ("x", {"ä": "1"}), ("x", {"le": "1"})]
)
def test_names_are_those_that_exporters_can_write(counters, name, labels):
    """What would break the exposition is refused where it is declared."""
    with pytest.raises(CallerError):
        counters.counter(name, **labels)


def test_any_label_value_is_taken(counters):
    """Values are text of any kind, quotes, line ends and other scripts included."""
    counters.counter("x_total", path='a"b\\c\nd ü 水').add()

    assert counters.fold().counters == {Series("x_total", (("path", 'a"b\\c\nd ü 水'),)): 1}


def test_series_without_room_share_one_that_says_so(small):
    """Past the slot's room new series count under overflow="true": no count is lost, and each refusal is counted."""
    for number in range(50):
        small.histogram("wait_seconds", queue=str(number)).record(0.01)

    folded = small.fold()
    own = [series for series in folded.histograms if series.label("overflow") != "true"]
    assert 2 <= len(own) < 50
    assert sum(distribution.count for distribution in folded.histograms.values()) == 50
    assert folded.histograms[Series("wait_seconds", (("overflow", "true"),))].count == 50 - len(own)
    assert folded.refused == 50 - len(own)


def test_series_declared_before_the_slot_was_claimed_overflow_alike(small):
    """It makes no difference whether the room is found wanting at the declaration or at the first write."""
    histograms = [small.histogram("wait_seconds", queue=str(number)) for number in range(50)]
    for histogram in histograms:
        histogram.record(0.01)

    folded = small.fold()
    assert sum(distribution.count for distribution in folded.histograms.values()) == 50
    assert folded.histograms[Series("wait_seconds", (("overflow", "true"),))].count == folded.refused > 0


def test_a_label_longer_than_a_page_overflows(small):
    """One absurd label cannot fill the directory."""
    small.counter("x_total", path="y" * 10_000).add(5)

    assert small.fold().counters == {Series("x_total", (("overflow", "true"),)): 5}


def test_when_even_the_overflow_has_no_room_counting_goes_on(small):
    """Names without bound end in counts that are refused, never in an error on the path that counts."""
    for number in range(2_000):
        small.histogram(f"name_{number}").record(0.01)

    folded = small.fold()
    assert folded.refused > 1_000
    assert len(folded.histograms) * CELLS * 8 < SLOT_BYTES_MIN


def test_threads_of_one_process_lose_nothing(counters):
    """Additions by several threads are whole: eight times 25,000 are 200,000."""
    hits, wait = counters.counter("hits_total"), counters.histogram("wait_seconds")

    def work():
        for _ in range(25_000):
            hits.add()
            wait.record(0.3)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    folded = counters.fold()
    distribution = folded.histograms[Series("wait_seconds")]
    assert folded.counters[Series("hits_total")] == 200_000
    assert (distribution.count, distribution.over(0.2), distribution.over(0.5)) == (200_000, 200_000, 0)
    assert distribution.sum_s == 60_000.0


def test_after_close_counting_is_silent_and_folding_is_refused(small):
    """Whoever still holds a counter at the end may use it; whoever wants totals is told to come earlier."""
    hits, depth, wait = small.counter("hits_total"), small.gauge("depth"), small.histogram("wait_seconds")
    hits.add()
    small.close()
    small.close()

    hits.add()
    depth.set(1.0)
    wait.record(0.1)
    small.counter("other_total").add()

    with pytest.raises(NotOpen):
        small.fold()


def test_a_process_that_never_counts_takes_no_slot(tmp_path):
    """Declaring and folding leave all slots to those who write."""
    path = tmp_path / "counters"
    silent, loud = Counters.open(path, slots=1), Counters.open(path, slots=1)
    silent.counter("x_total")
    assert silent.fold().slots == ()

    loud.counter("x_total").add()

    assert [slot.slot for slot in silent.fold().slots] == [0]
    assert loud.settle()
    silent.close()
    loud.close()


@pytest.mark.parametrize(("slots", "slot_bytes"), [(0, SLOT_BYTES_MIN), (1, 4096), (1, SLOT_BYTES_MIN + 8)])
def test_sizes_that_make_no_sense_are_refused(tmp_path, slots, slot_bytes):
    """The message names the values and the rule."""
    with pytest.raises(ConfigError, match=f"slots={slots}, slot_bytes={slot_bytes}"):
        Counters.open(tmp_path / "counters", slots=slots, slot_bytes=slot_bytes)
