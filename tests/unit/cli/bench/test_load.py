import pytest

from headrace.cli.bench.http1 import Endpoint
from headrace.cli.bench.load import LoadSpec, request_factory
from headrace.errors import ConfigError

ENDPOINT = Endpoint(host="127.0.0.1", port=1)


def spec(**changes) -> LoadSpec:
    fields = {"url": "http://127.0.0.1:1", "path": "/", "rate_per_s": 100.0, "seconds": 2.0}
    return LoadSpec(**(fields | changes))


def test_warm_up_comes_on_top_of_what_is_measured():
    """The counts of a spec follow from its rate and times."""
    asked = spec(warmup_s=0.5)

    assert (asked.warmup_count, asked.count) == (50, 250)
    assert asked.duration_s_max > asked.warmup_s + asked.seconds + asked.timeout_s


@pytest.mark.parametrize(
    "changes",
    [
        {"rate_per_s": 0},
        {"seconds": -1},
        {"warmup_s": -0.1},
        {"connections": 0},
        {"timeout_s": 0},
        {"rate_per_s": 0.1, "seconds": 1, "warmup_s": 0},
        {"rate_per_s": 1e6, "seconds": 3_600},
        {"url": "https://127.0.0.1:1"},
    ],
)
def test_a_load_without_meaning_or_limit_is_refused(changes):
    """Nothing to send, no time to answer, more samples than memory: said before anything starts."""
    with pytest.raises(ConfigError):
        spec(**changes)


def test_without_a_sequence_every_request_is_the_same_object():
    """The usual case costs nothing per request."""
    request = request_factory(spec(path="/status"), ENDPOINT)

    assert request(0) is request(1)


def test_a_sequence_makes_each_request_unique_at_a_constant_length():
    """In the path and in the body, wherever it stands, and the Content-Length stays right."""
    asked = spec(method="POST", path="/agents/{sequence}/execute", body='{"id": "x-{sequence}", "n": "{sequence}"}')
    request = request_factory(asked, ENDPOINT)

    first, later = request(0), request(123_456)

    assert len(first) == len(later)
    head, _, body = later.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /agents/000000123456/execute HTTP/1.1\r\n")
    assert body == b'{"id": "x-000000123456", "n": "000000123456"}'
    assert f"content-length: {len(body)}".encode() in head
