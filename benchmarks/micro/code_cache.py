"""What it costs to get at an agent's code: compiled, read from disk, from memory, or loaded already.

    python -m benchmarks.micro.code_cache [--rounds 5] [--calls 200] [--json FILE]

The source is one agent of 6.6 kB. Peers in the same run are a bare `compile()` of it and Python's own `.pyc` path, an
import of the same text by `importlib` with its code cached, up to the code object. Each figure is the median of
rounds; the rounds of all rows alternate, so that a noisy neighbour hits all of them. Each cold row is given another
source of the same shape at every call. To load is to run the module, too, and to find the agent in it. Bytes are
tracemalloc's, of a hundred loaded modules of one source.
"""

import argparse
import gc
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from itertools import count
from pathlib import Path
from typing import Any

from headrace.agents import CodeCache, Source
from headrace.agents.definition import load
from headrace.clock import SystemClock
from headrace.errors import HeadraceError

LIMITS_US = {"load, cold, memory only": 2_000.0, "load, cold": 2_000.0, "memory hit": 50.0, "definition hit": 50.0}
MODULES = 100
now = SystemClock.monotonic
versions = count()

METHOD = '''
    async def step_{number}(self, task, context):
        """Look at part {number} of the task, and say what became of it."""
        found = []
        for index, item in enumerate(task.get("items", [])):
            if not isinstance(item, dict) or item.get("kind") != "{number}":
                continue
            score = self.weights.get(item["name"], {number}) * math.log1p(index)
            found.append({{"name": item["name"], "score": round(score, 3), "step": {number}}})
            context.progress(index, len(task["items"]), f"step {number}: {{item['name']}}")
        return sorted(found, key=lambda each: each["score"], reverse=True)
'''
HEAD = '''"""An agent that scores items, version {version}."""

import json
import math
from dataclasses import dataclass, field


@dataclass
class Answer:
    title: str
    found: list = field(default_factory=list)


class Agent:
    def __init__(self):
        self.weights = {{"a": 1.0, "b": 2.0}}

    async def execute(self, input, context):
        answer = Answer(title=json.dumps(input.get("title", "")))
        for step in (self.step_0, self.step_1, self.step_2):
            answer.found.extend(await step(input, context))
        return answer.__dict__
'''


def source(version: int = 0) -> str:
    """6.6 kB of agent; each version is another text."""
    return HEAD.format(version=f"{version:06}") + "".join(METHOD.format(number=number) for number in range(10))


class Unwanted:
    """An observer that nothing may be told: what is measured is not a degraded cache."""

    def on(self, event: object) -> None:
        raise HeadraceError(f"The benchmark ran into {event}.")


def a_call_us(calls: int, work: Callable[[int], object], *, prepare: Callable[[], None] | None = None) -> float:
    """The median of one call in microseconds."""
    times = []
    for call in range(calls):
        if prepare is not None:
            prepare()
        begun = now()
        work(call)
        times.append(now() - begun)
    return statistics.median(times) * 1e6


def bare_compile(calls: int, _directory: Path) -> float:
    texts = [source(next(versions)) for _ in range(calls)]
    return a_call_us(calls, lambda call: compile(texts[call], "<agent>", "exec", dont_inherit=True))


def cold_in_memory(calls: int, _directory: Path) -> float:
    cache, texts = CodeCache(observer=Unwanted()), [source(next(versions)) for _ in range(calls)]
    return a_call_us(calls, lambda call: cache.compile("a", texts[call]))


def cold_on_disk(calls: int, directory: Path) -> float:
    """The caller's part; the writer behind is waited for between the calls."""
    cache, texts = CodeCache(directory / "code", observer=Unwanted()), [source(next(versions)) for _ in range(calls)]
    cache.compile("a", "x = 1")  # the directory, its key and the list of what is installed
    figure = a_call_us(calls, lambda call: cache.compile("a", texts[call]), prepare=cache.flush)
    cache.close()
    return figure


def until_written(calls: int, directory: Path) -> float:
    cache, texts = CodeCache(directory / "code", observer=Unwanted()), [source(next(versions)) for _ in range(calls)]

    def work(call: int) -> None:
        cache.compile("a", texts[call])
        cache.flush()

    figure = a_call_us(calls, work)
    cache.close()
    return figure


def disk_hit(calls: int, directory: Path) -> float:
    cache = CodeCache(directory / "code", observer=Unwanted())
    cache.compile("a", source())
    cache.flush()
    figure = a_call_us(calls, lambda _: cache.get("a", source_0), prepare=cache._memory.clear)
    assert cache.statistics().disk_hits >= calls
    cache.close()
    return figure


