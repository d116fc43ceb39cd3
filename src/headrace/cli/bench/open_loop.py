"""Open-loop, constant-rate HTTP/1.1 load on the running event loop.

Intuition: the requests form one line, and two numbers say where each of them is. Below `_next` it was sent (or has
failed), from `_next` to `_due` it waits for a connection, from `_due` on it is not due yet. A request that is due goes
out at once on an idle keep-alive connection; when there is none it waits its turn, and the waiting counts. So a stall
of the server shows in every request that it made wait, not only in the few that were in flight. To miss the others is
called *coordinated omission*; the remedy is wrk2's, by G. Tene.
"""

import asyncio
import time
from array import array
from collections import Counter, deque
from typing import cast

from headrace.cli.bench.alarm import Alarm
from headrace.cli.bench.distribution import distribution, histogram
from headrace.cli.bench.http1 import Endpoint, ResponseParser
from headrace.cli.bench.load import LAG_MS_MAX, LoadReport, LoadSpec, request_factory
from headrace.cli.bench.schedule import Schedule
from headrace.clock import Clock, SystemClock
from headrace.errors import BenchFailed

EXPIRY_INTERVAL_S = 0.05
"""How often time-outs are looked for; a request may live longer than its time-out by this much."""
RECONNECT_DELAY_S_MAX = 1.0


class Connection(asyncio.Protocol):
    """One keep-alive connection; reused as the protocol of each transport that follows a lost one."""

    __slots__ = ("_load", "_parser", "answers", "closed", "due", "index", "sent", "transport")

    def __init__(self, load: "Load") -> None:
        self._load = load
        self._parser = ResponseParser()
        self.transport: asyncio.Transport | None = None
        self.closed = asyncio.Event()
        self.answers = 0
        self.index = -1
        """The request in flight; -1 for none."""
        self.due = 0.0
        self.sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Join those that can take a request."""
        self.transport = cast("asyncio.Transport", transport)
        self._parser.reset()
        self.closed.clear()
        self.answers = 0
        self._load.opened(self)

    def data_received(self, data: bytes) -> None:
        """Feed the parser; a complete answer frees this connection for the next request."""
        if self.index < 0:
            self.abort()  # bytes that nobody asked for cannot be told from the next answer
            return
        try:
            complete = self._parser.feed(data)
        except BenchFailed:
            self._load.failed(self, "protocol")
            self.abort()
            return
        if complete:
            self.answers += 1
            self._load.answered(self, self._parser.status, reusable=self._parser.keep_alive)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count the request in flight, unless the end of the connection is the end of its answer."""
        self.transport = None
        if self.index >= 0:
            if exc is None and self._parser.finish():
                self.answers += 1
                self._load.answered(self, self._parser.status, reusable=False)
            else:
                self._load.failed(self, "disconnect")
        self._load.lost(self)
        self.closed.set()

    def abort(self) -> None:
        """Close without waiting for anything."""
        if self.transport is not None:
            self.transport.abort()


