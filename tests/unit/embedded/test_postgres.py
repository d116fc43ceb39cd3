import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from headrace.embedded import EmbeddedPostgres, postgres

READY = b"Z" + struct.pack("!ic", 5, b"I")
WELCOME = b"R" + struct.pack("!ii", 8, 0) + READY
COLUMN = b"n\0" + struct.pack("!ihihih", 0, 0, 23, 4, -1, 0)
ROW = b"T" + struct.pack("!ih", 6 + len(COLUMN), 1) + COLUMN + b"D" + struct.pack("!ihi", 11, 1, 1) + b"1"
ONE = ROW + b"C" + struct.pack("!i", 13) + b"SELECT 1\0" + READY


@pytest.fixture
def shard(tmp_path: Path) -> EmbeddedPostgres:
    """A shard that was never started."""
    return EmbeddedPostgres(tmp_path, name="shard-0")


@pytest.fixture
def door(shard: EmbeddedPostgres) -> Iterator[socket.socket]:
    """Where the shard would listen; the test does."""
    place = parse_qs(urlsplit(shard.url).query)
    path = Path(place["host"][0], f".s.PGSQL.{place['port'][0]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        yield listening
    path.unlink()


def test_asking_whether_it_is_ready_holds_up_nobody_else(shard, door, monkeypatch) -> None:
    """Other threads go on while it takes its time: here one of them is the server, and its answer arrives."""
    monkeypatch.setattr(postgres, "_READY_TIMEOUT_S", 20)
    told: list[bool] = []
    asking = threading.Thread(target=lambda: told.append(shard.is_ready()))
    asking.start()

    client, _ = door.accept()
    with client:
        for answer in (WELCOME, ONE):
            assert client.recv(1_024)
            client.sendall(answer)
        asking.join()

    assert told == [True]
