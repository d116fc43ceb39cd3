"""One agent in four runtimes: headrace, Agno, Pydantic AI and LangGraph, each measured in fresh processes.

    python -m benchmarks.peers.agents [--alive 50000] [--parked 5000] [--only construct,held,flight,run,import]

The agent is the same everywhere: instructions, one tool, and a model that answers from memory, in one turn, without
calling the tool. Nothing leaves the process.

- construct: Agno's own `PerformanceEval`, for all: median time of one constructor call, mean of tracemalloc's peaks.
- held: bytes of an agent while `--alive` of them are, by RSS; by tracemalloc in another process with a tenth as many,
  because it slows their making down.
- in flight: bytes that a run adds while `--parked` of them wait for their model, by RSS; by tracemalloc with a tenth.
  Agno runs on copies of the agent, which are made before; headrace makes an instance for each run, which is counted.
- one run: median from the call to the answer; of the framework's agent alone and hosted by headrace, in turns.
- import: CPU seconds of importing what defines an agent, the best of five processes, and what that adds to RSS.

What headrace does less: its agent is a plain class, so there are no messages, no tool schema and no metrics of a model
to build, in the constructor or in a run. What it does more: its run is an execution, with an id, a deadline, a record
and limits. Not counted in any column: sockets, TLS and the buffers of a real model's client.

Install the peers as benchmarks/peers/requirements-agents.txt says; the library never imports them.
"""

import argparse
import asyncio
import datetime
import gc
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import psutil

INSTRUCTIONS = "Answer with what the tool finds."
CONSTRUCTIONS, ROUNDS, RUNS_A_ROUND = 200, 10, 50
TRACED_SHARE = 10

parked = 0
gate: asyncio.Event | None = None


async def think(prompt: str) -> str:
    """The model: answers at once, or when the gate opens."""
    global parked
    if gate is not None:
        parked += 1
        await gate.wait()
    return "ok"


async def lookup(key: str) -> str:
    """Look a key up."""
    return key


@dataclass
class Peer:
    """A runtime: how to make an agent, and how to run one."""

    make: Callable[[], Any]
    run: Callable[[Any], Awaitable[Any]]
    is_shared: bool = True
    """Whether concurrent runs use one agent object."""
    close: Callable[[], Awaitable[Any]] | None = None


HEADRACE = f"""
from __main__ import lookup, think

class Agent:
    instructions = {INSTRUCTIONS!r}
    tools = (lookup,)

    async def execute(self, input, context):
        return await think(input)
"""
HOSTED = "from __main__ import PEERS, made\nagent = made[0]\n"
made: list[Any] = []


async def a_headrace(source: str = HEADRACE, entrypoint: str = "Agent") -> Peer:
    from headrace.agents import AgentHost, AgentsConfig
    from headrace.agents.definition import Source, load

    host = AgentHost(AgentsConfig(executions_max=200_000, timeout_s=600))
    await host.__aenter__()
    await host.deploy("a", source, version="1.0.0", entrypoint=entrypoint)
    definition = load(Source(agent_id="a", version="1", text=source, entrypoint=entrypoint), bytes_max=10_000)
    return Peer(
        make=definition.make,
        run=lambda _agent: host.execute("a", "hi"),
        close=lambda: host.__aexit__(None, None, None),
    )


async def an_agno() -> Peer:
    from agno.agent import Agent
    from agno.models.base import Model
    from agno.models.response import ModelResponse

    class Remembered(Model):
        async def ainvoke(self, *args, **kwargs):
            return ModelResponse(role="assistant", content=await think("hi"))

        def invoke(self, *args, **kwargs):
            raise NotImplementedError

        ainvoke_stream = invoke_stream = invoke

        def _parse_provider_response(self, response, **kwargs):
            return response

        _parse_provider_response_delta = _parse_provider_response

    model = Remembered(id="remembered")
    return Peer(
        make=lambda: Agent(model=model, tools=[lookup], instructions=INSTRUCTIONS, telemetry=False),
        run=lambda agent: agent.arun("hi"),
        is_shared=False,
    )


async def a_pydantic_ai() -> Peer:
    from pydantic_ai import Agent
    from pydantic_ai.messages import ModelResponse, TextPart
    from pydantic_ai.models.function import FunctionModel

    async def reply(messages, info):
        return ModelResponse(parts=[TextPart(await think("hi"))])

    model = FunctionModel(reply)
    return Peer(
        make=lambda: Agent(model, tools=[lookup], instructions=INSTRUCTIONS),
        run=lambda agent: agent.run("hi"),
    )


