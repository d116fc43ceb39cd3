"""Memory of the server under test."""

import asyncio
import ipaddress

import psutil

from headrace.cli.bench.agents import deploy
from headrace.cli.bench.api import EXECUTE_BODY
from headrace.cli.bench.context import Context
from headrace.cli.bench.http1 import Endpoint
from headrace.cli.bench.scenario import Measurement, Scenario
from headrace.cli.bench.targets import SERVER_MEMORY
from headrace.errors import BenchFailed

LOAD_PER_S = 2_000
SNAPSHOT_S_MAX = 20.0
GB = 1e9


async def measure_memory(context: Context) -> list[Measurement]:
    """What the worker processes hold after they have executed under load."""
    if not _is_local(await context.server()):
        return [_unmeasured("the server runs on another machine")]
    agent_id = f"bench-{context.run_id}-memory"
    async with await context.client() as client:
        await deploy(client, agent_id)
    rounds: list[tuple[float, float | None]] = []
    workers = 0
    for number in range(context.config.rounds):
        context.say(f"round {number + 1} of {context.config.rounds}: {LOAD_PER_S:,} executions/s")
        path = f"/api/v1/agents/{agent_id}/execute"
        await context.load("load", path, rate_per_s=LOAD_PER_S, method="POST", body=EXECUTE_BODY)
        pids = await _worker_pids(context)
        try:
            rounds.append(await asyncio.to_thread(_memory_gb, pids))
        except psutil.Error as error:
            return [_unmeasured(f"the worker processes cannot be looked at: {error}")]
        workers = len(pids)
    case = f"{workers} worker{'s' if workers > 1 else ''} after load"
    pss = tuple(pss for _, pss in rounds if pss is not None)
    measurements = [
        Measurement(
            target=SERVER_MEMORY,
            case=f"RSS, {case}",
            values=tuple(rss for rss, _ in rounds),
            note="counts pages that workers share once for each",
        )
    ]
    if pss:
        measurements.insert(0, Measurement(target=SERVER_MEMORY, case=f"PSS, {case}", values=pss))
    return measurements


async def _worker_pids(context: Context) -> list[int]:
    """Those that the health check names; it knows them from a snapshot, and the first one takes some seconds."""
    deadline = context.clock.monotonic() + SNAPSHOT_S_MAX
    while context.clock.monotonic() < deadline:
        async with await context.client() as client:
            health = (await client.request("GET", "/api/v1/system/health")).json()
        try:
            pids = [int(worker["pid"]) for worker in health["workers"]]
        except (KeyError, TypeError, ValueError) as error:
            raise BenchFailed(f"/api/v1/system/health does not name its workers' pids: {error!r}.") from None
        if pids:
            return pids
        await context.clock.sleep(0.25)
    raise BenchFailed(f"/api/v1/system/health named no workers within {SNAPSHOT_S_MAX:.0f} s.")


def _memory_gb(pids: list[int]) -> tuple[float, float | None]:
    """Sum of resident sets, and of proportional sets (shared pages divided among their users) where there are any."""
    infos = [psutil.Process(pid).memory_full_info() for pid in pids]
    pss = [info.pss for info in infos if hasattr(info, "pss")]
    return sum(info.rss for info in infos) / GB, sum(pss) / GB if len(pss) == len(infos) else None


def _is_local(url: str) -> bool:
    host = Endpoint.parse(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _unmeasured(why: str) -> Measurement:
    return Measurement(target=SERVER_MEMORY, case="workers after load", values=(), note=why)


SERVER = Scenario(
    name="server-memory",
    group="memory",
    title="memory of the worker processes after executions under load",
    targets=(SERVER_MEMORY,),
    run=measure_memory,
)
