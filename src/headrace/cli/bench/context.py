"""What a scenario gets: a server, load, a client, and a place to say what it is doing."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec

from headrace.cli.bench.client import Client, authorization
from headrace.cli.bench.load import LoadReport, LoadSpec, measure_load
from headrace.clock import Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """How to measure."""

    rounds: int = 3
    """How often each case is measured; the median counts."""
    seconds: float = 5.0
    """Length of one measurement under load."""
    warmup_s: float = 1.0
    """The same load before each measurement, not counted."""
    connections: int = 128
    """Keep-alive connections of the load generator."""
    workers: int = 2
    """Worker processes of the server that is started."""
    url: str | None = None
    """A running server to measure instead of starting one."""
    token: str | None = field(default=None, repr=False)
    """What that server wants in `Authorization: Bearer`."""


class LoadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The evidence behind measurements: one run of the load generator."""

    scenario: str
    case: str
    report: LoadReport


@dataclass(slots=True, kw_only=True)
class Context:
    """The world of one scenario."""

    scenario: str
    """Its name."""
    config: BenchConfig
    """How to measure."""
    clock: Clock
    """For timing single requests."""
    run_id: str
    """Unique to this run of `headrace bench`; goes into the ids of agents."""
    server: Callable[[], Awaitable[str]]
    """The URL of the server under test, which starts when it is first asked for."""
    say: Callable[[str], None]
    """Shows what is being done now."""
    records: list[LoadRecord]
    """Where every load report is kept."""

    async def client(self) -> Client:
        """A client of the server under test, not yet connected."""
        return Client(await self.server(), clock=self.clock, token=self.config.token)

    async def load(
        self,
        case: str,
        path: str,
        *,
        rate_per_s: float,
        method: str = "GET",
        body: str | None = None,
        seconds: float | None = None,
    ) -> LoadReport:
        """Offer this load to the server under test, from a process of its own, and record what came of it."""
        config = self.config
        spec = LoadSpec(
            url=await self.server(),
            method=method,
            path=path,
            body=body,
            headers=authorization(config.token),
            rate_per_s=rate_per_s,
            seconds=config.seconds if seconds is None else seconds,
            warmup_s=config.warmup_s,
            connections=config.connections,
        )
        report = await measure_load(spec)
        self.records.append(LoadRecord(scenario=self.scenario, case=case, report=report))
        return report
