"""Loads, writes and invalidations of several processes in every order that a seed can think of.

python -m benchmarks.scenario.cache_coherence interleavings --count 10000 [--faults]   the long form
"""

import random
from unittest.mock import patch

import pytest

from headrace.cache.codec import Sealed
from headrace.cache.exchange import Basis, Exchange
from headrace.cache.fence import Fence
from headrace.cache.filling import Filler
from headrace.cache.remote import Remote
from headrace.cache.tracking import OwnWrites
from tests.simulation.interleavings import Interleaving, Outcome, report

COUNT = 1000
COUNT_WITH_FAULTS = 400
PARTS = 4
"""So that on a slow machine no test takes as long as a hang."""
BROKEN_FOUND_WITHIN = 500


def run_all(seeds: range, *, faults: bool) -> tuple[int, int, int]:
    """How many loads, invalidations and refused installs there were; fails with the first seed that went wrong."""
    totals = (0, 0, 0)
    for seed in seeds:
        outcome = Interleaving(seed, faults=faults).run()
        assert not outcome.violations, report(seed, outcome)
        totals = (totals[0] + outcome.loads, totals[1] + outcome.invalidations, totals[2] + outcome.refused)
    return totals


@pytest.mark.parametrize("part", range(PARTS))
def test_an_invalidation_during_a_load_always_wins(part):
    """No interleaving leaves a value in any tier that was read before an invalidation that has returned."""
    seeds = range(part, COUNT, PARTS)
    loads, invalidations, refused = run_all(seeds, faults=False)
    assert min(loads, invalidations) > len(seeds)
    assert refused > len(seeds) / 2, "too few loads met an invalidation for this to prove anything"


@pytest.mark.parametrize("part", range(PARTS))
def test_cut_connections_and_flushes_leave_no_difference(part):
    """With calls and pushes lost on the way and the server flushed, memory and shared tier agree after settling."""
    seeds = range(part, COUNT_WITH_FAULTS, PARTS)
    loads, invalidations, _ = run_all(seeds, faults=True)
    assert min(loads, invalidations) > len(seeds)


async def unlink_entries(remote: Remote, names: list[bytes], unlink=Remote.unlink) -> int:
    return await unlink(remote, [name for name in names if b"@lease" not in name])


class Every(set[bytes]):
    """Holds whatever one asks for."""

    def __contains__(self, token: object) -> bool:
        return True


async def swap_unchecked(exchange: Exchange, basis: Basis, entry: Sealed, swap=Exchange.swap) -> bool:
    return await swap(exchange, basis._replace(tokens=()), entry)


@pytest.mark.parametrize(
    ("owner", "method", "broken", "faults"),
    [
        (Fence, "holds", lambda *_: True, False),
        (Remote, "unlink", unlink_entries, False),
        (Filler, "_limit_alone", lambda *_: None, True),
        (Exchange, "swap", swap_unchecked, False),
        (OwnWrites, "tokens", lambda *_: Every({b""}), False),
    ],
    ids=["no-fence", "leases-outlive-deletes", "alone-for-long", "swaps-anywhere", "every-token-is-ours"],
)
def test_a_broken_defence_is_found(owner, method, broken, faults):
    """The simulation is able to fail: each defence is needed in one of the first interleavings."""
    with patch.object(owner, method, broken):
        assert any(Interleaving(seed, faults=faults).run().violations for seed in range(BROKEN_FOUND_WITHIN))


def test_a_seed_is_a_whole_run():
    """The same seed gives the same events in the same order, so that a failure can be looked at again."""
    seed = random.Random(3).randrange(1000)
    runs: list[Outcome] = [Interleaving(seed, faults=True).run() for _ in range(2)]
    assert runs[0] == runs[1]
