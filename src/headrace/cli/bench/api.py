"""Response times and throughput of the HTTP API under constant, open-loop load."""

from statistics import median

from headrace.cli.bench.agents import deploy
from headrace.cli.bench.context import Context
from headrace.cli.bench.load import SEQUENCE, LoadReport
from headrace.cli.bench.scenario import FAILED_SHARE_MAX, Measurement, Scenario
from headrace.cli.bench.search import RATE_MIN, RateSearch
from headrace.cli.bench.targets import API_P50, API_P95, API_P99, API_P999, API_PEAK, API_SUSTAINED, Target

RATES_PER_S = (1_000, 5_000, 10_000)
EXECUTE_BODY = f'{{"input": {{"text": "how long?", "ticket": "{SEQUENCE}"}}}}'
ACHIEVED_SHARE_MIN = 0.97
"""Below this share of the offered rate a queue is growing, however short the waits still are."""
HOLD_FACTOR = 3.0
"""A sustained rate has to hold for so many times `--seconds`."""
HOLD_ATTEMPTS_MAX = 4


async def measure_status(context: Context) -> list[Measurement]:
    """Status reads at each rate."""
    agent_id = await _deployed(context)
    return await _measure_latency(context, "status", f"/api/v1/agents/{agent_id}/status")


async def measure_execute(context: Context) -> list[Measurement]:
    """Executions at each rate, every one with an input of its own."""
    agent_id = await _deployed(context)
    path = f"/api/v1/agents/{agent_id}/execute"
    return await _measure_latency(context, "execute", path, method="POST", body=EXECUTE_BODY)


async def measure_throughput(context: Context) -> list[Measurement]:
    """The highest rate of status reads that holds p99 below its target: for a moment, and for a while."""
    path = f"/api/v1/agents/{await _deployed(context)}/status"
    peaks: list[float] = []
    sustained: list[float] = []
    reports: list[LoadReport] = []
    for number in range(context.config.rounds):
        where = f"round {number + 1} of {context.config.rounds}"
        peak = await _search_peak(context, where, path, reports)
        peaks.append(peak)
        sustained.append(await _hold(context, where, path, peak, reports))
    bound = any(_is_generators_fault(API_P99, report.latency_ms.p99, [report]) for report in reports)
    note = "the generator fell behind: a lower bound" if bound else ""
    case = "status reads, p99 < 500 ms"
    return [
        Measurement(
            target=API_PEAK,
            case=f"{case}, {_probe_seconds(context):g} s a probe",
            values=tuple(peaks),
            note=note,
            generator_bound=bound,
        ),
        Measurement(
            target=API_SUSTAINED,
            case=f"{case}, held {context.config.seconds * HOLD_FACTOR:g} s",
            values=tuple(sustained),
            note=note,
            generator_bound=bound,
        ),
    ]


def holds(report: LoadReport) -> bool:
    """Whether the server kept up: fast enough, hardly a failure, and no queue growing behind the percentiles."""
    return (
        API_P99.is_met_by(report.latency_ms.p99)
        and report.failed_share <= FAILED_SHARE_MAX
        and report.achieved_per_s >= ACHIEVED_SHARE_MIN * report.offered_per_s
    )


def latency_measurements(case: str, reports: list[LoadReport]) -> list[Measurement]:
    """The four response-time targets, from one report a round."""
    requests = sum(report.requests for report in reports)
    failed_share = 1 - sum(report.ok for report in reports) / requests
    quantiles = (
        (API_P50, tuple(report.latency_ms.p50 for report in reports)),
        (API_P95, tuple(report.latency_ms.p95 for report in reports)),
        (API_P99, tuple(report.latency_ms.p99 for report in reports)),
        (API_P999, tuple(report.latency_ms.p999 for report in reports)),
    )
    return [
        Measurement(
            target=target,
            case=case,
            values=values,
            note=_note(reports),
            failed_share=failed_share,
            generator_bound=_is_generators_fault(target, median(values), reports),
        )
        for target, values in quantiles
    ]


