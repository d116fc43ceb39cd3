"""Back-off: at once after a good run, then ever longer, up to a limit."""

from headrace.server.backoff import Backoff


def test_waits_double_up_to_the_limit():
    """A process that ends early again and again is started ever more seldom."""
    backoff, waits = Backoff(first_s=0.1, limit_s=1.0), []
    for _ in range(6):
        backoff = backoff.after(0.5)
        waits.append(round(backoff.wait_s, 3))
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


def test_a_good_run_is_forgiven():
    """Whoever ran long enough starts at once again."""
    backoff = Backoff().after(0.5).after(0.5).after(0.5)
    assert backoff.after(10.0).wait_s == 0.1
