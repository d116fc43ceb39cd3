"""A headrace whose facts a test writes: the real dashboard and the real live stream over a scripted monitor.

It runs on a real uvicorn in a thread, so that a browser can be driven against it, streams can be cut and the whole
server can die and come back on the same port.
"""

import asyncio
import math
import socket
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import Message, Receive, Scope, Send

from headrace.clock import SystemClock
from headrace.monitor.snapshot import Agents, Endpoint, Host, Latency, Point, Snapshot, Tier, Worker
from headrace.server.live import Live
from headrace.server.static import dashboard_app

GIB = 1024**3
STEP_S = 5.0
CLOCK = SystemClock()
WAIT_S = 30.0
GATE_S_MAX = 110.0
"""How long a gate that was forgotten holds an answer back: about as long as a test may take."""

NO_LATENCY = Latency(count=0, mean_ms=None, p50_ms=None, p95_ms=None, p99_ms=None, p999_ms=None)


def latency(count: int, p50_ms: float = 11.4) -> Latency:
    """Response times of a plausible shape; a quantile is None below its number of samples."""
    return Latency(
        count=count,
        mean_ms=None if count == 0 else p50_ms * 1.3,
        p50_ms=p50_ms if count >= 20 else None,
        p95_ms=p50_ms * 3.6 if count >= 200 else None,
        p99_ms=p50_ms * 7.4 if count >= 1_000 else None,
        p999_ms=p50_ms * 15 if count >= 10_000 else None,
    )


def wave(at: float, *, period_s: float, low: float, high: float) -> float:
    """A number that moves: a slow sine with a faster ripple on it."""
    swing = 0.8 * math.sin(2 * math.pi * at / period_s) + 0.2 * math.sin(2 * math.pi * at / (period_s / 7.3))
    return low + (high - low) * (swing + 1) / 2


def busy_endpoints(at: float, requests_per_s: float) -> tuple[Endpoint, ...]:
    """Five routes that share the load."""
    routes = [
        ("POST", "/api/v1/agents/{agent_id}/execute", 0.30, 3_100, 24.8),
        ("GET", "/api/v1/agents/{agent_id}/status", 0.56, 5_800, 3.2),
        ("GET", "/api/v1/agents", 0.08, 760, 9.1),
        ("POST", "/api/v1/agents/deploy", 0.004, 34, 61.0),
        ("GET", "/api/v1/agents/{agent_id}/executions/{execution_id}", 0.05, 480, 4.4),
    ]
    return tuple(
        Endpoint(
            method=method,
            route=route,
            requests_per_s=requests_per_s * share,
            errors_per_s=wave(at, period_s=40, low=0, high=0.6) if method == "POST" and share > 0.1 else 0.0,
            total_s=requests_per_s * share * p50_ms / 1_000 * 5,
            latency=latency(count, p50_ms),
        )
        for method, route, share, count, p50_ms in routes
    )


def busy_workers(at: float, requests_per_s: float) -> tuple[Worker, ...]:
    """Four workers that share the load."""
    return tuple(
        Worker(
            slot=slot,
            pid=41_210 + slot * 7,
            started_at=at - 8_000,
            requests_per_s=requests_per_s / 4 * (1 + 0.05 * math.sin(at / 9 + slot)),
            cpu_percent=wave(at + slot * 11, period_s=120, low=31, high=58),
            memory_bytes=int(GIB * (0.19 + 0.01 * slot)),
            loop_lag_ms=wave(at + slot * 5, period_s=31, low=0.4, high=3.8),
        )
        for slot in range(4)
    )