source_0 = source()


def pyc(calls: int, directory: Path) -> float:
    """What `import` does for a module that was compiled before, up to its code."""
    path = directory / "agent_module.py"
    path.write_text(source_0)
    loader = SourceFileLoader("agent_module", str(path))
    sys.dont_write_bytecode = False
    loader.get_code("agent_module")
    assert Path(importlib.util.cache_from_source(str(path))).exists(), "the .pyc was not written"
    return a_call_us(calls, lambda _: loader.get_code("agent_module"))


def memory_hit(calls: int, _directory: Path) -> float:
    cache = CodeCache()
    cache.compile("a", source_0)
    return a_call_us(calls * 10, lambda _: cache.compile("b", source_0))


def definition_hit(calls: int, _directory: Path) -> float:
    """What a host does for a version that is loaded already: look it up by tenant, agent and version."""
    key = ("default", "a", "1.0.0")
    definitions = {key: load(Source(agent_id="a", version="1.0.0", text=source_0), bytes_max=1 << 20)}
    begun = now()
    for _ in range(calls * 100):
        definitions["default", "a", "1.0.0"].make  # noqa: B018 - the look-up is what is measured
    elapsed = now() - begun
    definitions[key].unload()
    return elapsed / (calls * 100) * 1e6


def load_row(kind: str) -> Callable[[int, Path], float]:
    """What stands between a deployed version that this process has not met and its first execution."""

    def row(calls: int, directory: Path) -> float:
        cache = CodeCache(None if "memory only" in kind else directory / "code", observer=Unwanted())
        texts = [source(next(versions)) if "cold" in kind else source_0 for _ in range(calls)]
        cache.compile("a", source_0)
        definitions = []

        def prepare() -> None:
            cache.flush()
            if kind == "from disk":
                cache._memory.clear()

        def work(call: int) -> None:
            deployed = Source(agent_id="a", version="1", text=texts[call])
            definitions.append(load(deployed, bytes_max=1 << 20, code_cache=cache))

        figure = a_call_us(calls, work, prepare=prepare)
        for definition in definitions:
            definition.unload()
        cache.close()
        return figure

    return row


def loaded(code_cache: CodeCache | None) -> float:
    """Bytes of one loaded module, out of a hundred of the same source."""
    sources = [Source(agent_id=f"a{number}", version="1", text=source_0) for number in range(MODULES + 1)]
    definitions = [load(sources[0], bytes_max=1 << 20, code_cache=code_cache)]
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    definitions += [load(each, bytes_max=1 << 20, code_cache=code_cache) for each in sources[1:]]
    gc.collect()
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    for definition in definitions:
        definition.unload()
    return held / MODULES


ROWS: dict[str, Callable[[int, Path], float]] = {
    "bare compile()": bare_compile,
    "compile, memory only": cold_in_memory,
    "compile, with a directory": cold_on_disk,
    "compile until written": until_written,
    "importlib's .pyc": pyc,
    "disk hit": disk_hit,
    "memory hit": memory_hit,
    "load, cold, memory only": load_row("cold, memory only"),
    "load, cold": load_row("cold"),
    "load, from disk": load_row("from disk"),
    "load, from memory": load_row("from memory"),
    "definition hit": definition_hit,
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--calls", type=int, default=200)
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    rounds: dict[str, list[float]] = {row: [] for row in ROWS}
    for _ in range(chosen.rounds):
        for row, measure in ROWS.items():
            with tempfile.TemporaryDirectory() as directory:
                rounds[row].append(measure(chosen.calls, Path(directory)))
    print(f"{len(source_0):,} bytes of source, Python {sys.version.split()[0]}, {os.cpu_count()} cores")
    results: dict[str, Any] = {}
    for row, figures in rounds.items():
        results[row] = {"median_us": statistics.median(figures), "min_us": min(figures), "max_us": max(figures)}
        limit = LIMITS_US.get(row)
        verdict = ""
        if limit is not None:
            verdict = f"   limit {limit:,.0f}: {'kept' if results[row]['median_us'] <= limit else 'MISSED'}"
        print(f"{row:28} {results[row]['median_us']:11,.2f} us   {min(figures):,.2f} to {max(figures):,.2f}{verdict}")
    for row, code_cache in (("a module, code shared", CodeCache()), ("a module, code its own", None)):
        results[row] = {"bytes": loaded(code_cache)}
        print(f"{row:28} {results[row]['bytes']:11,.0f} bytes")
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
