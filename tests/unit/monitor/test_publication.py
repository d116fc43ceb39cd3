"""Handing a picture from one process to the others."""

import msgspec
import pytest

from headrace.monitor.histogram import Distribution
from headrace.monitor.picture import latency_of, summary_of
from headrace.monitor.publication import SnapshotFile
from headrace.monitor.snapshot import Agents, Endpoint, Host, Point, Snapshot, Tier, Worker

LATENCY = latency_of(Distribution())
HOST = Host(None, 2.0, 5, 10, 1.5, None, None, None)


def snapshot(at=1.0):
    return Snapshot(
        at=at,
        interval_s=10.0,
        requests_per_s=2.0,
        errors_per_s=0.0,
        error_rate=None,
        connections=1,
        latency=LATENCY,
        endpoints=(Endpoint("GET", "/a", 2.0, 0.0, 0.5, LATENCY),),
        tiers=(Tier("memory", 1.0, 0.0, 1.0, 5, available=True),),
        agents=Agents(0, 0.0, 0.0, 0.0, 0.0, LATENCY),
        workers=(Worker(0, 7, 1.0, 2.0, None, None, None),),
        host=HOST,
    )


POINT = Point(1.0, 2.0, 0.0, None, None, None, 0.5, 10.0, 7, 0.0)


@pytest.fixture
def file(tmp_path):
    return SnapshotFile(tmp_path / "snapshot")


def test_what_is_written_is_read(file):
    """Snapshot, points and summaries come out as they went in."""
    summary = summary_of(5, None, (0.0, {}), 3.0)

    file.write(snapshot(), (POINT, POINT), (summary,))

    assert file.read() == (snapshot(), (POINT, POINT))
    assert file.publication().summaries == (summary,)


def test_nothing_published_reads_as_none(file):
    """Before the first publication there is nothing, and that is no error."""
    assert file.read() is None


def test_each_write_replaces_the_last(file):
    """A reader sees the newest, also one that read before."""
    reader = SnapshotFile(file.path)
    for at in (1.0, 2.0, 3.0):
        file.write(snapshot(at), ())
        assert reader.read() == (snapshot(at), ())


def test_an_unchanged_file_is_not_read_again(file):
    """Polling is one stat: the very same objects come back."""
    file.write(snapshot(), (POINT,))

    assert file.publication() is file.publication()


def test_a_removed_file_reads_as_none(file):
    """What is no longer published is no longer known."""
    file.write(snapshot(), ())
    assert file.read() is not None

    file.path.unlink()

    assert file.read() is None


@pytest.mark.parametrize(
    "foreign",
    [
        b"",
        b"headrace snapshot 1\n",
        b"headrace snapshot 2\n\x93",
        b"somebody else's file",
        b"headrace snapshot 1\n" + msgspec.msgpack.encode({"snapshot": 1, "points": []}),
        b"headrace snapshot 1\n" + b"\xc1" * 40,
        b"headrace snapshot 1\n\x81\xa2\xff\xff\xc0",
    ],
)
def test_a_foreign_file_reads_as_none(file, foreign):
    """Another version, another program, or bytes that make no sense: nothing is known, nothing raised."""
    file.path.write_bytes(foreign)

    assert file.read() is None


def test_a_torn_file_reads_as_none(file):
    """Cut anywhere, as after a power failure, it is not half believed."""
    file.write(snapshot(), (POINT,) * 3)
    whole = file.path.read_bytes()

    for length in range(0, len(whole), 7):
        file.path.write_bytes(whole[:length])
        assert SnapshotFile(file.path).read() is None


def test_a_write_that_fails_leaves_the_last_one_and_no_rest(file, monkeypatch):
    """When the disk is full, readers keep what they had and the unfinished file is gone."""
    file.write(snapshot(1.0), ())

    def no_space(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(file.path), "replace", no_space)
    with pytest.raises(OSError, match="No space left"):
        file.write(snapshot(2.0), ())

    assert file.read() == (snapshot(1.0), ())
    assert list(file.path.parent.iterdir()) == [file.path]
