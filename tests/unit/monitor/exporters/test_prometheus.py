"""The exposition, read back by a strict reader."""

import math

import pytest

from headrace.monitor.catalogue import HELP, HTTP_DURATION, HTTP_REQUESTS
from headrace.monitor.counters import Counters
from headrace.monitor.exporters.prometheus import OPENMETRICS, TEXT, exposition, negotiate
from headrace.monitor.histogram import OVER, Distribution, Histogram
from headrace.monitor.slots import Contents, Folded, Series, SlotReading
from tests.unit.monitor.exporters.exposition_reader import read

FORMATS = pytest.mark.parametrize("content_type", [TEXT, OPENMETRICS])


@pytest.fixture
def counters():
    counters = Counters.open(None)
    yield counters
    counters.close()


def exposed(folded, content_type=TEXT):
    return read(exposition(folded, content_type).decode(), openmetrics=content_type == OPENMETRICS)


@FORMATS
def test_a_service_reads_back_as_it_was_counted(counters, content_type):
    """Counters, gauges with their slot, and histograms with rising buckets, in both formats."""
    labels = {"method": "GET", "route": "/a/{id}"}
    counters.counter(HTTP_REQUESTS, status="2xx", **labels).add(3)
    for seconds in (0.0001, 0.1, 0.1001, 0.2, 0.5, 0.51, 1.0, 80.0, 500.0):
        counters.histogram(HTTP_DURATION, **labels).record(seconds)
    counters.gauge("headrace_cache_entries", tier="memory").set(12)

    families = exposed(counters.fold(), content_type)

    is_open = content_type == OPENMETRICS
    requests = families[HTTP_REQUESTS.removesuffix("_total") if is_open else HTTP_REQUESTS]
    key = ("_total" if is_open else "", (("method", "GET"), ("route", "/a/{id}"), ("status", "2xx")))
    assert requests.samples[key] == 3.0
    assert requests.help == HELP[HTTP_REQUESTS]
    assert families["headrace_cache_entries"].samples == {("", (("tier", "memory"), ("slot", "0"))): 12.0}
    durations = {
        float(dict(series)["le"]): count
        for (suffix, series), count in families[HTTP_DURATION].samples.items()
        if suffix == "_bucket"
    }
    expected = {0.0001220703125: 1, 0.0625: 1, 0.1: 2, 0.125: 3, 0.2: 4, 0.25: 4, 0.5: 5, 1.0: 7, 64.0: 7, math.inf: 9}
    assert {bound: durations[bound] for bound in expected} == expected
    assert families[HTTP_DURATION].samples["_sum", tuple(sorted(labels.items()))] == pytest.approx(582.4102)


@FORMATS
def test_an_empty_service_is_a_valid_exposition(counters, content_type):
    """Before anything happened there are still the monitor's own counters."""
    families = exposed(counters.fold(), content_type)

    assert all(family.samples for family in families.values())


@FORMATS
@pytest.mark.parametrize("value", ['a"b', "a\\b", "a\nb", "\\n", "", "ü 水 🌊", '",x="1', "{}", "# HELP"])
def test_any_label_value_survives(counters, content_type, value):
    """Quotes, backslashes, line ends and other scripts are escaped and come back as they were."""
    counters.counter("odd_total", value=value).add()

    families = exposed(counters.fold(), content_type)

    (sample,) = families["odd" if content_type == OPENMETRICS else "odd_total"].samples
    assert sample[1] == (("value", value),)


@FORMATS
@pytest.mark.parametrize("value", [0.0, -2.5, 1e-9, 1e300, math.inf, -math.inf, math.nan])
def test_any_gauge_survives(counters, content_type, value):
    """Every double is written so that it reads back the same."""
    counters.gauge("depth").set(value)

    ((_, read_back),) = exposed(counters.fold(), content_type)["depth"].samples.items()

    assert read_back == value or (math.isnan(read_back) and math.isnan(value))


def test_a_counter_without_the_suffix_gets_it_where_it_must(counters):
    """OpenMetrics allows no counter whose sample does not end in _total."""
    counters.counter("visits").add(4)

    assert exposed(counters.fold(), TEXT)["visits"].samples == {("", ()): 4.0}
    assert exposed(counters.fold(), OPENMETRICS)["visits"].samples == {("_total", ()): 4.0}


def test_gauges_of_several_processes_keep_apart(counters):
    """Each carries its slot."""
    slots = tuple(SlotReading(n, 100 + n, 1, Contents(), {Series("depth"): float(n)}, 0) for n in range(3))

    families = exposed(Folded(1, Contents(), slots))

    assert families["depth"].samples == {("", (("slot", str(n)),)): float(n) for n in range(3)}


def test_a_histogram_that_was_read_between_two_cells_is_still_one(counters):
    """A count over a limit that is ahead of its bucket, or behind, does not make the buckets fall."""
    cells = memoryview(bytearray(8 * 1_000)).cast("Q")
    histogram = Histogram()
    for _ in range(5):
        histogram.record(0.15)
    histogram.distribution().write(cells, 0)
    for skew in (-1, 0, 3):
        cells[OVER] = 5 + skew
        contents = Contents()
        contents.histograms[Series(HTTP_DURATION)] = Distribution.read(cells, 0)

        samples = exposed(Folded(1, contents, ()))[HTTP_DURATION].samples

        assert samples["_count", ()] == 5.0


def test_a_name_of_two_kinds_is_told_once(counters):
    """Processes of two versions may disagree on a name; a broken exposition would cost all the others."""
    contents = Contents()
    contents.counters[Series("depth")] = 7
    slot = SlotReading(0, 1, 1, Contents(), {Series("depth"): 1.0}, 0)

    assert exposed(Folded(1, contents, (slot,)))["depth"].kind == "counter"


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", TEXT),
        ("*/*", TEXT),
        ("text/plain;version=0.0.4;q=0.5,*/*;q=0.1", TEXT),
        ("application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75", OPENMETRICS),
        ("text/plain;q=0.5, Application/OpenMetrics-Text; version=1.0.0; q=0.8", OPENMETRICS),
        ("application/openmetrics-text;version=0.0.1", TEXT),
        ("application/openmetrics-text;q=0", TEXT),
    ],
)
def test_the_format_follows_the_accept_header(accept, content_type):
    """OpenMetrics for those who take version 1, text for everybody else."""
    assert negotiate(accept) == content_type
