"""The memory of the system: what happened, in steps of five seconds, a minute and five minutes. Pure.

It is fed the totals at each tick and keeps differences. Three things can spoil a difference, and none yields a wrong
number:

- Totals went back (the file was made anew): that interval is a gap. No point is told for it, and none is negative.
- A tick came late (stopped process, busy machine): the step is as long as it really was, by the monotonic clock, and
  its rates are divided by that. A gap in looking is not a gap in what was counted.
- The wall clock jumped: steps are kept by monotonic time, and wall time is added where they leave. After a jump of
  more than a second all of them are told in the new time, so that a chart's axis never runs backwards.

Memory is bounded by the lengths of the rings. A step holds its response times as a compressed histogram: 0.2 to 0.7 KB
for times between 1 ms and 1 s, and 5.2 KB at the very worst.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

import msgspec

from headrace.monitor.config import MonitorConfig
from headrace.monitor.histogram import Distribution
from headrace.monitor.snapshot import Host, Point
from headrace.monitor.totals import EndpointKey, EndpointTotals, Totals, WorkerKey, difference

MINUTE_S = 60.0
FIVE_MINUTES_S = 300.0
WALL_JUMP_S = 1.0
_NOTHING = Distribution().pack()
FINE_STEPS_MAX = 120
"""A summary adds up at most this many fine steps, and takes minutes where that would be more."""


class Step(msgspec.Struct, frozen=True):
    """What happened within some seconds. Steps add up to longer ones."""

    seconds: float
    requests: int
    errors: int
    latency: bytes
    """A packed `Distribution`."""
    hits: int
    misses: int
    executions: int
    cpu_percent_mean: float | None = None
    cpu_percent_max: float | None = None
    memory_bytes_mean: int | None = None
    memory_bytes_max: int | None = None

    def point(self, at: float) -> Point:
        """What a chart draws of it."""
        latency = Distribution.unpack(self.latency)
        lookups = self.hits + self.misses
        return Point(
            at=at,
            requests_per_s=self.requests / self.seconds,
            errors_per_s=self.errors / self.seconds,
            p50_ms=milliseconds(latency.quantile(0.5)),
            p95_ms=milliseconds(latency.quantile(0.95)),
            p99_ms=milliseconds(latency.quantile(0.99)),
            hit_rate=self.hits / lookups if lookups else None,
            cpu_percent=self.cpu_percent_mean,
            memory_bytes=self.memory_bytes_mean,
            executions_per_s=self.executions / self.seconds,
        )


def milliseconds(seconds: float | None) -> float | None:
    """The same in milliseconds."""
    return None if seconds is None else seconds * 1e3


def step_of(totals: Totals, seconds: float, hosts: Iterable[Host]) -> Step:
    """One step, from what happened in it and what the host said meanwhile."""
    lookups = totals.lookups
    hosts = list(hosts)
    cpu = [host.cpu_percent for host in hosts if host.cpu_percent is not None]
    memory = [host.memory_bytes for host in hosts if host.memory_bytes is not None]
    return Step(
        seconds=seconds,
        requests=totals.requests,
        errors=totals.errors,
        latency=totals.latency.pack(),
        hits=lookups.hits,
        misses=lookups.misses,
        executions=sum(totals.executions.values()),
        cpu_percent_mean=sum(cpu) / len(cpu) if cpu else None,
        cpu_percent_max=max(cpu, default=None),
        memory_bytes_mean=sum(memory) // len(memory) if memory else None,
        memory_bytes_max=max(memory, default=None),
    )


def merged(steps: Iterable[Step]) -> Step | None:
    """One step for several; None for none. Means are weighted by time, maxima are maxima, histograms merge exactly."""
    parts = list(steps)
    if not parts:
        return None
    cpu = [(part.cpu_percent_mean, part.seconds) for part in parts if part.cpu_percent_mean is not None]
    memory = [(part.memory_bytes_mean, part.seconds) for part in parts if part.memory_bytes_mean is not None]
    return Step(
        seconds=sum(part.seconds for part in parts),
        requests=sum(part.requests for part in parts),
        errors=sum(part.errors for part in parts),
        latency=Distribution.total(Distribution.unpack(part.latency) for part in parts).pack(),
        hits=sum(part.hits for part in parts),
        misses=sum(part.misses for part in parts),
        executions=sum(part.executions for part in parts),
        cpu_percent_mean=_weighted(cpu),
        cpu_percent_max=max(
            (part.cpu_percent_max for part in parts if part.cpu_percent_max is not None), default=None
        ),
        memory_bytes_mean=None if not memory else int(_weighted(memory) or 0.0),
        memory_bytes_max=max(
            (part.memory_bytes_max for part in parts if part.memory_bytes_max is not None), default=None
        ),
    )


def _weighted(values: Iterable[tuple[float, float]]) -> float | None:
    pairs = list(values)
    weight = sum(seconds for _, seconds in pairs)
    return sum(value * seconds for value, seconds in pairs) / weight if weight > 0.0 else None


@dataclass(frozen=True, slots=True)
class Window:
    """What a snapshot looks back on."""

    seconds: float
    totals: Totals
    lag_s: Mapping[WorkerKey, float]
    """How late each worker's event loop woke, at worst."""


