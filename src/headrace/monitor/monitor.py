"""The door of the monitor room: observes applications, counts facts, and tells what is true now and what was.

    monitor = Monitor()                                   # alone: counts and folds in this process
    app = monitor.middleware(app)
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(monitor.run())       # the owner cancels it to stop
        ...
        monitor.snapshot(), monitor.history(), monitor.summary()

Of several processes, all count in one file (`counters=`), exactly one folds and publishes (`fold=True, publication=`),
and the others serve what it published (`fold=False, publication=`). Every one of them can answer `/metrics` for all.

Once a tick the loop publishes this process's own gauges and what its sources say, and leaves whatever touches a file
or takes milliseconds to a thread.
"""

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import Final

from headrace.clock import Clock, SystemClock
from headrace.errors import CountersUnusable
from headrace.events import MonitorFailed, Observer, Silent
from headrace.monitor.catalogue import (
    WORKER_CPU,
    WORKER_IN_FLIGHT,
    WORKER_LAG,
    WORKER_MEMORY,
    WORKER_START,
    statistic,
)
from headrace.monitor.config import DEFAULTS, MonitorConfig
from headrace.monitor.counters import Counters
from headrace.monitor.exporters.prometheus import exposition, negotiate
from headrace.monitor.facts import FactCounter
from headrace.monitor.host import HostProbe, ProcessProbe
from headrace.monitor.middleware import ASGIApp, Observed, Requests
from headrace.monitor.picture import lags, snapshot_of, summary_of
from headrace.monitor.publication import Publication, SnapshotFile
from headrace.monitor.slots import COUNTER
from headrace.monitor.snapshot import Point, Snapshot, Summary
from headrace.monitor.totals import digest
from headrace.monitor.windows import MINUTE_S, Windows

Source = Callable[[], Mapping[str, float]]

HOUR_MINUTES: Final = 60
"""How much of the history is published for the other processes."""
_SILENT: Final = Silent()


class Monitor:
    """Counts in this process; with `fold`, also sees all processes. Close it if it made its own counters."""

    def __init__(
        self,
        config: MonitorConfig = DEFAULTS,
        *,
        clock: Clock | None = None,
        counters: Counters | None = None,
        fold: bool = True,
        publication: SnapshotFile | None = None,
        observer: Observer = _SILENT,
        host: HostProbe | None = None,
    ) -> None:
        self._config = config
        self._clock: Clock = SystemClock() if clock is None else clock
        self._counters = Counters.open(None, slot_bytes=config.slot_bytes) if counters is None else counters
        self._owns_counters = counters is None
        self._publication = publication
        self._outward = observer
        self._facts = FactCounter(self._counters)
        self._requests: Requests | None = None
        self._own = _OwnGauges(self._counters, self._clock)
        self._sources: list[_SourceReader] = []
        self._windows = Windows(config) if fold else None
        self._host = host
        # The thread that folds writes the windows; whoever asks for more than is published reads them.
        self._lock = threading.Lock()
        self._known: Publication | None = None
        self._failing: set[str] = set()

    # -- what goes in -----------------------------------------------------------------------------------------------

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """`app`, with its requests counted. This process then tells about itself as a worker."""
        if self._requests is None:
            self._requests = Requests(self._counters, self._clock, endpoints_max=self._config.endpoints_max)
        return Observed(app, self._requests)

    @property
    def observer(self) -> Observer:
        """Counts the facts that the rooms report."""
        return self._facts

    @property
    def counters(self) -> Counters:
        """Where this process counts; for counters of one's own."""
        return self._counters

    def add_source(self, source: Source) -> None:
        """Ask `source` at every tick, on the loop: a cheap call that returns absolute values by name and does not
        raise.

        `memory_hits`, `memory_misses`, `remote_hits`, `remote_misses`, `entries`, `remote_entries`,
        `executions_started` and `executions_running` show in the snapshot; any other `<name>_total` is exported as a
        counter, any other name as a gauge. A counter that starts again from zero goes on from where it was; several
        sources add up.
        """
        self._sources.append(_SourceReader(self._counters, source))

    # -- the loop ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Tick until cancelled. The last thing it does is to hand in what the sources say."""
        try:
            await self.tick()
            due = self._clock.monotonic()
            while True:
                # A late tick is not made up for by a hasty one.
                due = max(due, self._clock.monotonic()) + self._config.tick_s
                await self._own.wait_until(due, self._config.loop_probe_s)
                await self.tick()
        finally:
            self._hand_in()

    async def tick(self) -> None:
        """Publish what this process knows of itself; fold, or read what the folding process published."""
        if not self._counters.is_settled:
            await asyncio.to_thread(self._counters.settle)
        self._hand_in()
        await asyncio.to_thread(self._look)

    def _hand_in(self) -> None:
        gauges: dict[str, float] = {}
        for source in self._sources:
            source.read(gauges)
        for name, value in gauges.items():
            series = statistic(name).series
            self._counters.gauge(series.name, **dict(series.labels)).set(value)
        if self._requests is not None:
            self._own.publish(self._requests.in_flight)

    def _look(self) -> None:
        """What a tick does in its thread."""
        step = "read" if self._windows is None else "fold"
        try:
            self._counters.settle()
            if self._requests is not None:
                self._own.measure()
            if self._windows is not None:
                self._fold(self._windows)
            elif self._publication is not None:
                self._known = self._publication.publication()
        except (CountersUnusable, OSError) as error:
            # Out of file descriptors or of memory: that passes, and the next tick may do better.
            self._failed(step, error.message if isinstance(error, CountersUnusable) else str(error))
            return
        self._failing.discard(step)
        if self._windows is not None:
            self._publish()

    def _fold(self, windows: Windows) -> None:
        if self._host is None:
            self._host = HostProbe(self._clock)
        folded, host = self._counters.fold(), self._host.read()
        at, wall = self._clock.monotonic(), self._clock.wall()
        with self._lock:
            steps = windows.steps
            windows.advance(at, wall, digest(folded), lags(folded), host)
            window = windows.window()
            if window is None:
                return  # what was known stays known, with its time on it
            snapshot = snapshot_of(window, folded, host, wall)
            if self._known is not None and windows.steps == steps:
                points, summaries = self._known.points, self._known.summaries
            else:
                points = tuple(windows.points(HOUR_MINUTES))
                summaries = tuple(_summary(windows, minutes, wall) for minutes in self._config.summary_minutes)
        self._known = Publication(snapshot, points, summaries)

    def _publish(self) -> None:
        known = self._known
        if self._publication is None or known is None:
            return
        try:
            self._publication.write(known.snapshot, known.points, known.summaries)
            self._failing.discard("publish")
        except OSError as error:
            self._failed("publish", f"{self._publication.path}: {error.strerror}")

    def _failed(self, step: str, reason: str) -> None:
        """Tell a failure once, not at each tick that it lasts."""
        if step not in self._failing:
            self._failing.add(step)
            event = MonitorFailed(step=step, reason=reason)
            self._facts.on(event)
            self._outward.on(event)

    def close(self) -> None:
        """Close the counters if this monitor made them; `run` must have ended."""
        if self._owns_counters:
            self._counters.close()

    # -- what comes out ---------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot | None:
        """What is true now, over all processes; None before the second tick. `at` says how old it is."""
        return None if self._known is None else self._known.snapshot

    def history(self, minutes: int = HOUR_MINUTES) -> list[Point]:
        """The last minutes in steps, oldest first, finest where they are kept for so long. Gaps have no points.

        Where another process folds, at most an hour.
        """
        known = self._known
        if known is None:
            return []
        if minutes > HOUR_MINUTES and self._windows is not None:
            with self._lock:
                return self._windows.points(minutes)
        begin = known.snapshot.at - minutes * MINUTE_S
        return [point for point in known.points if point.at > begin]

    def summary(self, minutes: int = HOUR_MINUTES) -> Summary:
        """The last minutes in one. Where another process folds, of the published spans the one that fits best.

        `covered_s` says how much of the time was watched.
        """
        known = self._known
        published = () if known is None else known.summaries
        for summary in published:
            if summary.minutes == minutes:
                return summary
        if self._windows is not None:
            with self._lock:
                return _summary(self._windows, minutes, self._clock.wall())
        longer = [summary for summary in published if summary.minutes > minutes]
        if published:
            return longer[0] if longer else published[-1]
        return summary_of(minutes, None, (0.0, {}), self._clock.wall())

    async def metrics(self, accept: str = "") -> tuple[str, bytes]:
        """The content type and the body of an answer to a Prometheus scrape, for all processes."""
        content_type = negotiate(accept)
        return content_type, await asyncio.to_thread(lambda: exposition(self._counters.fold(), content_type))


