"""What a call of MemoryCache costs, next to dict.get, functools.lru_cache and the caches of others, in the same run.

    python -m benchmarks.micro.memory [--rounds 9] [--only hit,miss,set,threads,bytes] [--policy lru] [--json FILE]

- hit: `get` of 10,000 resident keys in random order; with a TTL, one key again and again, and without a TTL.
- miss: `get` of keys that are not there.
- set: of resident keys, and of new keys into a cache of 10,000 that is full.
- threads: hits a second of one thread, and of eight together.
- bytes: what an entry adds to a process of its own, with its key and one value for all.

Rounds alternate between the subjects, so that a noisy neighbour hits all of them. Shown are the median, half the
distance between the quartiles, the median over the rounds of the ratio to the first subject, the best round, and the
ratio of the best rounds, which is what a busy machine disturbs least: neighbours only ever add time. Peers that are
not installed are left out by name: see benchmarks/peers/requirements-cache.txt.
"""

import argparse
import datetime
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.cache import memory
from headrace.cache.memory import MemoryCache
from headrace.clock import SystemClock

ENTRIES = 10_000
TTL_S = 300.0
THREADS = 8
FOOTPRINT_ENTRIES = 100_000
KEYS = [f"user:{number}" for number in range(ENTRIES)]
now = SystemClock.monotonic
new_keys = (f"new:{number}" for number in range(10**9))


@dataclass(frozen=True)
class Subject:
    """A cache that holds KEYS: how to read and how to store."""

    get: Callable[[str], object]
    set: Callable[[str, object], object] | None
    alive: object = None
    """Whatever must outlive the two functions."""


def make_dict(entries: int, ttl: float | None) -> Subject:
    table: dict[str, object] = {}
    return Subject(table.get, table.__setitem__)


def make_lru_cache(entries: int, ttl: float | None) -> Subject:
    @functools.lru_cache(entries)
    def identity(key: str) -> object:
        return key

    return Subject(identity, lambda key, value: identity(key))


def make_headrace(entries: int, ttl: float | None, policy: str = "adaptive") -> Subject:
    cache = MemoryCache(entries, ttl=ttl, policy=policy)
    return Subject(cache.get, cache.set)


def make_cachebox_ttl(entries: int, ttl: float | None) -> Subject:
    import cachebox

    cache: Any = cachebox.LRUCache(entries) if ttl is None else cachebox.TTLCache(entries, ttl)
    return Subject(cache.get, cache.insert)


def make_cachebox_vttl(entries: int, ttl: float | None) -> Subject:
    import cachebox

    cache: Any = cachebox.VTTLCache(entries)
    return Subject(cache.get, lambda key, value: cache.insert(key, value, ttl))


def make_cachetools(entries: int, ttl: float | None) -> Subject:
    import cachetools

    cache: Any = cachetools.LRUCache(entries) if ttl is None else cachetools.TTLCache(entries, ttl)
    return Subject(cache.get, cache.__setitem__)


def make_moka(entries: int, ttl: float | None) -> Subject:
    import moka_py

    cache: Any = moka_py.Moka(entries, ttl=ttl)
    return Subject(cache.get, cache.set)


def make_theine(entries: int, ttl: float | None) -> Subject:
    import theine

    cache: Any = theine.Cache(entries)
    life = None if ttl is None else datetime.timedelta(seconds=ttl)
    return Subject(cache.get, lambda key, value: cache.set(key, value, life), cache)


MAKERS: dict[str, tuple[str | None, Callable[[int, float | None], Subject]]] = {
    "dict": (None, make_dict),
    "functools.lru_cache": (None, make_lru_cache),
    "headrace": (None, make_headrace),
    "cachebox TTLCache": ("cachebox", make_cachebox_ttl),
    "cachebox VTTLCache": ("cachebox", make_cachebox_vttl),
    "cachetools TTLCache": ("cachetools", make_cachetools),
    "moka-py": ("moka_py", make_moka),
    "theine": ("theine", make_theine),
}


def installed() -> dict[str, Callable[[int, float | None], Subject]]:
    """The subjects that can be imported here."""
    found = {}
    for name, (module, make) in MAKERS.items():
        if module is None or importlib.util.find_spec(module):
            found[name] = make
        else:
            print(f"{name}: not installed, left out", file=sys.stderr)
    return found


def filled(make: Callable[[int, float | None], Subject], ttl: float | None) -> Subject:
    subject = make(ENTRIES, ttl)
    if subject.set is not None:
        for key in KEYS:
            subject.set(key, key)
    return subject


def calls_ns(function: Callable[[str], object], keys: list[str]) -> float:
    started = now()
    for key in keys:
        function(key)
    return (now() - started) / len(keys) * 1e9


def sets_ns(function: Callable[[str, object], object], keys: list[str]) -> float:
    started = now()
    for key in keys:
        function(key, None)
    return (now() - started) / len(keys) * 1e9


def in_threads(function: Callable[[str], object], keys: list[str], threads: int) -> float:
    """Calls a second of so many threads together."""
    barrier = threading.Barrier(threads + 1)

    def work() -> None:
        barrier.wait()
        for key in keys:
            function(key)

    running = [threading.Thread(target=work) for _ in range(threads)]
    for thread in running:
        thread.start()
    barrier.wait()
    started = now()
    for thread in running:
        thread.join()
    return threads * len(keys) / (now() - started)


