"""What makes an embedded Postgres follow another one: a slot on the primary, and three settings of its own."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from headrace.embedded.parameters import Value
from headrace.errors import EmbeddedServerFailed

if TYPE_CHECKING:
    import psycopg

SIGNAL = "standby.signal"
"""The file whose presence makes a Postgres follow instead of lead."""

_CONNECT_TIMEOUT_S = 5
_STATE = "SELECT wal_status, active FROM pg_replication_slots WHERE slot_name = %s"
_LOOK_S = 0.1
_LOOKS_MAX = 300


def slot(name: str) -> str:
    """The replication slot of the replica `name`: lower-case letters, digits and underscores are all it may hold."""
    return re.sub(r"[^a-z0-9_]", "_", name.lower())[:63]


def conninfo(primary_url: str, name: str) -> str:
    """How the replica `name` connects; its name shows in the primary's pg_stat_replication."""
    from psycopg.conninfo import make_conninfo

    return make_conninfo(primary_url, application_name=name)


def settings(primary_url: str, name: str) -> dict[str, Value]:
    """The settings of a hot standby. By its feedback the primary keeps rows that a long read on it still sees."""
    return {
        "primary_conninfo": conninfo(primary_url, name),
        "primary_slot_name": slot(name),
        "hot_standby": True,
        "hot_standby_feedback": True,
    }


def can_go_on(primary_url: str, name: str) -> bool:
    """Whether the primary still has the log from where the replica left off.

    It has not when the slot is missing (this is another primary) or lost (the replica was away for longer than
    `max_slot_wal_keep_size`). Then only a fresh base backup helps.
    """
    with _asking(primary_url, name) as connection:
        state = connection.execute(_STATE, [slot(name)]).fetchone()
        return state is not None and state[0] != "lost"


def reserve(primary_url: str, name: str) -> None:
    """Have the primary keep its log from now on, for a base backup and the replica that grows out of it.

    An earlier reader of the slot may have gone a moment ago and not be missed yet. One that stays is left alone: it is
    another replica, whose name makes the same slot.
    """
    with _asking(primary_url, name) as connection:
        for _ in range(_LOOKS_MAX):
            state = connection.execute(_STATE, [slot(name)]).fetchone()
            if state is None or not state[1]:
                break
            connection.execute("SELECT pg_sleep(%s)", [_LOOK_S])
        if state is not None:
            connection.execute("SELECT pg_drop_replication_slot(%s)", [slot(name)])
        connection.execute("SELECT pg_create_physical_replication_slot(%s, true)", [slot(name)])


@contextmanager
def _asking(primary_url: str, name: str) -> "Iterator[psycopg.Connection]":
    import psycopg

    try:
        with psycopg.connect(primary_url, autocommit=True, connect_timeout=_CONNECT_TIMEOUT_S) as connection:
            yield connection
    except psycopg.Error as error:
        raise EmbeddedServerFailed(
            f"The primary of {name} has no replication slot for it: {error}.",
            fix="Start the primary first; look at its log if it runs.",
        ) from error