async def _measure_latency(
    context: Context, what: str, path: str, *, method: str = "GET", body: str | None = None
) -> list[Measurement]:
    reports: dict[int, list[LoadReport]] = {rate: [] for rate in RATES_PER_S}
    for number in range(context.config.rounds):
        # Rates alternate within a round, so that a noisy neighbour hits all of them.
        for rate in RATES_PER_S:
            case = f"{what}, {rate:,}/s"
            context.say(f"{case}, round {number + 1} of {context.config.rounds}")
            reports[rate].append(await context.load(case, path, rate_per_s=rate, method=method, body=body))
    return [
        measurement
        for rate in RATES_PER_S
        for measurement in latency_measurements(f"{what}, {rate:,}/s", reports[rate])
    ]


async def _search_peak(context: Context, where: str, path: str, reports: list[LoadReport]) -> float:
    search = RateSearch()
    while (rate := search.proposal()) is not None:
        context.say(f"{where}: probing {rate:,.0f}/s")
        case = f"probe, {rate:,.0f}/s"
        report = await context.load(case, path, rate_per_s=rate, seconds=_probe_seconds(context))
        reports.append(report)
        search.report(rate, held=holds(report))
    return search.held


async def _hold(context: Context, where: str, path: str, rate: float, reports: list[LoadReport]) -> float:
    """The first of rate, 0.85 rate, 0.85² rate ... that holds for longer; 0 when none does."""
    for _ in range(HOLD_ATTEMPTS_MAX):
        if rate < RATE_MIN:
            return 0.0
        context.say(f"{where}: holding {rate:,.0f}/s")
        seconds = context.config.seconds * HOLD_FACTOR
        report = await context.load(f"hold, {rate:,.0f}/s", path, rate_per_s=rate, seconds=seconds)
        reports.append(report)
        if holds(report):
            return rate
        rate *= 0.85
    return 0.0


def _probe_seconds(context: Context) -> float:
    return max(0.5, context.config.seconds / 2)


async def _deployed(context: Context) -> str:
    agent_id = f"bench-{context.run_id}-{context.scenario}"
    async with await context.client() as client:
        await deploy(client, agent_id)
    return agent_id


def _is_generators_fault(target: Target, value: float, reports: list[LoadReport]) -> bool:
    """Whether a miss may be the generator's: it was late, and twice its lateness makes up the difference.

    Twice, because who is late in sending is as late in reading. A miss by more than that is the server's own.
    """
    late = _late_ms(reports)
    return late > 0 and not target.is_met_by(value) and target.is_met_by(value - 2 * late)


def _late_ms(reports: list[LoadReport]) -> float:
    """The worst p99 lag of the rounds that were too late; 0 when none was."""
    late = [report.lag_ms.p99 for report in reports if report.generator_bound and report.lag_ms is not None]
    return max(late, default=0.0)


def _note(reports: list[LoadReport]) -> str:
    """Failures by kind, and how late the generator was where it was too late."""
    errors: dict[str, int] = {}
    for report in reports:
        for kind, count in report.errors.items():
            errors[kind] = errors.get(kind, 0) + count
    notes = [f"{count:,} x {kind}" for kind, count in sorted(errors.items())]
    if late := _late_ms(reports):
        notes.append(f"generator late by {late:.0f} ms (p99)")
    return ", ".join(notes)


STATUS = Scenario(
    name="api-status",
    group="api",
    title="GET /api/v1/agents/{id}/status at 1,000, 5,000 and 10,000 requests/s",
    targets=(API_P50, API_P95, API_P99, API_P999),
    run=measure_status,
)
EXECUTE = Scenario(
    name="api-execute",
    group="api",
    title="POST /api/v1/agents/{id}/execute at 1,000, 5,000 and 10,000 requests/s",
    targets=(API_P50, API_P95, API_P99, API_P999),
    run=measure_execute,
)
THROUGHPUT = Scenario(
    name="api-throughput",
    group="api",
    title="the highest rate of status reads that holds p99 < 500 ms",
    targets=(API_PEAK, API_SUSTAINED),
    run=measure_throughput,
)