def row(
    measure: Callable[[Subject], float], subjects: dict[str, Subject], rounds: int, *, collect: bool = False
) -> dict[str, list[float]]:
    """One figure a subject and round, the subjects in turn."""
    figures: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(rounds + 1):
        for name, subject in subjects.items():
            if collect:
                gc.collect()
            figure = measure(subject)
            if turn:
                # The first round warms up.
                figures[name].append(figure)
    return figures


def measurements(wanted: set[str], policy: str, rounds: int) -> Iterator[tuple[str, str, dict[str, list[float]]]]:
    makers = installed()
    makers["headrace"] = functools.partial(make_headrace, policy=policy)
    shuffled = random.Random(1).sample(KEYS, len(KEYS)) * 5
    absent = [f"absent:{number}" for number in range(ENTRIES)] * 3
    mortal = {name: filled(make, TTL_S) for name, make in makers.items()}
    readers = {name: subject for name, subject in mortal.items() if name != "functools.lru_cache"}
    if "hit" in wanted:
        yield "hit", "ns", row(lambda subject: calls_ns(subject.get, shuffled), mortal, rounds)
        yield "hit one key", "ns", row(lambda subject: calls_ns(subject.get, [KEYS[7]] * 50_000), mortal, rounds)
        immortal = {name: filled(make, None) for name, make in makers.items() if name != "cachebox VTTLCache"}
        yield "hit, no TTL", "ns", row(lambda subject: calls_ns(subject.get, shuffled), immortal, rounds)
    if "miss" in wanted:
        yield "miss", "ns", row(lambda subject: calls_ns(subject.get, absent), readers, rounds)
    if "set" in wanted:
        writers = {name: subject for name, subject in readers.items() if name != "dict" and subject.set is not None}
        yield "set", "ns", row(lambda subject: sets_ns(subject.set, shuffled), writers, rounds)

        def evict(subject: Subject) -> float:
            keys = [next(new_keys) for _ in range(2 * ENTRIES)]
            return sets_ns(subject.set, keys)

        yield "set and evict", "ns", row(evict, writers, rounds, collect=True)
    if "threads" in wanted:
        mortal = {name: filled(make, TTL_S) for name, make in makers.items()}
        alone = row(lambda subject: in_threads(subject.get, shuffled, 1), mortal, rounds)
        together = row(lambda subject: in_threads(subject.get, shuffled, THREADS), mortal, rounds)
        yield "1 thread", "calls/s", alone
        yield f"{THREADS} threads", "calls/s", together


def footprint(name: str) -> float:
    """Bytes of this process's memory for each of many entries."""
    keys = [f"user:{number}" for number in range(FOOTPRINT_ENTRIES)]
    subject = MAKERS[name][1](FOOTPRINT_ENTRIES, TTL_S)
    gc.collect()
    before = resident_bytes()
    for key in keys:
        subject.set(key, None)
    gc.collect()
    return (resident_bytes() - before) / FOOTPRINT_ENTRIES


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def footprints() -> dict[str, list[float]]:
    command = [sys.executable, "-m", "benchmarks.micro.memory", "--footprint"]
    return {
        name: [float(subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout)]
        for name in installed()
        if name != "functools.lru_cache"
    }


def show(title: str, unit: str, figures: dict[str, list[float]]) -> None:
    """Print a table in Markdown."""
    first = next(iter(figures.values()))
    best = max if unit == "calls/s" else min
    print(f"\n| {title} ({unit}) | median | ± | ratio | best | ratio of best |\n|---|--:|--:|--:|--:|--:|")
    for name, values in figures.items():
        ratio = statistics.median(value / base for value, base in zip(values, first, strict=True))
        quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [0.0, 0.0, 0.0]
        spread = (quartiles[2] - quartiles[0]) / 2
        print(
            f"| {name} | {statistics.median(values):,.1f} | {spread:,.1f} | {ratio:.2f} "
            f"| {best(values):,.1f} | {best(values) / best(first):.2f} |"
        )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--only", default="hit,miss,set,threads,bytes")
    arguments.add_argument("--policy", default="adaptive")
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--footprint", choices=MAKERS)
    options = arguments.parse_args()
    if options.footprint:
        print(footprint(options.footprint))
        return
    form = "plain Python" if memory.__file__.endswith(".py") else "compiled"
    versions = {
        name: importlib.metadata.version(name)
        for name in ("cachebox", "cachetools", "moka-py", "theine")
        if importlib.util.find_spec(name.replace("-", "_"))
    }
    print(f"headrace {form}, policy {options.policy}; Python {platform.python_version()}; {versions}")
    wanted = set(options.only.split(","))
    results = {}
    for title, unit, figures in measurements(wanted, options.policy, options.rounds):
        show(title, unit, figures)
        results[title] = figures
    if "bytes" in wanted:
        results["bytes"] = footprints()
        show("memory", "bytes an entry", results["bytes"])
    if options.json:
        options.json.write_text(json.dumps({"form": form, "versions": versions, "results": results}))


if __name__ == "__main__":
    main()
