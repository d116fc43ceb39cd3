import pytest

from headrace.embedded import replica


@pytest.mark.parametrize(
    ("name", "slot"), [("replica-0", "replica_0"), ("Shard 1/Ärger", "shard_1__rger"), ("r" * 80, "r" * 63)]
)
def test_a_slot_has_a_name_that_postgres_takes(name: str, slot: str) -> None:
    """Only lower-case letters, digits and underscores, at most 63 of them."""
    assert replica.slot(name) == slot


def test_a_replica_follows_over_the_primarys_socket_under_its_own_name() -> None:
    """The primary can tell its replicas apart, and the slot keeps their log."""
    settings = replica.settings("postgresql:///headrace?host=%2Frun%2Fit%27s&port=5432&user=headrace", "replica-0")
    assert settings["primary_slot_name"] == "replica_0"
    assert "application_name=replica-0" in str(settings["primary_conninfo"])
    assert "host=/run/it\\'s" in str(settings["primary_conninfo"])
