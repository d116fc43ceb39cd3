"""The little of Redis's protocol that ChaosRemote reads."""

import hiredis
import pytest

from headrace.testing.chaos import _Frames

COMMANDS = [
    (b"GET", b"k"),
    (b"SET", b"k", b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n"),
    (b"SET", b"", b"\r\n" * 3),
    (b"PING",),
    (b"MGET", *(b"key:%d" % number for number in range(20))),
]
STREAM = b"".join(map(hiredis.pack_command, COMMANDS))


@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, len(STREAM)])
def test_commands_are_whole_however_they_are_cut(step):
    """Chunks of any size give the same commands, and their bytes together are the stream."""
    frames = _Frames()

    found = [frame for start in range(0, len(STREAM), step) for frame in frames.feed(STREAM[start : start + step])]

    assert [tuple(words) for words, _ in found] == COMMANDS
    assert b"".join(data for _, data in found) == STREAM


def test_inline_commands_are_understood():
    """A line typed into telnet is a command too; an empty line is none."""
    assert _Frames().feed(b"PING\r\n\r\nGET k\r\nGE") == [([b"PING"], b"PING\r\n"), ([b"GET", b"k"], b"GET k\r\n")]
