"""What a caller wrote, so that it reads it again: carried by the context of its task.

A write notes the moment of its acknowledgement. A read of the same context is later given only a replica that has
replayed the primary's log as far as it was at some moment after that. A task knows what it wrote itself and what the
one that started it had written by then. Where tasks write for each other (`gather`; `wait_for` before Python 3.12),
all of them see it inside a `session()`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Final

_OWN: Final[ContextVar[Mapping[str, float]]] = ContextVar("headrace_own", default=MappingProxyType({}))
_SHARED: Final[ContextVar[dict[str, float] | None]] = ContextVar("headrace_shared", default=None)
_SEEN: Final[ContextVar[Mapping[str, int] | None]] = ContextVar("headrace_seen", default=None)


@contextmanager
def session(bookmark: Mapping[str, int] | None = None) -> Iterator[None]:
    """Writes inside are remembered together; reads inside also see all up to the log positions of a bookmark."""
    shared, seen = _SHARED.set(dict(_OWN.get())), _SEEN.set(bookmark)
    try:
        yield
    finally:
        _SHARED.reset(shared)
        _SEEN.reset(seen)


def note_write(shard: str, now: float) -> None:
    """The caller's context wrote on this shard, or may have."""
    shared = _SHARED.get()
    if shared is not None:
        shared[shard] = now
    else:
        _OWN.set({**_OWN.get(), shard: now})


def wrote_at(shard: str) -> float | None:
    """When the caller's context last wrote there, by the monotonic clock of its database; None: never."""
    shared = _SHARED.get()
    return (_OWN.get() if shared is None else shared).get(shard)


def seen_lsn(shard: str) -> int | None:
    """The position of the log that the caller's context must see; None: any."""
    seen = _SEEN.get()
    return None if seen is None else seen.get(shard)
