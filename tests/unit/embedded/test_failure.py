import pytest

from headrace.embedded.failure import failure
from headrace.errors import DirectoryUnusable, EmbeddedServerFailed, PortTaken


@pytest.mark.parametrize(
    ("output", "error", "fix"),
    [
        ("FATAL: could not extend file: No space left on device", DirectoryUnusable, "Free some space"),
        ("could not write to file: Disk quota exceeded", DirectoryUnusable, "Free some space"),
        ("PANIC: could not write to file: File too large", DirectoryUnusable, "ulimit"),
        ('could not create directory "x": Read-only file system', DirectoryUnusable, "writable"),
        ('could not open file "x": Permission denied', DirectoryUnusable, "writable"),
        ("Could not create server TCP listening socket: bind: Address already in use", PortTaken, "another port"),
        ('FATAL: unrecognized configuration parameter "x"', EmbeddedServerFailed, "log"),
    ],
)
def test_the_words_of_a_server_decide_whose_fault_it_is(output: str, error: type[Exception], fix: str) -> None:
    """Each known complaint becomes the error of its kind, quotes the server, and says what to do."""
    found = failure("shard-0 ended with status 1.", f"LOG: starting\n{output}")
    assert type(found) is error
    assert found.message == f"shard-0 ended with status 1. It said:\n  LOG: starting\n  {output}\n"
    assert fix in found.fix


def test_a_server_that_said_nothing_is_reported_as_silent() -> None:
    """Without output the message does not pretend to quote any."""
    assert failure("redis ended with status -9.", "").message == "redis ended with status -9. It said nothing."