@dataclass(frozen=True, slots=True)
class _Tick:
    at: float
    totals: Totals
    lag_s: Mapping[WorkerKey, float]


@dataclass(frozen=True, slots=True)
class _Mark:
    """What each endpoint had done in all, at one minute's end; two of them tell what it did in between."""

    at: float
    watched_s: float
    endpoints: Mapping[EndpointKey, tuple[int, int, bytes]]


class _Ring:
    """Steps of one length, oldest first, each with the monotonic time of its end and what a chart draws of it."""

    def __init__(self, step_s: float, steps_max: int) -> None:
        self._covers_s = step_s * steps_max
        self._kept: deque[tuple[float, Step, Point]] = deque(maxlen=steps_max)

    def append(self, end: float, step: Step) -> None:
        """Keep one more; the oldest goes when the ring is full. The point is made here, once, its wall time later."""
        self._kept.append((end, step, step.point(0.0)))

    def reaches(self, horizon_s: float) -> bool:
        """Whether it goes back so far, or to the beginning."""
        return self._covers_s >= horizon_s or len(self._kept) < (self._kept.maxlen or 0)

    def since(self, begin: float) -> list[tuple[float, Step, Point]]:
        """Those that ended after `begin`."""
        # Backwards from the newest: a glance at the last minutes should not walk over 28 days.
        count = 0
        for end, _, _ in reversed(self._kept):
            if end <= begin:
                break
            count += 1
        return list(islice(self._kept, len(self._kept) - count, None))


