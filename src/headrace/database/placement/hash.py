"""Keys to slots by hash: any key, spread evenly."""

from dataclasses import dataclass

from headrace.database.placement.postgres_hash import Key, hash_key


@dataclass(frozen=True, slots=True)
class HashRule:
    """The slot of a key is the low bits of Postgres' own extended hash."""

    slots: int
    """A power of two."""

    def slot(self, key: Key) -> int:
        """The slot of a key."""
        return hash_key(key) & (self.slots - 1)

    def described(self) -> str:
        """In a few words, for errors and tables."""
        return f"{self.slots} slots"