class Load:
    """One run. All state is touched from the event loop only."""

    def __init__(self, spec: LoadSpec, *, clock: Clock | None = None) -> None:
        self._spec = spec
        self._clock = clock or SystemClock()
        self._now = self._clock.monotonic
        self._endpoint = Endpoint.parse(spec.url)
        self._request = request_factory(spec, self._endpoint)
        self._connections = [Connection(self) for _ in range(spec.connections)]
        # First in, first out: the load spreads evenly over connections, and so over the server's processes.
        self._idle: deque[Connection] = deque()
        self._open = 0
        self._given_up = 0
        self._connects = 0
        self._refused = False
        """Whether the latest attempt to connect failed: what a request without any connection is waiting for."""
        self._settled = asyncio.Event()
        self._finished = asyncio.Event()
        self._schedule = Schedule(start=0.0, rate_per_s=spec.rate_per_s, count=spec.count)
        self._due = 0
        """Requests below this index are known to be due."""
        self._next = 0
        """Requests below this index were sent or have failed; from here to `_due` they wait."""
        self._next_at = 0.0
        self._unfinished = spec.count
        self._expire_at = 0.0
        self._ok = 0
        self._ok_in_time = 0
        self._errors: Counter[str] = Counter()
        self._statuses: Counter[int] = Counter()
        self._latencies_ms = array("d")
        self._services_ms = array("d")
        self._lags_ms = array("d")
        self._cpu_s = 0.0
        """CPU time of this process: when the first request that counts became due, then what was spent since."""
        self._wall_s = 1.0

    async def run(self) -> LoadReport:
        """Send everything that is due and wait for its end, at most `spec.duration_s_max` seconds."""
        alarm = Alarm(asyncio.get_running_loop(), self._tick)
        async with asyncio.TaskGroup() as tasks:
            keepers = [tasks.create_task(self._keep_open(connection)) for connection in self._connections]
            try:
                await self._wait_until_settled()
                self._begin(alarm)
                # Bounded by `_expire`: no request outlives its time-out.
                await self._finished.wait()
            finally:
                alarm.close()
                for keeper in keepers:
                    keeper.cancel()
                for connection in self._connections:
                    connection.abort()
        return self._report()

    # -- connections ----------------------------------------------------------------------------------------------

    async def _keep_open(self, connection: Connection) -> None:
        """Open the connection, and again when it is lost: at growing intervals, within the limit of attempts."""
        loop = asyncio.get_running_loop()
        attempts = 0
        while attempts < self._spec.connect_attempts_max:
            if attempts:
                await self._clock.sleep(min(RECONNECT_DELAY_S_MAX, 0.025 * 2.0 ** min(attempts, 10)))
            attempts += 1
            try:
                async with asyncio.timeout(self._spec.connect_timeout_s):
                    await loop.create_connection(lambda: connection, self._endpoint.host, self._endpoint.port)
            except (OSError, TimeoutError):
                self._refused = True
                continue
            self._connects += 1
            await connection.closed.wait()
            if connection.answers:
                attempts = 0
        self._given_up += 1
        self._settle()

    async def _wait_until_settled(self) -> None:
        """Until every connection is open or given up; a server that takes only some of them gets its load on those."""
        try:
            async with asyncio.timeout(self._spec.connect_timeout_s):
                await self._settled.wait()
        except TimeoutError:
            return

    def _settle(self) -> None:
        if self._open + self._given_up == len(self._connections):
            self._settled.set()

    def opened(self, connection: Connection) -> None:
        """A connection can take a request."""
        self._open += 1
        self._refused = False
        self._idle.append(connection)
        self._settle()
        if self._next < self._due:
            self._send_waiting(self._now())

    def lost(self, connection: Connection) -> None:
        """A connection is gone; its keeper sees to the next one."""
        self._open -= 1
        if connection in self._idle:
            self._idle.remove(connection)

    # -- requests -------------------------------------------------------------------------------------------------

    def _begin(self, alarm: Alarm) -> None:
        self._alarm = alarm
        self._cpu_s = time.process_time()
        if not self._open:
            # Nobody listens: say so at once instead of offering load to nothing for the whole schedule.
            self._due = self._next = self._spec.count
            for index in range(self._spec.count):
                self._count_failure(index, "connect", waited_s=0.0)
            return
        self._schedule = Schedule(start=self._now(), rate_per_s=self._spec.rate_per_s, count=self._spec.count)
        self._tick()

    def _tick(self) -> None:
        """The alarm rang: release what is due, fail what has expired, set the alarm for what comes next."""
        now = self._now()
        if now >= self._next_at:
            self._release(now)
        if now >= self._expire_at:
            self._expire(now)
        if not self._finished.is_set():
            self._alarm.set(min(self._next_at, self._expire_at) - self._now())

    def _release(self, now: float) -> None:
        schedule = self._schedule
        due = schedule.due(now)
        counted = self._spec.warmup_count
        if self._due <= counted < due:
            self._cpu_s = time.process_time()
        start, rate, lag = schedule.start, schedule.rate_per_s, self._lags_ms.append
        for index in range(max(self._due, counted), due):
            lag((now - start - index / rate) * 1e3)
        self._due = due
        self._next_at = schedule.intended(due)
        self._send_waiting(now)

    def _send_waiting(self, now: float) -> None:
        idle, due, index = self._idle, self._due, self._next
        start, rate, request = self._schedule.start, self._schedule.rate_per_s, self._request
        while index < due and idle:
            connection = idle.popleft()
            transport = connection.transport
            if transport is None or transport.is_closing():
                continue
            connection.index = index
            connection.due = start + index / rate
            connection.sent = now
            transport.write(request(index))
            index += 1
        self._next = index

    def answered(self, connection: Connection, status: int, *, reusable: bool) -> None:
        """A complete answer came: count it and give the connection its next request."""
        now = self._now()
        if connection.index >= self._spec.warmup_count:
            self._statuses[status] += 1
            if 200 <= status < 300:
                self._latencies_ms.append((now - connection.due) * 1e3)
                self._ok += 1
                self._ok_in_time += now <= self._schedule.end
            else:
                self._errors["status"] += 1
                self._latencies_ms.append(max(now - connection.due, self._spec.timeout_s) * 1e3)
            self._services_ms.append((now - connection.sent) * 1e3)
        connection.index = -1
        self._count_down()
        if reusable:
            self._idle.append(connection)
        else:
            connection.abort()
        if now >= self._next_at:
            self._release(now)
        elif self._next < self._due:
            self._send_waiting(now)

    def failed(self, connection: Connection, kind: str) -> None:
        """The request in flight will not be answered."""
        self._count_failure(connection.index, kind, waited_s=self._now() - connection.due)
        connection.index = -1

    def _expire(self, now: float) -> None:
        """Fail what is older than the time-out; whoever still waits after all connections are given up fails too."""
        self._expire_at = now + EXPIRY_INTERVAL_S
        timeout_s = self._spec.timeout_s
        abandoned = self._given_up == len(self._connections)
        waited_for = "connect" if self._refused and not self._open else "timeout"
        if abandoned:
            self._due, self._next_at = self._spec.count, float("inf")
        while self._next < self._due and (abandoned or self._schedule.intended(self._next) + timeout_s <= now):
            index = self._next
            self._next += 1
            self._count_failure(index, waited_for, waited_s=now - self._schedule.intended(index))
        for connection in self._connections:
            if connection.index >= 0 and connection.due + timeout_s <= now:
                self.failed(connection, "timeout")
                connection.abort()

    def _count_failure(self, index: int, kind: str, *, waited_s: float) -> None:
        if index >= self._spec.warmup_count:
            self._errors[kind] += 1
            self._latencies_ms.append(max(waited_s, self._spec.timeout_s) * 1e3)
        self._count_down()

    def _count_down(self) -> None:
        self._unfinished -= 1
        if not self._unfinished:
            self._cpu_s = time.process_time() - self._cpu_s
            self._wall_s = self._now() - self._schedule.intended(self._spec.warmup_count)
            self._finished.set()

    # -- the result -----------------------------------------------------------------------------------------------

    def _report(self) -> LoadReport:
        spec = self._spec
        requests = spec.count - spec.warmup_count
        lag_ms = distribution(self._lags_ms) if self._lags_ms else None
        return LoadReport(
            method=spec.method,
            path=spec.path,
            connections=spec.connections,
            offered_per_s=spec.rate_per_s,
            achieved_per_s=self._ok_in_time / spec.seconds,
            requests=requests,
            ok=self._ok,
            errors=dict(self._errors),
            statuses=dict(self._statuses),
            latency_ms=distribution(self._latencies_ms),
            service_ms=distribution(self._services_ms) if self._services_ms else None,
            lag_ms=lag_ms,
            histogram_ms=histogram(self._latencies_ms),
            reconnects=max(0, self._connects - spec.connections),
            cpu_us_per_request=self._cpu_s / requests * 1e6,
            cpu_share=self._cpu_s / self._wall_s,
            generator_bound=lag_ms is not None and lag_ms.p99 > LAG_MS_MAX,
        )