class Windows:
    """Recent ticks, and the three rings of the history."""

    def __init__(self, config: MonitorConfig) -> None:
        self._config = config
        # A step is due when most of its last tick has passed, so that a tick that comes a millisecond early ends it.
        self._step_due_s = config.step_s - config.tick_s / 2
        self._ticks: deque[_Tick] = deque(maxlen=int(config.window_s / config.tick_s) + 1)
        self._base: _Tick | None = None
        self._hosts: list[Host] = []
        self._fine = _Ring(config.step_s, config.steps_max)
        self._minutes = _Ring(MINUTE_S, config.minutes_max)
        self._five_minutes = _Ring(FIVE_MINUTES_S, config.five_minutes_max)
        self._minute = _Gathering(MINUTE_S - config.step_s / 2)
        self._five = _Gathering(FIVE_MINUTES_S - MINUTE_S / 2)
        self._endpoints: dict[EndpointKey, EndpointTotals] = {}
        self._watched_s = 0.0
        self._marks: deque[_Mark] = deque(maxlen=config.endpoint_minutes_max + 1)
        self.steps = 0
        """How many steps have ended: the history is as it was while this stays the same."""
        self._wall_offset: float | None = None

    def advance(self, at: float, wall: float, totals: Totals, lag_s: Mapping[WorkerKey, float], host: Host) -> None:
        """Take note of the totals at monotonic time `at`."""
        if self._ticks and at <= self._ticks[-1].at:
            return  # two looks at the same instant have nothing between them
        if self._wall_offset is None or abs(wall - at - self._wall_offset) > WALL_JUMP_S:
            self._wall_offset = wall - at
        tick = _Tick(at, totals, lag_s)
        if self._ticks and difference(self._ticks[-1].totals, totals) is None:
            self._ticks.clear()
            self._base = None
        self._ticks.append(tick)
        if self._base is None:
            self._base, self._hosts = tick, []
            return
        self._hosts.append(host)
        if at - self._base.at >= self._step_due_s:
            self._end_step(self._base, tick)
            self._base, self._hosts = tick, []

    def _end_step(self, base: _Tick, tick: _Tick) -> None:
        happened = difference(base.totals, tick.totals)
        if happened is None:
            return
        seconds = tick.at - base.at
        step = step_of(happened, seconds, self._hosts)
        self._fine.append(tick.at, step)
        self.steps += 1
        if not self._marks:
            self._marks.append(_Mark(base.at, 0.0, {}))
        self._watched_s += seconds
        for key, endpoint in happened.endpoints.items():
            if endpoint.requests:
                self._endpoints[key] = self._endpoints.get(key, EndpointTotals()).plus(endpoint)
        minute = self._minute.add(tick.at, step)
        if minute is None:
            return
        self._minutes.append(tick.at, minute)
        self._marks.append(_Mark(tick.at, self._watched_s, _packed(self._endpoints)))
        five = self._five.add(tick.at, minute)
        if five is not None:
            self._five_minutes.append(tick.at, five)

    def window(self) -> Window | None:
        """The last `window_s` seconds; None before the second tick and right after a gap."""
        if len(self._ticks) < 2:
            return None
        last = self._ticks[-1]
        # After a late tick the oldest ones are too long ago; the one before the window's begin is its base.
        begin = last.at - self._config.window_s - self._config.tick_s / 2
        first = next((tick for tick in self._ticks if tick.at >= begin), last)
        if first is last:
            first = self._ticks[-2]
        happened = difference(first.totals, last.totals)
        if happened is None:
            return None
        worst: dict[WorkerKey, float] = {}
        for tick in self._ticks:
            if tick.at > first.at:
                for key in last.lag_s.keys() & tick.lag_s.keys():
                    worst[key] = max(worst.get(key, 0.0), tick.lag_s[key])
        return Window(last.at - first.at, happened, worst)

    def points(self, minutes: int) -> list[Point]:
        """The last `minutes`, oldest first, in the finest steps that are kept for so long. A gap has no points."""
        if not self._ticks or self._wall_offset is None:
            return []
        horizon = minutes * MINUTE_S
        ring = next((ring for ring in (self._fine, self._minutes) if ring.reaches(horizon)), self._five_minutes)
        offset = self._wall_offset
        kept = ring.since(self._ticks[-1].at - horizon)
        return [msgspec.structs.replace(point, at=end + offset) for end, _, point in kept]

    def over(self, minutes: int) -> Step | None:
        """All that happened in the last `minutes` as one step; None when nothing is known of them."""
        if not self._ticks:
            return None
        begin = self._ticks[-1].at - minutes * MINUTE_S
        if minutes * MINUTE_S <= FINE_STEPS_MAX * self._config.step_s:
            return merged(step for _, step, _ in self._fine.since(begin))
        whole = self._minutes.since(begin)
        rest = self._fine.since(whole[-1][0] if whole else begin)
        return merged([step for _, step, _ in whole] + [step for _, step, _ in rest])

    def endpoints_over(self, minutes: int) -> tuple[float, Mapping[EndpointKey, EndpointTotals]]:
        """What each endpoint did in the last `minutes`, to the minute, and how many seconds of them were watched."""
        if not self._marks:
            return 0.0, {}
        begin = self._ticks[-1].at - minutes * MINUTE_S - self._config.step_s / 2
        mark = next(mark for mark in self._marks if mark.at >= begin or mark is self._marks[-1])
        happened = {}
        for key, endpoint in self._endpoints.items():
            requests, errors, latency = mark.endpoints.get(key, (0, 0, _NOTHING))
            since = endpoint.since(EndpointTotals(requests, errors, Distribution.unpack(latency)))
            assert since is not None, "sums of differences only grow"
            happened[key] = since
        return self._watched_s - mark.watched_s, happened


def _packed(endpoints: Mapping[EndpointKey, EndpointTotals]) -> Mapping[EndpointKey, tuple[int, int, bytes]]:
    return {key: (endpoint.requests, endpoint.errors, endpoint.latency.pack()) for key, endpoint in endpoints.items()}


class _Gathering:
    """Steps on their way to a longer one, which is due after so many seconds of them or of waiting."""

    def __init__(self, due_s: float) -> None:
        self._due_s = due_s
        self._begin: float | None = None
        self._steps: list[Step] = []

    def add(self, end: float, step: Step) -> Step | None:
        """One more; the longer step when it is due."""
        if self._begin is None:
            self._begin = end - step.seconds
        self._steps.append(step)
        if end - self._begin < self._due_s:
            return None
        whole = merged(self._steps)
        self._begin, self._steps = None, []
        return whole
