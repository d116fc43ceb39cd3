"""The collector of a serving process: frozen once, measured, and put back."""

import gc

from headrace.clock import SystemClock
from headrace.server.garbage import Garbage


def test_what_start_up_made_is_never_visited_again_and_the_young_seldom():
    """Until it is left, when everything is as before."""
    before = gc.get_threshold()
    garbage = Garbage(SystemClock())

    garbage.settle()
    frozen, thresholds = gc.get_freeze_count(), gc.get_threshold()
    garbage.leave()

    assert frozen > 10_000
    assert thresholds > before
    assert (gc.get_freeze_count(), gc.get_threshold()) == (0, before)


def test_each_pause_is_measured():
    """Their number, their sum and the longest, for the monitor."""
    garbage = Garbage(SystemClock())
    garbage.settle()

    gc.collect(0)
    once = garbage.measured()
    held = [[] for _ in range(100_000)]
    gc.collect()
    both = garbage.measured()
    garbage.leave()
    gc.collect()

    assert len(held) == 100_000
    assert once["gc_pauses_total"] >= 1
    assert both["gc_pauses_total"] > once["gc_pauses_total"]
    assert 0 < both["gc_pause_longest_seconds"] <= both["gc_pause_seconds_total"]
    assert garbage.measured() == both


def test_leaving_what_was_not_settled_changes_nothing():
    """A worker that fails to start leaves no trace."""
    before, callbacks = gc.get_threshold(), list(gc.callbacks)

    Garbage(SystemClock()).leave()

    assert (gc.get_threshold(), gc.callbacks) == (before, callbacks)
