"""Hit ratios on recorded traffic: our policies, the best of the peers, and Belady, who knows the future.

    python -m benchmarks.traces.hit_ratio [--only web07,loop] [--json FILE] [--check]

Every trace is replayed as `get`, and `set` on a miss, at four sizes, each trace in a process of its own, one after
the other. Ours go through MemoryCache itself. Hashes of int keys are the same in every run, so ours are too; moka-py
and theine draw random seeds and move by about two tenths of a point.

moka-py applies writes some time later and holds up to 64 entries more than it was given. It is shown as it is, and
made to keep its bound by `run_pending_tasks()` after each `set`. Where 64 entries are more than a twentieth of the
cache only the second is compared with; elsewhere both are.

`--check` fails unless the adaptive policy is at most half a point below the best that does not know the future in
every cell, and above each of them on average.
"""

import argparse
import heapq
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.traces import recorded
from headrace.cache.memory import MemoryCache

OURS = ("adaptive", "wtinylfu", "s3fifo", "sieve", "lru")
MOKA_SURPLUS = 64
Replay = Callable[[list[int], int], int]


def replay_ours(policy: str) -> Replay:
    def replay(keys: list[int], size: int) -> int:
        cache = MemoryCache(size, ttl=None, policy=policy)
        for key in keys:
            if cache.get(key) is None:
                cache.set(key, True)
        return cache.statistics().hits

    return replay


def replay_moka(*, is_bound_kept: bool) -> Replay:
    def replay(keys: list[int], size: int) -> int:
        import moka_py

        cache = moka_py.Moka(size)
        misses = 0
        for key in keys:
            if cache.get(key) is None:
                misses += 1
                cache.set(key, True)
                if is_bound_kept:
                    cache.run_pending_tasks()
        return len(keys) - misses

    return replay


def replay_theine(keys: list[int], size: int) -> int:
    import theine

    cache = theine.Cache(size)
    misses = 0
    for key in keys:
        if not cache.get(key)[1]:
            misses += 1
            cache.set(key, True)
    return len(keys) - misses


def replay_belady(keys: list[int], size: int) -> int:
    """Evict what is needed again last (L. Belady, 1966): nobody can have more hits."""
    following = [0] * len(keys)
    last: dict[int, int] = {}
    for place in range(len(keys) - 1, -1, -1):
        following[place] = last.get(keys[place], len(keys) + place)
        last[keys[place]] = place
    needed: dict[int, int] = {}
    latest: list[tuple[int, int]] = []
    hits = 0
    for key, place in zip(keys, following, strict=True):
        if key in needed:
            hits += 1
        elif len(needed) == size:
            while True:
                when, victim = heapq.heappop(latest)
                # What was asked for since stands here again with a later place.
                if needed.get(victim) == -when:
                    del needed[victim]
                    break
        needed[key] = place
        heapq.heappush(latest, (-place, key))
    return hits


def subjects() -> dict[str, Replay]:
    """Everything that can be replayed here, ours first."""
    found = {name: replay_ours(name) for name in OURS}
    if importlib.util.find_spec("moka_py"):
        found["moka-py"] = replay_moka(is_bound_kept=False)
        found["moka, bound"] = replay_moka(is_bound_kept=True)
    if importlib.util.find_spec("theine"):
        found["theine"] = replay_theine
    return {**found, "belady": replay_belady}


def measure(trace: str) -> dict[int, dict[str, float]]:
    """Hit ratios in per cent, by size and subject."""
    keys = recorded.read(trace)
    return {
        size: {name: 100.0 * replay(keys, size) / len(keys) for name, replay in subjects().items()}
        for size in recorded.SIZES[trace]
    }


def is_compared(name: str, size: int) -> bool:
    """Whether a subject stands under the same conditions."""
    return name != "belady" and not (name == "moka-py" and size < 20 * MOKA_SURPLUS)


def lead(cell: dict[str, float], size: int) -> float:
    """Points by which adaptive is above the best of the others that do not know the future."""
    return cell["adaptive"] - max(
        value for name, value in cell.items() if name != "adaptive" and is_compared(name, size)
    )


def show(cells: dict[tuple[str, int], dict[str, float]]) -> bool:
    """Print the table in Markdown and the verdict; whether all was as promised."""
    names = list(next(iter(cells.values())))
    print("| trace | size | " + " | ".join(names) + " | lead |\n|---|--:|" + "--:|" * len(names) + "--:|")
    for (trace, size), cell in cells.items():
        ratios = " | ".join(f"{cell[name]:.2f}" for name in names)
        print(f"| {trace} | {size} | {ratios} | {lead(cell, size):+.2f} |")
    means = {name: sum(cell[name] for cell in cells.values()) / len(cells) for name in names}
    print("| mean | | " + " | ".join(f"{means[name]:.2f}" for name in names) + " | |\n")
    worst = {cell: lead(ratios, cell[1]) for cell, ratios in cells.items()}
    below = {f"{trace}@{size}": round(value, 2) for (trace, size), value in worst.items() if value < -0.5}
    is_best = all(means["adaptive"] >= mean for name, mean in means.items() if name != "belady")
    print(f"more than half a point below the best: {below or 'nowhere'}; best on average: {is_best}")
    return is_best and not below


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", default=",".join(recorded.SIZES))
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--check", action="store_true")
    arguments.add_argument("--one", choices=recorded.SIZES, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if recorded.directory() is None:
        print("skipped: no traces; set HEADRACE_TRACES to a folder with web07.trace.xz and the others")
        return 0
    if options.one:
        print(json.dumps(measure(options.one)))
        return 0
    cells = {}
    for trace in options.only.split(","):
        command = [sys.executable, "-m", "benchmarks.traces.hit_ratio", "--one", trace]
        measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        cells.update({(trace, int(size)): cell for size, cell in measured.items()})
    is_as_promised = show(cells)
    if options.json:
        options.json.write_text(json.dumps({f"{trace}@{size}": cell for (trace, size), cell in cells.items()}))
    return 0 if is_as_promised or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
