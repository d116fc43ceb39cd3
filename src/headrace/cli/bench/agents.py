"""The agents that benchmarks deploy, and how soon they start."""

import base64

from headrace.cli.bench.client import Client
from headrace.cli.bench.context import Context
from headrace.cli.bench.distribution import quantile
from headrace.cli.bench.scenario import Measurement, Scenario
from headrace.cli.bench.targets import AGENT_COLD, AGENT_WARM, Target

SOURCE_BYTES = 6_500
"""The size that the platform asks of an agent; compiling is part of a cold start, so an empty one would flatter."""
COLD_STARTS = 20
WARM_UP_EXECUTIONS = 50
WARM_EXECUTIONS = 200

_HEAD = '''"""Agent {agent_id}: answers with what it was given."""


class Agent:
    async def execute(self, input, context):
        return {{"echo": input}}
'''
_FUNCTION = """

def score_{number}(values, weight={number}):
    total = sum(value * weight for value in values if value is not None)
    return {{"score": total / max(1, len(values)), "weight": weight}}
"""


def source(agent_id: str) -> str:
    """Python source of about `SOURCE_BYTES` that no other agent shares, so that no cache knows it."""
    text = _HEAD.format(agent_id=agent_id)
    number = 0
    while len(text) < SOURCE_BYTES:
        number += 1
        text += _FUNCTION.format(number=number)
    return text


async def deploy(client: Client, agent_id: str) -> None:
    """Deploy a fresh agent that echoes its input."""
    encoded = base64.b64encode(source(agent_id).encode()).decode()
    payload = {
        "agent_metadata": {"agent_id": agent_id, "name": f"Benchmark {agent_id}", "version": "1.0.0"},
        "agent_code": {"source_code": encoded, "entrypoint": "Agent"},
    }
    await client.request("POST", "/api/v1/agents/deploy", payload, expect=201)


async def execute_ms(client: Client, agent_id: str) -> float:
    """Execute once; milliseconds until the answer was here."""
    payload = {"input": {"text": "how soon?"}}
    answer = await client.request("POST", f"/api/v1/agents/{agent_id}/execute", payload)
    return answer.seconds * 1e3


async def measure_cold(context: Context) -> list[Measurement]:
    """First executions of agents that were deployed a moment ago, each on a connection of its own.

    The server may pass a new connection to another worker than the one that took the deployment; the slowest of the
    starts is then one of a worker that has never heard of the agent.
    """
    rounds: list[list[float]] = []
    for number in range(context.config.rounds):
        context.say(f"round {number + 1} of {context.config.rounds}: {COLD_STARTS} first executes")
        starts: list[float] = []
        for start in range(COLD_STARTS):
            agent_id = f"bench-{context.run_id}-cold-{number}-{start}"
            async with await context.client() as client:
                await deploy(client, agent_id)
            async with await context.client() as client:
                starts.append(await execute_ms(client, agent_id))
        rounds.append(starts)
    return _starts(AGENT_COLD, rounds)


async def measure_warm(context: Context) -> list[Measurement]:
    """Executions of an agent that every worker has executed before, one after the other."""
    agent_id = f"bench-{context.run_id}-warm"
    async with await context.client() as client:
        await deploy(client, agent_id)
    for _ in range(WARM_UP_EXECUTIONS):
        # A connection each, so that they spread over the workers.
        async with await context.client() as client:
            await execute_ms(client, agent_id)
    rounds: list[list[float]] = []
    for number in range(context.config.rounds):
        context.say(f"round {number + 1} of {context.config.rounds}: {WARM_EXECUTIONS} executions")
        async with await context.client() as client:
            rounds.append([await execute_ms(client, agent_id) for _ in range(WARM_EXECUTIONS)])
    return _starts(AGENT_WARM, rounds)


def _starts(target: Target, rounds: list[list[float]]) -> list[Measurement]:
    """The promise is one for every start, so the slowest counts too."""
    ascending = [sorted(starts) for starts in rounds]
    count = len(ascending[0])
    return [
        Measurement(
            target=target, case=f"median of {count}", values=tuple(quantile(starts, 0.5) for starts in ascending)
        ),
        Measurement(target=target, case=f"slowest of {count}", values=tuple(starts[-1] for starts in ascending)),
    ]


COLD_START = Scenario(
    name="agent-cold-start",
    group="agents",
    title="deploy a fresh agent, then time its first execute",
    targets=(AGENT_COLD,),
    run=measure_cold,
)
WARM_START = Scenario(
    name="agent-warm-start",
    group="agents",
    title="execute an agent that is in service",
    targets=(AGENT_WARM,),
    run=measure_warm,
)
