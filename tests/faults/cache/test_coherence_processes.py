"""Three processes, two of them writers, on one real server to which things happen: in the end all agree.

python -m benchmarks.scenario.cache_coherence processes   the long form
"""

from collections.abc import Iterator

import pytest

from tests.cache_fleets import Fleet, fetch_from, kill_calls, kill_tracking, restart, stopped
from tests.redis_servers import RedisServer

OPERATIONS = 10_000
STOPPED_S = 6.0
PATIENCE_S = 20.0
"""A busy machine is slow, and no fault here is a server that is there and does not answer."""


pytestmark = pytest.mark.timeout(170)


@pytest.fixture
def fleet(server: RedisServer) -> Iterator[Fleet]:
    fleet = Fleet(server.url, fetch=fetch_from(server), timeout_s=PATIENCE_S)
    yield fleet
    fleet.stop()


def flush(server: RedisServer) -> None:
    server.call("FLUSHALL")


@pytest.mark.parametrize(
    ("fault", "every_s"),
    [(None, 0.1), (kill_tracking, 0.05), (kill_calls, 0.1), (flush, 0.05), (restart, 0.3)],
    ids=["quiet", "tracking-kills", "call-kills", "flushes", "restarts"],
)
def test_processes_agree_after_settling(server, fleet, fault, every_s):
    """No process holds a value in memory that is not the shared one, whatever was cut, flushed or killed meanwhile."""
    act = None if fault is None else lambda: fault(server)
    report = fleet.run(OPERATIONS, faults=act, every_s=every_s)
    assert report.operations >= OPERATIONS - 6
    assert fault is None or report.faults > 0
    assert report.compared > 20
    assert report.differences == []


def test_an_outage_under_load_is_not_the_callers(server, fleet):
    """With Redis stopped only strict writes are told; nobody waits long, or for its return, and all agree later."""
    report = fleet.run_through(lambda: stopped(server, STOPPED_S), OPERATIONS // 5)
    assert set(report.errors) == {"set strict cache-unavailable"}
    assert report.slowest_s < PATIENCE_S / 2
    assert report.compared > 20
    assert report.differences == []
