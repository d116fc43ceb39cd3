"""The wheel of deadlines against a list."""

from hypothesis import given
from hypothesis import strategies as st

from headrace.agents.running.deadlines import TICKS_PER_S, Wheel

steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.floats(0.0, 10_000.0)),
        st.tuples(st.just("remove"), st.integers(0, 30)),
        st.tuples(st.just("pass"), st.floats(0.0, 6_000.0)),
    ),
    max_size=40,
)


class Entry:
    """Something with a deadline."""

    def __init__(self, due_at):
        self.due_at = due_at
        self.earlier = self.later = None

    def overdue(self):
        raise AssertionError("nobody asked for it")


@given(st.floats(0.0, 1e6), steps)
def test_the_wheel_hands_out_what_a_list_would(start, steps):
    """Whatever is added and removed: all that is due more than a tick ago, nothing that is not, each once."""
    now, wheel, waiting = start, Wheel(start), []
    for step, value in steps:
        if step == "add":
            waiting.append(Entry(now + value))
            wheel.add(waiting[-1])
        elif step == "remove" and value < len(waiting):
            wheel.remove(waiting.pop(value))
        elif step == "pass":
            now += value
            passed = wheel.passed(now, limit=1_000)
            assert all(entry.due_at <= now for entry in passed)
            waiting = [entry for entry in waiting if entry not in passed]
            assert all(entry.due_at > now - 2 / TICKS_PER_S for entry in waiting)
            assert wheel.next_at() is not None or not waiting
