import pytest

from headrace.embedded import parameters
from headrace.errors import ConfigError

DOOR: dict[str, parameters.Value] = {"port": 5432, "listen_addresses": ""}


def test_the_defaults_are_durable_and_ready_for_logical_replication() -> None:
    """Nothing is acknowledged before it is on disk, and slots of a shard can be moved."""
    text = parameters.text({}, DOOR)
    assert "\nfsync = on\n" in text
    assert "\nsynchronous_commit = on\n" in text
    assert "\nwal_level = 'logical'\n" in text
    assert "\nmax_slot_wal_keep_size = '1GB'\n" in text


def test_a_wanted_setting_replaces_the_default() -> None:
    """A caller's value stands in the place of ours, once, whatever its case."""
    text = parameters.text({"Max_Connections": 20}, DOOR)
    assert "max_connections = '20'" in text
    assert "'100'" not in text


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("it's", "'it''s'"),
        (r"C:\x", r"'C:\\x'"),
        (True, "on"),
        (False, "off"),
        (0.9, "'0.9'"),
        ("größer", "'größer'"),
    ],
)
def test_values_are_quoted_as_postgres_reads_them(value: parameters.Value, written: str) -> None:
    """Quotes, backslashes, booleans and numbers arrive as what they are."""
    assert f"\nsearch_path = {written}\n" in parameters.text({"search_path": value}, DOOR)


@pytest.mark.parametrize("name", ["work mem", "a = 1\nb", "", "1st", "include '/etc/passwd' #"])
def test_a_name_that_is_no_parameter_is_refused(name: str) -> None:
    """A setting cannot smuggle in a second one."""
    with pytest.raises(ConfigError, match="not the name"):
        parameters.text({name: 1}, DOOR)


def test_a_value_with_a_line_break_is_refused() -> None:
    """A value cannot smuggle in a second setting either."""
    with pytest.raises(ConfigError, match="control character"):
        parameters.text({"search_path": "a\nfsync = off"}, DOOR)


@pytest.mark.parametrize("name", ["port", "PORT", "listen_addresses"])
def test_how_the_server_is_reached_cannot_be_changed(name: str) -> None:
    """The socket is where `url` says, so nobody may move it."""
    with pytest.raises(ConfigError, match="cannot be set"):
        parameters.text({name: "0"}, DOOR)
