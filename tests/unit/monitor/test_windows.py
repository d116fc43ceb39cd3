"""The history: steps, gaps, late ticks, clock jumps, and how much is kept."""

import itertools

import pytest

from headrace.monitor.config import MonitorConfig
from headrace.monitor.histogram import Histogram
from headrace.monitor.snapshot import Host
from headrace.monitor.totals import EndpointKey, EndpointTotals, TierTotals, Totals, WorkerKey
from headrace.monitor.windows import Step, Windows, merged

KEY = EndpointKey("GET", "/a")
WALL = 1_700_000_000.0


def host(cpu=50.0, memory=1_000):
    return Host(
        cpu_percent=cpu,
        cpus=2.0,
        memory_bytes=memory,
        memory_bytes_max=10_000,
        disk_read_bytes_per_s=None,
        disk_write_bytes_per_s=None,
        network_received_bytes_per_s=None,
        network_sent_bytes_per_s=None,
    )


class Service:
    """A service that answers at a constant rate, looked at through `Windows`."""

    def __init__(self, **options):
        self.windows = Windows(MonitorConfig(**options))
        self.at, self.wall, self.identity = 100.0, WALL, 1
        self.forget()

    def forget(self):
        """Totals begin again at zero."""
        self.requests = self.errors = self.hits = 0
        self.latency = Histogram()

    def answer(self, requests, *, errors=0, took=0.01, hits=0):
        self.requests += requests
        self.errors += errors
        self.hits += hits
        for _ in range(requests):
            self.latency.record(took)

    def look(self, *, after=1.0, lag=None, machine=None):
        """Let time go by and tell the windows what there is."""
        self.at += after
        self.wall += after
        totals = Totals(
            identity=self.identity,
            endpoints={KEY: EndpointTotals(self.requests, self.errors, self.latency.distribution())},
            tiers={"memory": TierTotals(self.hits, self.requests)},
            executions={"completed": self.requests},
        )
        self.windows.advance(self.at, self.wall, totals, lag or {}, machine or host())

    def run(self, seconds, rate, **answer):
        for _ in range(seconds):
            self.answer(rate, **answer)
            self.look()


def test_nothing_is_known_at_first():
    """Before the first tick, and after it, there is nothing to tell; zero would be a claim."""
    service = Service()
    assert service.windows.window() is None

    service.look()

    assert service.windows.window() is None
    assert service.windows.points(60) == []
    assert service.windows.over(60) is None
    assert service.windows.endpoints_over(60) == (0.0, {})


def test_a_step_is_five_seconds_of_what_happened():
    """Rates are per second, quantiles are of the step, and the time is that of its end."""
    service = Service()
    service.look()
    service.run(5, rate=240, took=0.02, errors=12, hits=80)

    (point,) = service.windows.points(60)

    assert point.at == WALL + 6.0
    assert (point.requests_per_s, point.errors_per_s, point.executions_per_s) == (240.0, 12.0, 240.0)
    assert point.p50_ms == pytest.approx(20.0, rel=0.011)
    assert point.p99_ms == pytest.approx(20.0, rel=0.011)
    assert point.hit_rate == 0.25
    assert (point.cpu_percent, point.memory_bytes) == (50.0, 1_000)


def test_a_step_without_lookups_has_no_hit_rate():
    """None of none is not zero."""
    service = Service()
    service.look()
    service.run(5, rate=0)

    (point,) = service.windows.points(60)

    assert point.hit_rate is None
    assert point.p50_ms is None
    assert point.requests_per_s == 0.0


def test_the_window_looks_back_ten_seconds():
    """A burst is in the window until it is ten seconds old."""
    service = Service(window_s=10.0)
    service.look()
    service.run(1, rate=50)
    service.run(9, rate=0)
    assert service.windows.window().totals.requests == 50
    assert service.windows.window().seconds == 10.0

    service.run(1, rate=0)

    assert service.windows.window().totals.requests == 0


def test_the_window_remembers_the_worst_lag_of_living_workers():
    """A loop that was late once within the window shows it, and who is gone shows nothing."""
    service = Service()
    here, gone = WorkerKey(0, 1), WorkerKey(1, 1)
    service.look(lag={here: 0.9, gone: 0.9})
    for lag in (0.001, 0.25, 0.002):
        service.look(lag={here: lag, gone: 0.5})
    service.look(lag={here: 0.003})

    assert service.windows.window().lag_s == {here: 0.25}


def test_totals_that_went_back_make_a_gap():
    """When the file is made anew there is one point less, and none of them is negative or guessed."""
    service = Service()
    service.look()
    service.run(10, rate=100)
    service.forget()
    service.run(7, rate=100)

    points = service.windows.points(60)

    assert [point.requests_per_s for point in points] == [100.0, 100.0, 100.0]
    assert [later.at - earlier.at for earlier, later in itertools.pairwise(points)] == [5.0, 6.0]


def test_another_file_makes_a_gap_even_when_its_totals_are_larger():
    """A new identity is a new history; what lies between the two is unknown."""
    service = Service()
    service.look()
    service.run(5, rate=10)
    service.identity = 2
    service.run(1, rate=5_000)

    assert service.windows.window() is None
    service.run(5, rate=10)
    assert [point.requests_per_s for point in service.windows.points(60)] == [10.0, 10.0]


def test_a_late_tick_is_told_with_its_true_rate():
    """Not looking for a minute does not lose what was counted, nor make it look like a burst of five seconds."""
    service = Service()
    service.look()
    service.run(5, rate=100)
    service.answer(6_000)
    service.look(after=60.0)

    points = service.windows.points(60)

    assert [point.requests_per_s for point in points] == [100.0, 100.0]
    assert points[1].at - points[0].at == 60.0
    assert service.windows.window().totals.requests / service.windows.window().seconds == 100.0