async def a_langgraph() -> Peer:
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage
    from langchain_core.outputs import ChatGeneration, ChatResult
    from langgraph.prebuilt import create_react_agent

    class Remembered(BaseChatModel):
        @property
        def _llm_type(self):
            return "remembered"

        def bind_tools(self, tools, **kwargs):
            return self

        async def _agenerate(self, *args, **kwargs):
            return ChatResult(generations=[ChatGeneration(message=AIMessage(await think("hi")))])

        def _generate(self, *args, **kwargs):
            raise NotImplementedError

    model, question = Remembered(), {"messages": [{"role": "user", "content": "hi"}]}
    return Peer(
        make=lambda: create_react_agent(model, [lookup], prompt=INSTRUCTIONS),
        run=lambda agent: agent.ainvoke(question),
    )


PEERS = {"headrace": a_headrace, "agno": an_agno, "pydantic-ai-slim": a_pydantic_ai, "langgraph": a_langgraph}
IMPORTS = {
    "headrace": "from headrace.agents import AgentHost",
    "agno": "from agno.agent import Agent",
    "pydantic-ai-slim": "from pydantic_ai import Agent",
    "langgraph": "from langgraph.prebuilt import create_react_agent",
}


def measure_construct(peer: Peer, count: int) -> dict[str, float]:
    from agno.eval.performance import PerformanceEval

    evaluation = PerformanceEval(
        func=peer.make, num_iterations=count, warmup_runs=10, telemetry=False, show_spinner=False
    )
    result = evaluation.run()
    return {"us": result.median_run_time * 1e6, "bytes": result.avg_memory_usage * 2**20}


class Footprint:
    """Bytes that came since it was made, by one of the two ways."""

    def __init__(self, *, is_traced: bool) -> None:
        gc.collect()
        self._is_traced = is_traced
        if is_traced:
            tracemalloc.start()
        self._before = self._now()

    def _now(self) -> int:
        return tracemalloc.get_traced_memory()[0] if self._is_traced else psutil.Process().memory_info().rss

    def grown(self) -> int:
        gc.collect()
        return self._now() - self._before


def measure_held(peer: Peer, count: int, *, is_traced: bool) -> float:
    kept = [peer.make() for _ in range(10)]  # imports and caches that the first ones fill
    footprint = Footprint(is_traced=is_traced)
    kept += [peer.make() for _ in range(count)]
    return footprint.grown() / count


async def measure_flight(peer: Peer, count: int, *, is_traced: bool) -> float:
    global gate, parked
    agents = [peer.make()] * count if peer.is_shared else [peer.make() for _ in range(count)]
    for agent in agents[:10]:
        await peer.run(agent)
    gate = asyncio.Event()
    footprint = Footprint(is_traced=is_traced)
    runs = []
    for start in range(0, count, 500):
        runs += [asyncio.ensure_future(peer.run(agent)) for agent in agents[start : start + 500]]
        while parked < len(runs):
            await asyncio.sleep(0.01)
    grown = footprint.grown() / count
    gate.set()
    await asyncio.gather(*runs)
    gate = None
    return grown


async def measure_run(peer: Peer, *, hosted: bool) -> dict[str, float]:
    """Rounds alternate between the agent alone and hosted, so that a noisy neighbour hits both."""
    subjects = {"alone": peer}
    agents = {"alone": peer.make(), "hosted": None}
    if hosted:
        made.append(agents["alone"])
        subjects["hosted"] = await a_headrace(HOSTED, "agent")
        assert (await subjects["hosted"].run(None)).output["text"] == "ok"
    took: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(ROUNDS + 1):
        for name, subject in subjects.items():
            for _ in range(RUNS_A_ROUND):
                started = time.perf_counter()
                await subject.run(agents[name])
                took[name].append(time.perf_counter() - started)
    if hosted:
        assert subjects["hosted"].close is not None
        await subjects["hosted"].close()
    return {name: statistics.median(times[RUNS_A_ROUND:]) * 1e6 for name, times in took.items()}


