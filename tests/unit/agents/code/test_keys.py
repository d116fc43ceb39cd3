"""The secrets of compiled code: made once, kept to oneself, replaced in steps."""

import threading

import pytest

from headrace.agents.code.keys import SigningKeys
from headrace.errors import ConfigError

OLD, NEW = "o" * 32, "n" * 32


def test_the_first_key_signs_and_all_verify():
    """So a new one can be put in front before the old one goes."""
    old, both = SigningKeys.given(OLD), SigningKeys.given([NEW, OLD])

    assert both.verifies(old.current, b"data", old.sign(b"data"))
    assert both.current == SigningKeys.given(NEW).current
    assert not old.knows(both.current)


def test_a_signature_is_of_these_bytes_by_this_key():
    """Anything else does not verify."""
    both = SigningKeys.given([NEW, OLD])
    signature = both.sign(b"data")

    assert not both.verifies(both.current, b"Data", signature)
    assert not both.verifies(SigningKeys.given(OLD).current, b"data", signature)
    assert not both.verifies(both.current, b"data", signature[:-1])


@pytest.mark.parametrize("secret", ["", "short", ["long enough to be one", "short"], []])
def test_what_is_no_secret_is_refused_without_showing_it(secret):
    """The message goes to logs."""
    with pytest.raises(ConfigError) as caught:
        SigningKeys.given(secret)

    assert "long enough" not in str(caught.value)


def test_a_repr_shows_no_secret():
    """Neither it nor what is derived from it."""
    assert repr(SigningKeys.given([NEW, OLD])) == "SigningKeys(2 of them)"


def test_a_missing_file_is_made_for_the_owner_alone(tmp_path):
    """And read by everyone who comes later."""
    path = tmp_path / "deep" / "code.key"

    made, read = SigningKeys.of_file(path), SigningKeys.of_file(path)

    assert made.current == read.current
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_bytes().strip()) == 64
    assert list(path.parent.iterdir()) == [path]


def test_threads_that_make_the_file_agree_on_one_key(tmp_path):
    """Whoever comes second takes what the first one made."""
    ids, start = [], threading.Barrier(8)

    def make() -> None:
        start.wait()
        ids.append(SigningKeys.of_file(tmp_path / "code.key").current)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(ids) == 8
    assert len(set(ids)) == 1


def test_a_file_of_several_lines_rotates(tmp_path):
    """The first line signs, all verify."""
    path = tmp_path / "code.key"
    old = SigningKeys.of_file(path)
    path.write_text(f"{NEW}\n{path.read_text()}")

    both = SigningKeys.of_file(path)

    assert both.current != old.current
    assert both.verifies(old.current, b"data", old.sign(b"data"))


@pytest.mark.parametrize("text", ["", "\n\n", "short\n"])
def test_a_file_without_a_secret_is_not_used(tmp_path, text):
    """An empty key would be everybody's."""
    path = tmp_path / "code.key"
    path.write_text(text)
    path.chmod(0o600)

    with pytest.raises(PermissionError, match="16 bytes"):
        SigningKeys.of_file(path)


def test_a_file_that_others_can_read_is_not_used(tmp_path):
    """They could sign code that this process would run."""
    path = tmp_path / "code.key"
    SigningKeys.of_file(path)
    path.chmod(0o640)

    with pytest.raises(PermissionError, match="mode 0600"):
        SigningKeys.of_file(path)


def test_a_link_is_not_followed(tmp_path):
    """Neither to a file nor to where one could be made."""
    SigningKeys.of_file(tmp_path / "real.key")
    (tmp_path / "code.key").symlink_to(tmp_path / "real.key")
    (tmp_path / "dangling.key").symlink_to(tmp_path / "nothing")

    for name in ("code.key", "dangling.key"):
        with pytest.raises(OSError, match="symbolic links"):
            SigningKeys.of_file(tmp_path / name)