def _summary(windows: Windows, minutes: int, at: float) -> Summary:
    return summary_of(minutes, windows.over(minutes), windows.endpoints_over(minutes), at)


class _OwnGauges:
    """What a worker tells of itself."""

    def __init__(self, counters: Counters, clock: Clock) -> None:
        self._counters = counters
        self._clock = clock
        self._probe: ProcessProbe | None = None
        self._started_at: float | None = None
        self._lag_s = 0.0

    async def wait_until(self, due: float, probe_s: float) -> None:
        """Sleep in small naps, and see by how much each one overslept: by so much the loop was busy elsewhere."""
        clock = self._clock
        self._lag_s = 0.0
        while (now := clock.monotonic()) < due:
            nap = min(probe_s, due - now)
            await clock.sleep(nap)
            self._lag_s = max(self._lag_s, clock.monotonic() - now - nap)

    def publish(self, in_flight: int) -> None:
        """What the loop knows."""
        if self._started_at is None:
            self._started_at = self._clock.wall()
        self._counters.gauge(WORKER_START).set(self._started_at)
        self._counters.gauge(WORKER_IN_FLIGHT).set(float(in_flight))
        self._counters.gauge(WORKER_LAG).set(self._lag_s)

    def measure(self) -> None:
        """What has to be asked of the system, in a thread."""
        if self._probe is None:
            self._probe = ProcessProbe(self._clock)
        now = self._probe.read()
        if now.cpu_ratio is not None:
            self._counters.gauge(WORKER_CPU).set(now.cpu_ratio)
        if now.memory_bytes is not None:
            self._counters.gauge(WORKER_MEMORY).set(float(now.memory_bytes))


class _SourceReader:
    """Turns the absolute values of one source into steps of counters."""

    def __init__(self, counters: Counters, source: Source) -> None:
        self._counters = counters
        self._source = source
        self._last: dict[str, int] = {}

    def read(self, gauges: dict[str, float]) -> None:
        """Ask once; counters are added to, gauges are added up in `gauges`."""
        for name, value in self._source().items():
            kind, series = statistic(name)
            if kind != COUNTER:
                gauges[name] = gauges.get(name, 0.0) + value
                continue
            now, last = int(value), self._last.get(name, 0)
            self._counters.counter(series.name, **dict(series.labels)).add(now - last if now >= last else now)
            self._last[name] = now
