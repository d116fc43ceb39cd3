"""The monitor as a whole: one process that sees itself, and several of which one folds."""

import asyncio

import pytest

from headrace.events import ExecutionFinished, MonitorFailed, TierUnavailable
from headrace.monitor import Counters, Monitor, MonitorConfig, Series, SnapshotFile
from headrace.monitor.host import HostProbe
from headrace.testing import FakeClock


class Heard:
    def __init__(self):
        self.events = []

    def on(self, event):
        self.events.append(event)


async def greet(scope, receive, send):
    scope["headrace.route"] = "/greet"
    await send({"type": "http.response.start", "status": 500 if scope["path"] == "/broken" else 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


async def ask(app, path="/greet"):
    async def nothing(message=None):
        return None

    await app({"type": "http", "method": "GET", "path": path}, nothing, nothing)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def shared(tmp_path):
    """Counters of several processes, opened before any loop runs."""
    opened = [Counters.open(tmp_path / "counters") for _ in range(3)]
    yield opened
    for counters in opened:
        counters.close()


@pytest.fixture
def monitors(clock, tmp_path):
    made = []

    def make(config=None, **options):
        made.append(Monitor(config or MonitorConfig(), clock=clock, **options))
        return made[-1]

    yield make
    for monitor in made:
        monitor.close()
        monitor.counters.close()


async def watch(monitor, clock, seconds, each_second=None):
    """Let the monitor tick once a second."""
    for _ in range(seconds):
        clock.advance(1.0)
        if each_second is not None:
            await each_second()
        await monitor.tick()


async def test_at_first_nothing_is_known(monitors, clock):
    """Before the second tick there is no snapshot, no history and an empty summary, and no zero that means unknown."""
    monitor = monitors()
    assert monitor.snapshot() is None
    assert monitor.history() == []
    assert monitor.summary().covered_s == 0.0

    await monitor.tick()

    assert monitor.snapshot() is None


async def test_requests_show_in_the_snapshot(monitors, clock):
    """Ten answers a second of which one fails, for ten seconds."""
    monitor = monitors()
    app = monitor.middleware(greet)

    async def load():
        for number in range(10):
            await ask(app, "/broken" if number == 0 else "/greet")

    await monitor.tick()
    await watch(monitor, clock, 10, load)
    snapshot = monitor.snapshot()

    assert snapshot.at == clock.wall()
    assert (snapshot.interval_s, snapshot.requests_per_s, snapshot.error_rate) == (10.0, 10.0, 0.1)
    (endpoint,) = snapshot.endpoints
    assert (endpoint.method, endpoint.route, endpoint.errors_per_s, endpoint.latency.count) == (
        "GET",
        "/greet",
        1.0,
        100,
    )
    (worker,) = snapshot.workers
    assert worker.requests_per_s == 10.0
    assert worker.memory_bytes > 1_000_000
    assert worker.cpu_percent is not None
    assert snapshot.host.memory_bytes > 0


async def test_history_and_summary_tell_what_was(monitors, clock):
    """Twelve steps of five seconds make a minute; the summary adds them up."""
    monitor = monitors()
    app = monitor.middleware(greet)
    await monitor.tick()
    await watch(monitor, clock, 60, lambda: ask(app))

    history, summary = monitor.history(), monitor.summary(60)

    assert [point.requests_per_s for point in history] == [1.0] * 12
    assert history[-1].at == clock.wall()
    assert len(monitor.history(minutes=1)) == 12
    assert (summary.requests, summary.covered_s, summary.latency.count) == (60, 60.0, 60)
    assert [endpoint.requests_per_s for endpoint in summary.endpoints] == [1.0]
    assert monitor.summary(7).requests == 60
    assert len(monitor.history(minutes=10_000)) == 12


async def test_requests_in_flight_are_told_while_they_last(monitors, clock):
    """Three requests that wait are three connections, and none once they are answered."""
    monitor, gate = monitors(), asyncio.Event()

    async def slow(scope, receive, send):
        await gate.wait()
        await greet(scope, receive, send)

    app = monitor.middleware(slow)
    await monitor.tick()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(ask(app))
        await asyncio.sleep(0)
        await watch(monitor, clock, 1)
        assert monitor.snapshot().connections == 3
        gate.set()
    await watch(monitor, clock, 1)

    assert monitor.snapshot().connections == 0


async def test_a_process_that_serves_nothing_is_no_worker(monitors, clock):
    """The controller folds and does not list itself among those that serve."""
    monitor = monitors()
    await monitor.tick()
    await watch(monitor, clock, 1)

    assert monitor.snapshot().workers == ()


async def test_sources_are_asked_at_every_tick(monitors, clock):
    """Absolute values become steps: what was there before the first tick counts, and a restart from zero goes on."""
    monitor = monitors()
    values = {"memory_hits": 100.0, "memory_misses": 50.0, "entries": 7.0, "pool_waits_total": 3.0, "pool_size": 2.5}
    monitor.add_source(lambda: values)
    await monitor.tick()
    values.update(memory_hits=130.0, memory_misses=60.0, entries=9.0)
    await watch(monitor, clock, 1)

    (tier,) = monitor.snapshot().tiers
    assert (tier.tier, tier.hits_per_s, tier.misses_per_s, tier.hit_rate, tier.entries) == (
        "memory",
        30.0,
        10.0,
        0.75,
        9,
    )
    values.update(memory_hits=4.0)
    await watch(monitor, clock, 1)
    counters = monitor.counters.fold().counters
    assert counters[Series("headrace_cache_hits_total", (("tier", "memory"),))] == 134
    assert counters[Series("headrace_pool_waits_total")] == 3


async def test_several_sources_add_up(monitors, clock):
    """Two caches in one process are one cache to those who look from outside."""
    monitor = monitors()
    for hits, entries in ((10.0, 3.0), (5.0, 4.0)):
        monitor.add_source(lambda hits=hits, entries=entries: {"memory_hits": hits, "entries": entries})
    await monitor.tick()
    await watch(monitor, clock, 1)

    assert monitor.snapshot().tiers[0].entries == 7
    assert monitor.counters.fold().counters[Series("headrace_cache_hits_total", (("tier", "memory"),))] == 15


async def test_facts_show_in_the_snapshot(monitors, clock):
    """Executions by their ending, and a tier that cannot be reached."""
    monitor = monitors()
    monitor.add_source(lambda: {"remote_hits": 1, "remote_misses": 1, "executions_running": 5})
    await monitor.tick()
    monitor.observer.on(TierUnavailable(tier="remote", reason="refused"))
    for status in ("completed", "completed", "timeout", "failed"):
        monitor.observer.on(ExecutionFinished("a", "1", "e", status=status, queue_ms=0.0, run_ms=5.0))
    await watch(monitor, clock, 1)

    snapshot = monitor.snapshot()
    agents = snapshot.agents
    assert (agents.completed_per_s, agents.timeouts_per_s, agents.failed_per_s, agents.running) == (2.0, 1.0, 1.0, 5)
    assert not snapshot.tiers[0].available


async def test_the_loop_ticks_and_hands_in_what_it_knows_at_the_end(monitors, clock):
    """`run` makes snapshots by itself, and its cancellation loses nothing that the sources still had to say."""
    monitor = monitors()
    values = {"memory_hits": 0.0}
    monitor.add_source(lambda: values)
    task = asyncio.get_running_loop().create_task(monitor.run())
    async with asyncio.timeout(30):
        while monitor.snapshot() is None:
            await clock.run_for(0.1)
            await asyncio.sleep(0.001)

    values["memory_hits"] = 42.0
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert sum(monitor.counters.fold().counters.values()) == 42


async def test_a_late_loop_is_noticed(monitors, clock):
    """A call that keeps the loop busy for 300 ms makes the worker's lag at least that."""
    monitor = monitors()
    monitor.middleware(greet)
    task = asyncio.get_running_loop().create_task(monitor.run())
    lag = 0.0
    async with asyncio.timeout(30):
        while not lag:
            # Between two turns of the loop more time goes by than the nap that is due.
            clock.advance(0.4)
            await asyncio.sleep(0.001)
            snapshot = monitor.snapshot()
            lag = snapshot.workers[0].loop_lag_ms if snapshot is not None and snapshot.workers else 0.0
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert lag > 299.0


async def test_workers_serve_what_the_folding_process_publishes(monitors, shared, clock, tmp_path):
    """Two workers count, a controller folds; all three tell the same, and any of them answers for all."""
    file = tmp_path / "snapshot"
    controller = monitors(counters=shared[2], publication=SnapshotFile(file))
    workers = [monitors(counters=counters, fold=False, publication=SnapshotFile(file)) for counters in shared[:2]]
    apps = [worker.middleware(greet) for worker in workers]
    for monitor in (*workers, controller):
        await monitor.tick()
    for _ in range(10):
        clock.advance(1.0)
        for number, app in enumerate(apps):
            for _ in range(1 + number):
                await ask(app)
        for monitor in (*workers, controller):
            await monitor.tick()
    for worker in workers:
        await worker.tick()

    snapshot = controller.snapshot()
    assert snapshot.requests_per_s == 3.0
    assert sorted(worker.requests_per_s for worker in snapshot.workers) == [1.0, 2.0]
    for worker in workers:
        assert worker.snapshot() == snapshot
        assert worker.history() == controller.history()
        assert worker.summary(15) == controller.summary(15)
        assert worker.summary(7) == controller.summary(15), "of the published spans, the next longer one"
        assert worker.summary(600) == controller.summary(60), "or the longest"
    answers = [await monitor.metrics() for monitor in (*workers, controller)]
    for _, body in answers:
        assert b'headrace_http_requests_total{method="GET",route="/greet",status="2xx"} 30\n' in body


async def test_a_worker_without_a_publication_knows_nothing(monitors, clock, tmp_path):
    """As long as nobody folds, a worker says that it does not know."""
    monitor = monitors(fold=False, publication=SnapshotFile(tmp_path / "snapshot"))
    await monitor.tick()

    assert (monitor.snapshot(), monitor.history(), monitor.summary(5).covered_s) == (None, [], 0.0)


async def test_a_failing_publication_is_told_once_and_does_not_stop_the_fold(monitors, clock, tmp_path):
    """With the directory gone the snapshot goes on; the failure is a fact, and so is the next one after a success."""
    heard, directory = Heard(), tmp_path / "run"
    monitor = monitors(publication=SnapshotFile(directory / "snapshot"), observer=heard)
    await monitor.tick()
    await watch(monitor, clock, 3)
    assert monitor.snapshot().at == clock.wall()
    assert [(event.step, type(event)) for event in heard.events] == [("publish", MonitorFailed)]
    assert "No such file or directory" in heard.events[0].reason

    directory.mkdir()
    await watch(monitor, clock, 2)
    published = await asyncio.to_thread(SnapshotFile(directory / "snapshot").read)
    assert published[0] == monitor.snapshot()
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    await watch(monitor, clock, 2)

    assert len(heard.events) == 2
    events = {
        s.label("type"): n for s, n in monitor.counters.fold().counters.items() if s.name == "headrace_events_total"
    }
    assert events == {"MonitorFailed": 2}


async def test_a_failing_fold_is_told_once_and_tried_again(monitors, shared, clock, monkeypatch):
    """When the counters cannot be read the last snapshot stays, and the next tick may do better."""
    heard = Heard()
    monitor = monitors(counters=shared[0], observer=heard)
    await monitor.tick()
    await watch(monitor, clock, 2)
    before = monitor.snapshot()
    with monkeypatch.context() as broken:
        broken.setattr("headrace.monitor.slot_file.SlotFile._read_once", lambda _file: None)
        await watch(monitor, clock, 2)
        assert monitor.snapshot() == before
        assert [event.step for event in heard.events] == ["fold"]

    await watch(monitor, clock, 1)

    assert monitor.snapshot().at == clock.wall()
    assert len(heard.events) == 1


async def test_the_last_snapshot_stays_after_a_gap(monitors, clock):
    """When the totals went back nothing is known of the interval; what was known keeps its time."""
    file = Counters.open(None)
    monitor = monitors(counters=file)
    file.counter("headrace_agent_executions_total", status="completed").add(5)
    await monitor.tick()
    await watch(monitor, clock, 2)
    before = monitor.snapshot()
    file._identity += 1

    await watch(monitor, clock, 1)
    assert monitor.snapshot() == before
    await watch(monitor, clock, 1)

    assert monitor.snapshot().at == clock.wall()
    assert monitor.snapshot().interval_s == 1.0


async def test_metrics_are_negotiated(monitors, clock):
    """Text by default, OpenMetrics for who asks for it."""
    monitor = monitors(host=HostProbe(clock))
    await monitor.tick()

    text, openmetrics = await monitor.metrics(), await monitor.metrics("application/openmetrics-text; version=1.0.0")

    assert text[0].startswith("text/plain; version=0.0.4")
    assert openmetrics[0].startswith("application/openmetrics-text; version=1.0.0")
    assert openmetrics[1].endswith(b"# EOF\n")


def test_a_monitor_closes_only_the_counters_that_it_made(clock):
    """Counters that were handed in belong to whoever made them."""
    counters = Counters.open(None)
    Monitor(clock=clock, counters=counters).close()
    own = Monitor(clock=clock)
    own.close()

    counters.counter("x_total").add()

    assert counters.fold().counters == {Series("x_total"): 1}
    counters.close()