def busy(at: float) -> Snapshot:
    """A healthy service of four workers under moving load."""
    requests_per_s = wave(at, period_s=300, low=900, high=1_700)
    endpoints = busy_endpoints(at, requests_per_s)
    errors_per_s = endpoints[0].errors_per_s
    hits = wave(at, period_s=170, low=0.90, high=0.97)
    return Snapshot(
        at=at,
        interval_s=STEP_S,
        requests_per_s=requests_per_s,
        errors_per_s=errors_per_s,
        error_rate=errors_per_s / requests_per_s,
        connections=int(requests_per_s / 60),
        latency=latency(10_000, wave(at, period_s=210, low=8.0, high=15.0)),
        endpoints=endpoints,
        tiers=(
            Tier("memory", requests_per_s * hits * 0.9, requests_per_s * (1 - hits * 0.9), hits * 0.9, 8_400, True),
            Tier("remote", requests_per_s * hits * 0.1, requests_per_s * (1 - hits), 0.6, None, True),
        ),
        agents=Agents(
            running=int(wave(at, period_s=90, low=40, high=180)),
            started_per_s=requests_per_s * 0.3,
            completed_per_s=requests_per_s * 0.3,
            failed_per_s=0.2,
            timeouts_per_s=0.0,
            run_latency=latency(4_000, 18.0),
        ),
        workers=busy_workers(at, requests_per_s),
        host=Host(
            cpu_percent=wave(at, period_s=240, low=34, high=57),
            cpus=4.0,
            memory_bytes=int(wave(at, period_s=900, low=1.2, high=1.6) * GIB),
            memory_bytes_max=4 * GIB,
            disk_read_bytes_per_s=1.2e6,
            disk_write_bytes_per_s=3.4e6,
            network_received_bytes_per_s=2.2e6,
            network_sent_bytes_per_s=8.9e6,
        ),
    )


def idle(at: float) -> Snapshot:
    """A service that nobody has used yet: nothing to judge by, and nothing that is zero by mistake."""
    return Snapshot(
        at=at,
        interval_s=STEP_S,
        requests_per_s=0.0,
        errors_per_s=0.0,
        error_rate=None,
        connections=0,
        latency=NO_LATENCY,
        endpoints=(),
        tiers=(),
        agents=Agents(0, 0.0, 0.0, 0.0, 0.0, NO_LATENCY),
        workers=(),
        host=Host(None, 4.0, None, None, None, None, None, None),
    )


def point(snapshot: Snapshot) -> Point:
    """The snapshot as a step of the history."""
    memory = snapshot.tiers[0] if snapshot.tiers else None
    hits = sum(tier.hits_per_s for tier in snapshot.tiers)
    return Point(
        at=snapshot.at,
        requests_per_s=snapshot.requests_per_s,
        errors_per_s=snapshot.errors_per_s,
        p50_ms=snapshot.latency.p50_ms,
        p95_ms=snapshot.latency.p95_ms,
        p99_ms=snapshot.latency.p99_ms,
        hit_rate=None if memory is None else hits / (memory.hits_per_s + memory.misses_per_s),
        cpu_percent=snapshot.host.cpu_percent,
        memory_bytes=snapshot.host.memory_bytes,
        executions_per_s=snapshot.agents.completed_per_s,
    )


AGENTS: list[dict[str, Any]] = [
    {
        "agent_id": agent_id,
        "name": name,
        "version": version,
        "status": status,
        "executions": {"completed": completed, "failed": failed, "timeout": timeout},
    }
    for agent_id, name, version, status, completed, failed, timeout in [
        ("log-analyst", "Log analyst", "1.4.0", "active", 128_412, 3, 0),
        ("csv-profiler", "CSV profiler", "0.9.2", "active", 40_118, 0, 2),
        ("summariser", "Text summariser", "2.0.1", "active", 9_310, 0, 0),
        ("nightly-report", "Nightly report", "1.0.0", "failed", 211, 17, 1),
    ]
]


