"""What a load run is asked and what it answers, and the process that it runs in.

Request `i` is due at `start + i / rate` whatever the server does, and its latency counts from then (see
`headrace.cli.bench.open_loop`, which does the work). A failed request enters the distribution as slow as it could have
been, never less than its time-out, so that errors cannot make a percentile look better.

The generator watches itself: `lag_ms` is how late it noticed that requests were due, which no server can cause. A run
whose p99 lag passes `LAG_MS_MAX` is `generator_bound`: its latencies are upper bounds, not the server's own.
"""

import asyncio
import sys
from collections.abc import Callable

import msgspec

from headrace.cli.bench.distribution import Distribution
from headrace.cli.bench.http1 import Endpoint, request_bytes
from headrace.errors import BenchFailed, ConfigError

SEQUENCE = "{sequence}"
"""Stands in a path or body for the twelve-digit number of the request, unique within the run."""
LAG_MS_MAX = 10.0
"""A tenth of the strictest response-time target (100 ms)."""
REQUESTS_MAX = 20_000_000
"""A sample is held whole: three doubles a request."""
GENERATOR_START_S_MAX = 20.0
"""Importing, and writing the report, on a machine that the load has saturated."""
_PLACE = "\0" * 12


class LoadSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to send, how fast and for how long."""

    url: str
    """`http://host:port` of the server."""
    path: str
    """Path and query; may contain `{sequence}`."""
    method: str = "GET"
    """HTTP method."""
    body: str | None = None
    """JSON body; may contain `{sequence}`."""
    headers: dict[str, str] = {}
    """Further headers; may hold a token, so this travels over stdin, never in an argument."""
    rate_per_s: float
    """Requests a second, offered whatever the server does."""
    seconds: float
    """Length of the part that is measured."""
    warmup_s: float = 1.0
    """The same load before that, not counted."""
    connections: int = 128
    """Keep-alive connections, one request in flight on each."""
    timeout_s: float = 10.0
    """What a request has, from its intended start to the end of its answer."""
    connect_timeout_s: float = 5.0
    """What a connection has to open, and what the first ones have altogether before the run begins."""
    connect_attempts_max: int = 40
    """Attempts of one connection without an answered request in between, after which it is given up."""

    def __post_init__(self) -> None:
        for name in ("rate_per_s", "seconds", "connections", "timeout_s", "connect_timeout_s", "connect_attempts_max"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"`{name}` is {getattr(self, name)!r}; it must be above 0.")
        if self.warmup_s < 0:
            raise ConfigError(f"`warmup_s` is {self.warmup_s!r}; it must not be negative.")
        Endpoint.parse(self.url)
        if not self.warmup_count < self.count <= REQUESTS_MAX:
            raise ConfigError(f"{self.count} requests in one run; more than the warm-up and at most {REQUESTS_MAX}.")

    @property
    def warmup_count(self) -> int:
        """Requests that are sent before the first one that counts."""
        return round(self.rate_per_s * self.warmup_s)

    @property
    def count(self) -> int:
        """Requests in all."""
        return self.warmup_count + round(self.rate_per_s * self.seconds)

    @property
    def duration_s_max(self) -> float:
        """No run takes longer than this: connecting, the schedule, and the last request's time-out."""
        return self.connect_timeout_s + self.warmup_s + self.seconds + self.timeout_s + 1.0


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the requests that count."""

    method: str
    path: str
    connections: int
    offered_per_s: float
    achieved_per_s: float
    """2xx answers that arrived before the schedule ended, over its length."""
    requests: int
    ok: int
    errors: dict[str, int]
    """By kind: status (not 2xx), connect (no connection), disconnect (lost in flight), protocol, timeout."""
    statuses: dict[int, int]
    latency_ms: Distribution
    """From the intended start to the end of the answer; failures count at least the time-out."""
    service_ms: Distribution | None
    """From the actual start, answered requests only: what a closed-loop tool would have said. For comparison."""
    lag_ms: Distribution | None
    """From the intended start to the moment when the generator noticed it."""
    histogram_ms: dict[int, int]
    """Of `latency_ms`; see `distribution.histogram`."""
    reconnects: int
    cpu_us_per_request: float
    """CPU that the generator itself spent."""
    cpu_share: float
    """Of one core."""
    generator_bound: bool
    """The generator, not the server, may be what was slow."""

    @property
    def failed_share(self) -> float:
        """Failed requests of all requests, 0 to 1."""
        return 1.0 - self.ok / self.requests


def request_factory(spec: LoadSpec, endpoint: Endpoint) -> Callable[[int], bytes]:
    """The bytes of request `index`: always the same ones, or a template with its number filled in."""
    # The number has a fixed width, so that the Content-Length of the template is that of every request.
    body = None if spec.body is None else spec.body.replace(SEQUENCE, _PLACE).encode()
    path = spec.path.replace(SEQUENCE, _PLACE)
    whole = request_bytes(endpoint, spec.method, path, body=body, headers=spec.headers)
    parts = whole.split(_PLACE.encode())
    if len(parts) == 1:
        return lambda _: whole
    return lambda index: (b"%012d" % index).join(parts)


async def measure_load(spec: LoadSpec) -> LoadReport:
    """Run `spec` in a process of its own. BenchFailed when that does not answer within the time that it is given."""
    command = [sys.executable, "-m", "headrace.cli.bench.generator"]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        async with asyncio.timeout(spec.duration_s_max + GENERATOR_START_S_MAX):
            output, complaints = await process.communicate(msgspec.json.encode(spec))
    except TimeoutError:
        raise BenchFailed(
            f"The load generator did not finish within {spec.duration_s_max + GENERATOR_START_S_MAX:.0f} s.",
            fix="Offer a lower rate; this machine cannot even keep the generator's schedule.",
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise BenchFailed(
            f"The load generator ended with code {process.returncode}: {complaints.decode(errors='replace')[-2000:]}"
        )
    return msgspec.json.decode(output, type=LoadReport)
