"""Keys to slots by name: this tenant there, by itself; the others by hash, or nowhere."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.database.placement.keys import Key, in_utc, kind_of
from headrace.database.placement.postgres_hash import hash_key
from headrace.errors import CallerError, ConfigError


@dataclass(frozen=True, slots=True)
class DirectoryRule:
    """A listed key has a slot of its own, behind the hashed ones; so it can move without anybody else.

    With `hashed` = 0 a key that is not listed is refused.
    """

    hashed: int
    """Slots of the keys that are not listed: a power of two, or 0."""
    keys: tuple[Key, ...]
    """The listed ones, by slot number from `hashed` on."""
    numbers: dict[tuple[str, Key], int] = field(compare=False, repr=False)

    @classmethod
    def listing(cls, hashed: int, keys: Sequence[Key]) -> "DirectoryRule":
        """The rule that lists these keys; refuses a key that is listed twice."""
        keys = [in_utc(key) for key in keys]
        numbers: dict[tuple[str, Key], int] = {}
        for number, key in enumerate(keys, hashed):
            # By kind too: to Python 1, 1.0 and True are one dictionary key.
            if numbers.setdefault((kind_of(key), key), number) != number:
                raise ConfigError(f"database.directory lists the key {key!r} twice.", fix="Give every key one shard.")
        return cls(hashed, tuple(keys), numbers)

    def slot(self, key: Key) -> int:
        """The slot of a key; refuses one that is not listed, if there are no slots for such."""
        number = self.numbers.get((kind_of(key), in_utc(key)))
        if number is not None:
            return number
        if not self.hashed:
            raise CallerError(
                f"The directory of the shard map does not list the key {key!r}, and refuses those that it does not.",
                fix='Give it a shard with `await db.assign(key, shard)`, or set directory_others = "hash".',
            )
        return hash_key(key) & (self.hashed - 1)

    def lists(self, key: Key) -> bool:
        """Whether the key has a slot of its own."""
        return (kind_of(key), in_utc(key)) in self.numbers

    def described(self) -> str:
        """In a few words, for errors and tables."""
        others = f"{self.hashed} slots for the others" if self.hashed else "no others"
        return f"{len(self.keys)} listed keys, {others}"
