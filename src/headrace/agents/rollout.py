"""Whether a canary goes on: the new version's runs against those of the version in service. Pure.

Intuition: two coins. We do not ask whether the canary's failure rate looks higher, which it often does by chance, but
whether even the lowest rate that is believable for the canary lies above the highest that is believable for the stable
version. What is believable is Wilson's score interval [1], which holds for few runs and for rates near 0, where the
textbook interval collapses. The question is asked again after each failure, so the interval is wide (z = 3.5, about
1 in 4,000 for a single look); `tests/unit/agents/test_rollout.py` simulates how often an equal version is refused.

Latency is the same question about another coin: the share of runs that took longer than `slowdown_max` times the
stable version's 95th percentile. A version no slower than that has at most 5 % of them.

[1] E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22, 1927.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import msgspec

Z = 3.5
BUCKETS = 96
"""Of run times: bucket n holds those up to 2**(n/3) / 1024 ms, the last one all longer ones (from 55 minutes)."""
_QUANTILE = 0.95


class Tally(msgspec.Struct, kw_only=True):
    """What became of a version's runs since the canary began."""

    runs: int = 0
    failures: int = 0
    """Failed and timed out; cancelled and interrupted ones say nothing about the version and are not counted."""
    times: list[int] = msgspec.field(default_factory=lambda: [0] * BUCKETS)
    """Runs by the bucket of their run time."""

    def count(self, *, failed: bool, run_ms: float) -> None:
        """Add one run."""
        self.runs += 1
        self.failures += failed
        self.times[bucket_of(run_ms)] += 1

    def plus(self, other: "Tally") -> "Tally":
        """Both together."""
        times = [mine + theirs for mine, theirs in zip(self.times, other.times, strict=True)]
        return Tally(runs=self.runs + other.runs, failures=self.failures + other.failures, times=times)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPolicy:
    """When a canary is refused."""

    runs_min: int = 20
    """Runs of each version before anything is judged."""
    failure_margin: float = 0.02
    """How much higher the canary's failure rate may be."""
    slowdown_max: float = 1.5
    """How many times the stable version's 95th percentile the canary's may be."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a canary."""

    decision: Literal["wait", "abort"]
    reason: str = ""


WAIT = Verdict("wait")


def judge(canary: Tally, stable: Tally, policy: RolloutPolicy) -> Verdict:
    """Whether the canary is surely worse than the version in service.

    Nothing is judged below `runs_min` runs of the canary. While the stable version has fewer, a rollout that has
    nothing to be compared with is refused only when more than half of the canary's runs surely fail.
    """
    if canary.runs < policy.runs_min:
        return WAIT
    worst_believable = upper_bound(stable.failures, stable.runs) if stable.runs >= policy.runs_min else 0.5
    failing = lower_bound(canary.failures, canary.runs)
    if failing > worst_believable + policy.failure_margin:
        return Verdict("abort", f"{canary.failures} of its {canary.runs} runs failed, {_share(stable)} of the others.")
    if stable.runs < policy.runs_min:
        return WAIT
    edge = _quantile_bucket(stable) + _buckets_in(policy.slowdown_max)
    slow = sum(canary.times[edge + 1 :])
    if edge < BUCKETS and lower_bound(slow, canary.runs) > 1 - _QUANTILE:
        limit = _upper_ms(edge)
        return Verdict("abort", f"{slow} of its {canary.runs} runs took over {limit:.3g} ms; 5 % may.")
    return WAIT


def lower_bound(hits: int, of: int, z: float = Z) -> float:
    """The lowest rate that is believable after `hits` of `of`."""
    return _wilson(hits, of, -z)


def upper_bound(hits: int, of: int, z: float = Z) -> float:
    """The highest rate that is believable after `hits` of `of`."""
    return _wilson(hits, of, z)


def is_chosen(execution_id: str, canary: str, share: float) -> bool:
    """Whether an execution goes to the canary: the same answer for the same id in every process.

    The canary's version is part of the hash, so that not the same ids are the first to try every canary.
    """
    digest = hashlib.blake2b(f"{canary}\n{execution_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def bucket_of(run_ms: float) -> int:
    """The bucket that a run time falls into."""
    if run_ms * 1024 <= 1:
        return 0
    return min(BUCKETS - 1, math.ceil(3 * math.log2(run_ms * 1024)))


def _wilson(hits: int, of: int, z: float) -> float:
    if of == 0:
        return 0.0 if z < 0 else 1.0
    rate, square = hits / of, z * z / of
    centre = rate + square / 2
    spread = z * math.sqrt((rate * (1 - rate) + square / 4) / of)
    return min(1.0, max(0.0, (centre + spread) / (1 + square)))


def _quantile_bucket(tally: Tally) -> int:
    missing = math.ceil(tally.runs * _QUANTILE)
    for bucket, runs in enumerate(tally.times):
        missing -= runs
        if missing <= 0:
            return bucket
    return BUCKETS - 1


def _buckets_in(factor: float) -> int:
    return max(0, math.ceil(3 * math.log2(factor)))


def _upper_ms(bucket: int) -> float:
    return float(2 ** (bucket / 3) / 1024)


def _share(tally: Tally) -> str:
    return f"{tally.failures} of {tally.runs}"