def test_two_looks_at_one_instant_are_one():
    """Without time between them there is no rate."""
    service = Service()
    service.look()
    service.answer(100)
    service.look(after=0.0)
    assert service.windows.window() is None

    service.run(5, rate=100)

    assert [point.requests_per_s for point in service.windows.points(60)] == [120.0]


@pytest.mark.parametrize("jump", [-7_200.0, 86_400.0])
def test_a_jump_of_the_wall_clock_moves_the_whole_axis(jump):
    """After NTP or an administrator set the clock, all points are told in the new time, evenly spaced and in order."""
    service = Service()
    service.look()
    service.run(10, rate=100)
    service.wall += jump
    service.run(10, rate=100)

    points = service.windows.points(60)

    assert [point.requests_per_s for point in points] == [100.0] * 4
    assert [point.at for point in points] == [
        service.wall - 15.0,
        service.wall - 10.0,
        service.wall - 5.0,
        service.wall,
    ]


def test_a_slow_drift_moves_no_point():
    """The same point keeps its time from one look to the next, so that a client can recognise it."""
    service = Service()
    service.look()
    service.run(5, rate=10)
    before = service.windows.points(60)
    for _ in range(10):
        service.wall += 0.01
        service.run(5, rate=10)

    assert service.windows.points(60)[:1] == before


def test_the_rings_are_bounded_and_coarser_with_age():
    """With room for 3 fine steps and 2 minutes, that is what is kept, and longer spans are told in longer steps."""
    service = Service(steps_max=3, minutes_max=2, five_minutes_max=2)
    service.look()
    service.run(1_300, rate=2)

    assert [point.requests_per_s for point in service.windows.points(0)] == []
    assert len(service.windows.points(60)) == 2
    ends = [point.at for point in service.windows.points(60)]
    assert [later - earlier for earlier, later in itertools.pairwise(ends)] == [300.0]
    service = Service(steps_max=3, minutes_max=200, five_minutes_max=2)
    service.look()
    service.run(300, rate=2)
    ends = [point.at for point in service.windows.points(60)]
    assert [later - earlier for earlier, later in itertools.pairwise(ends)] == [60.0] * 4


def test_a_summary_adds_up_the_minutes_that_were_asked_for():
    """Counts are exact over the span, means are weighted by time, and maxima are maxima."""
    service = Service()
    service.look()
    service.run(600, rate=10, took=0.3)
    service.run(119, rate=1, errors=1, took=0.01)
    service.answer(1, errors=1)
    service.look(machine=host(cpu=99.0, memory=9_000))

    two, ten, hour = (service.windows.over(minutes) for minutes in (2, 10, 60))

    assert (two.requests, two.errors, two.seconds) == (120, 120, 120.0)
    assert (ten.requests, ten.errors, ten.seconds) == (8 * 600 + 120, 120, 600.0)
    assert (hour.requests, hour.errors, hour.seconds) == (6_120, 120, 720.0)
    assert hour.cpu_percent_max == 99.0
    assert 50.0 < hour.cpu_percent_mean < 50.2
    assert hour.memory_bytes_max == 9_000
    assert hour.executions == 6_120


def test_a_summary_counts_an_unfinished_minute_too():
    """Ninety seconds are a minute and six steps; none is lost or counted twice."""
    service = Service()
    service.look()
    service.run(905, rate=10)

    assert service.windows.over(60).requests == 9_050
    assert service.windows.over(60).seconds == 905.0


def test_endpoints_are_kept_by_the_minute():
    """What an endpoint did in the last minutes is exact to the minute, and quantiles are of that span alone."""
    service = Service()
    service.look()
    service.run(300, rate=10, took=0.5)
    service.run(120, rate=30, took=0.01)

    seconds, endpoints = service.windows.endpoints_over(2)
    assert seconds == 120.0
    assert endpoints[KEY].requests == 3_600
    assert endpoints[KEY].latency.over(0.2) == 0

    seconds, endpoints = service.windows.endpoints_over(60)
    assert (seconds, endpoints[KEY].requests) == (420.0, 6_600)


def test_endpoints_are_forgotten_after_their_time():
    """Only as many minutes are kept as configured; asking for more tells how much is covered."""
    service = Service(endpoint_minutes_max=3)
    service.look()
    service.run(600, rate=1)

    seconds, endpoints = service.windows.endpoints_over(60)

    assert (seconds, endpoints[KEY].requests) == (180.0, 180)


def test_merging_no_steps_tells_nothing():
    """None of them, None."""
    assert merged([]) is None


def test_merging_leaves_unknown_what_none_of_them_knew():
    """A host that could not be read in any step is unknown in the sum, and in some of them counts for nothing."""
    unknown = Step(
        seconds=5.0, requests=0, errors=0, latency=Histogram().distribution().pack(), hits=0, misses=0, executions=0
    )
    known = Step(
        seconds=5.0,
        requests=1,
        errors=0,
        latency=Histogram().distribution().pack(),
        hits=0,
        misses=0,
        executions=0,
        cpu_percent_mean=40.0,
        cpu_percent_max=60.0,
        memory_bytes_mean=7,
        memory_bytes_max=9,
    )

    assert merged([unknown, unknown]).cpu_percent_mean is None
    both = merged([unknown, known])
    assert (both.cpu_percent_mean, both.cpu_percent_max, both.memory_bytes_mean, both.memory_bytes_max) == (
        40.0,
        60.0,
        7,
        9,
    )