def measure_import(name: str) -> dict[str, float]:
    script = (
        "import time, psutil\nrss = psutil.Process().memory_info().rss\nstart = time.process_time()\n"
        f"{IMPORTS[name]}\nprint(time.process_time() - start, psutil.Process().memory_info().rss - rss)"
    )
    rounds = [subprocess.check_output([sys.executable, "-W", "ignore", "-c", script]).split() for _ in range(5)]
    return {"s": min(float(a) for a, _ in rounds), "bytes": statistics.median(int(b) for _, b in rounds)}


async def measure(name: str, what: str, count: int) -> Any:
    """One figure, in this process."""
    if what == "import":
        return measure_import(name)
    peer = await PEERS[name]()
    try:
        match what:
            case "construct":
                return measure_construct(peer, CONSTRUCTIONS)
            case "held_traced" | "held_rss":
                return measure_held(peer, count, is_traced=what.endswith("traced"))
            case "flight_traced" | "flight_rss":
                return await measure_flight(peer, count, is_traced=what.endswith("traced"))
            case "run":
                return await measure_run(peer, hosted=name != "headrace")
    finally:
        if peer.close is not None:
            await peer.close()


def measured(name: str, what: str, count: int) -> Any:
    """One figure, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.agents", "--child", name, what, str(count)]
    environment = {**os.environ, "AGNO_TELEMETRY": "false", "LANGSMITH_TRACING": "false"}
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if output.returncode:
        return f"failed: {output.stderr.strip().splitlines()[-1]}"
    return json.loads(output.stdout.splitlines()[-1])


MEASURES = {
    "construct": ("construct",),
    "held": ("held_rss", "held_traced"),
    "flight": ("flight_rss", "flight_traced"),
    "run": ("run",),
    "import": ("import",),
}


def cell(figure: Any, unit: str) -> str:
    match figure, unit:
        case str() | None, _:
            return figure or "-"
        case dict(), "construct":
            return f"{figure['us']:,.2f} us, {figure['bytes']:,.0f} B"
        case dict(), "run":
            return ", ".join(f"{figure[name]:,.0f} us" if name in figure else "-" for name in ("alone", "hosted"))
        case dict(), "import":
            return f"{figure['s']:.3f} s, {figure['bytes'] / 1e6:,.0f} MB"
        case _:
            return f"{figure:,.0f} {unit}"


def table(figures: dict[str, dict[str, Any]], alive: int, at_once: int) -> str:
    """One markdown table."""
    titles = {
        "construct": ("construct, by Agno's PerformanceEval: median, peak", "construct"),
        "held_rss": (f"held by one of {alive:,} alive, RSS", "B"),
        "held_traced": (f"held by one of {alive // TRACED_SHARE:,} alive, tracemalloc", "B"),
        "flight_rss": (f"added by one of {at_once:,} runs in flight, RSS", "B"),
        "flight_traced": (f"added by one of {at_once // TRACED_SHARE:,} runs in flight, tracemalloc", "B"),
        "run": ("one run: alone, hosted by headrace", "run"),
        "import": ("import: CPU time, RSS", "import"),
    }
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PEERS]
    lines = [f"| | {' | '.join(versions)} |", "|---" * (len(PEERS) + 1) + "|"]
    for what, (title, unit) in titles.items():
        if what in figures:
            lines.append(f"| {title} | {' | '.join(cell(figures[what][name], unit) for name in PEERS)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alive", type=int, default=50_000)
    parser.add_argument("--parked", type=int, default=5_000)
    parser.add_argument("--only", default=",".join(MEASURES))
    parser.add_argument("--child", nargs=3, metavar=("PEER", "WHAT", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        warnings.simplefilter("ignore")
        logging.disable()
        name, what, count = options.child
        print(json.dumps(asyncio.run(measure(name, what, int(count)))))
        return
    figures: dict[str, dict[str, Any]] = {}
    for group in options.only.split(","):
        for what in MEASURES[group]:
            count = options.alive if group == "held" else options.parked
            count //= TRACED_SHARE if what.endswith("traced") else 1
            figures[what] = {name: measured(name, what, count) for name in PEERS}
            print(what, figures[what], file=sys.stderr, flush=True)
    print(table(figures, options.alive, options.parked))
    cores = len(os.sched_getaffinity(0))
    print(f"\n`{' '.join(['python -m benchmarks.peers.agents', *sys.argv[1:]])}`, {cores} cores,", end=" ")
    print(f"{platform.python_implementation()} {platform.python_version()}, {datetime.date.today().isoformat()}")


if __name__ == "__main__":
    main()
