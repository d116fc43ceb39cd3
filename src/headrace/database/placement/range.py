"""Keys to slots by ranges: neighbours stay together."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from headrace.database.placement.keys import kind_of
from headrace.database.placement.postgres_hash import Key
from headrace.errors import CallerError, ConfigError


@dataclass(frozen=True, slots=True)
class RangeRule:
    """Slot n holds the keys from bound n - 1, inclusive, to bound n, exclusive; the first and the last have no end.

    Between bounds there can be neither gap nor overlap. Text is in the order of its code points, Postgres'
    `COLLATE "C"`.
    """

    kind: str
    bounds: tuple[Key, ...]

    @classmethod
    def between(cls, kind: str, bounds: Sequence[Key]) -> "RangeRule":
        """The rule with these bounds; refuses bounds of another kind and any that do not rise."""
        for bound in bounds:
            if kind_of(bound) != kind:
                raise ConfigError(
                    f"database.ranges: the bound {bound!r} is {kind_of(bound)}, the others are {kind}.",
                    fix="Give all bounds one type; database.key_type says which, where TOML has no such type.",
                )
        if kind == "boolean" or any(bound != bound for bound in bounds):
            raise ConfigError("database.ranges: booleans and NaN have no ranges.", fix='Use strategy = "hash".')
        for one, following in pairwise(bounds):
            if not one < following:  # type: ignore[operator]
                raise ConfigError(
                    f"database.ranges: the bound {following!r} comes after {one!r} and is not above it.",
                    fix="Sort the ranges by `until`, each above the one before.",
                )
        return cls(kind, tuple(bounds))

    def slot(self, key: Key) -> int:
        """The slot of a key; refuses one that is not of the bounds' kind."""
        kind = kind_of(key)
        if kind != self.kind or key != key:
            raise CallerError(
                f"The key {key!r} is {kind}; the ranges of the shard map are of {self.kind} keys.",
                fix="Pass the key as its column holds it.",
            )
        bounds: Any = self.bounds
        return bisect_right(bounds, key)

    def described(self) -> str:
        """In a few words, for errors and tables."""
        return f"{len(self.bounds) + 1} ranges of {self.kind} keys"
