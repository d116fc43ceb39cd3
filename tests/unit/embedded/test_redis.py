from pathlib import Path
from urllib.parse import unquote

import pytest

from headrace.embedded import EmbeddedRedis
from headrace.embedded.redis import _quoted


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("", '""'),
        ("a b", '"a b"'),
        ('say "hi"', r'"say \"hi\""'),
        ("back\\slash", r'"back\\slash"'),
        ("a\nb", r'"a\x0ab"'),
    ],
)
def test_values_are_quoted_as_redis_reads_them(value: str, written: str) -> None:
    """A path with blanks, quotes or a line break stays one value."""
    assert _quoted(value) == written


def test_the_url_is_known_before_the_server_runs(tmp_path: Path) -> None:
    """A process that only connects can make the url from the directory; odd characters are escaped."""
    url = EmbeddedRedis(Path("/srv/a b#c")).url
    assert url == "unix:///srv/a%20b%23c/run/redis.sock"
    assert unquote(url) == "unix:///srv/a b#c/run/redis.sock"