class Gate:
    """Closed, it holds back the answers to all who ask, with a token or without."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.asked = 0


class Scene:
    """What the server knows, to be changed by the test at any time, and the server itself."""

    def __init__(self, *, interval_s: float = 0.2) -> None:
        self.snapshot_at: Callable[[float], Snapshot] | None = busy
        """None: the monitor has not reported yet."""
        self.opened_at = CLOCK.wall()
        self.remembers_s = 3_600.0
        """How far back the monitor's history goes."""
        self.agents = list(AGENTS)
        self.token: str | None = None
        self.refusing_streams = False
        self.agents_status = 200
        self.history_status = 200
        self.agents_gate = Gate()
        self.stream_gate = Gate()
        self._silent_since: float | None = None
        self._interval_s = interval_s
        # Bound, and never listening: nobody else is given the port, and while nobody listens connections are refused.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))
        self.port: int = self._place.getsockname()[1]
        self._started = threading.Event()
        self._start()

    @property
    def url(self) -> str:
        """Where the dashboard is."""
        return f"http://127.0.0.1:{self.port}/dashboard"

    @property
    def streams(self) -> int:
        """How many pages listen to the live stream."""
        return self._live.streams

    def silence(self) -> None:
        """Let the monitor say nothing new from now on."""
        self._silent_since = CLOCK.wall()

    def speak(self) -> None:
        """Let the monitor report again."""
        self._silent_since = None

    def die(self) -> None:
        """Stop the server as a crash would look from outside: connections end, nobody listens on the port."""
        self._stop()

    def revive(self) -> None:
        """Start a new server on the same port."""
        self._start()

    def close(self) -> None:
        """End the server; safe when it is dead already."""
        self.agents_gate.open.set()
        self.stream_gate.open.set()
        self._stop()
        self._place.close()

    def _start(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", self.port))
        self._live = Live(self._snapshot, clock=CLOCK, interval_s=self._interval_s, stale_after_s=2.0)
        routes = [
            Route("/api/v1/system/live", _Gated(self.stream_gate, _Guarded(self, self._stream))),
            Route("/api/v1/system/history", _Guarded(self, self._history)),
            Route("/api/v1/agents", _Gated(self.agents_gate, _Guarded(self, self._agents))),
            Mount("/", dashboard_app()),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes), log_level="error", lifespan="off", timeout_graceful_shutdown=2
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),), name="scene")
        self._thread.start()
        if not self._started.wait(WAIT_S):
            raise RuntimeError("the scene's server did not start")

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._leave = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(self._server.serve(sockets=[self._socket]))
            self._started.set()
            await self._leave.wait()
            await self._live.close()
            self._server.should_exit = True
            await serving

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._leave.set)
            self._thread.join(WAIT_S)
            self._started.clear()
        self._socket.close()

    def _snapshot(self) -> Snapshot | None:
        if self.snapshot_at is None:
            return None
        return self.snapshot_at(self._newest_at())

    def _newest_at(self) -> float:
        return CLOCK.wall() if self._silent_since is None else self._silent_since

    def _remembered(self) -> list[Point]:
        """What a monitor that had always watched `snapshot_at` would remember."""
        if self.snapshot_at is None:
            return []
        end = self._newest_at() // STEP_S * STEP_S
        return [point(self.snapshot_at(end - STEP_S * ago)) for ago in range(int(self.remembers_s / STEP_S), -1, -1)]

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.refusing_streams:
            await Response(status_code=503, headers={"Retry-After": "15"})(scope, receive, send)
        else:
            await self._live(scope, receive, send)

    async def _history(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _json({"points": self._remembered()}, self.history_status)(scope, receive, send)

    async def _agents(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = {"agents": self.agents, "page": 1, "limit": 50, "total": len(self.agents)}
        await _json(answer, self.agents_status)(scope, receive, send)


class _Guarded:
    """Asks for the scene's token, when it has one, as the real server does."""

    def __init__(self, scene: Scene, app: Callable[[Scope, Receive, Send], Any]) -> None:
        self._scene = scene
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        token = self._scene.token
        if token is not None and Request(scope).headers.get("authorization") != f"Bearer {token}":
            await Response(status_code=401, headers={"WWW-Authenticate": "Bearer"})(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class _Gated:
    """Holds back what the app answers until the gate is open."""

    def __init__(self, gate: Gate, app: Callable[[Scope, Receive, Send], Any]) -> None:
        self._gate = gate
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def late(message: Message) -> None:
            if not self._gate.open.is_set():
                await asyncio.to_thread(self._gate.open.wait, GATE_S_MAX)
            await send(message)

        self._gate.asked += 1
        await self._app(scope, receive, late)


def _json(answer: dict[str, Any], status: int) -> Response:
    return Response(msgspec.json.encode(answer), status, media_type="application/json")
