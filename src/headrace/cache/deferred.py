"""What has to be invalidated in the shared tier and could not be confirmed yet, in bounds."""

import re
from collections.abc import Iterable

from headrace.cache.policy import glob_pattern

PATTERNS_MAX = 64


class Deferred:
    """Invalidations that the tier has not confirmed yet."""

    __slots__ = ("_keys_max", "everything", "keys", "patterns", "tags")

    def __init__(self, keys_max: int) -> None:
        self._keys_max = keys_max
        self.keys: set[str] = set()
        self.tags: set[str] = set()
        self.patterns: dict[str, re.Pattern[str]] = {}
        self.everything = False

    @property
    def is_owed(self) -> bool:
        """Whether anything is."""
        return bool(self.keys or self.everything or self.patterns or self.tags)

    def covers(self, key: str) -> bool:
        """Whether what the tier says about `key` may not be believed."""
        if self.everything or key in self.keys:
            return True
        return any(pattern.match(key) for pattern in self.patterns.values())

    def add_keys(self, keys: Iterable[str]) -> None:
        """Keep keys; too many become a `clear`."""
        self.keys.update(keys)
        if len(self.keys) > self._keys_max:
            self.clear()
            self.everything = True

    def add_tags(self, tags: Iterable[str]) -> None:
        """Keep tags; too many become a `clear`."""
        self.tags.update(tags)
        if len(self.tags) > self._keys_max:
            self.clear()
            self.everything = True

    def add_pattern(self, glob: str) -> None:
        """Keep a pattern; too many become a `clear`."""
        self.patterns[glob] = glob_pattern(glob)
        if len(self.patterns) > PATTERNS_MAX:
            self.clear()
            self.everything = True

    def clear(self) -> None:
        """Nothing is owed any more."""
        self.keys.clear()
        self.tags.clear()
        self.patterns.clear()
        self.everything = False

    def names(self) -> list[str]:
        """What is owed, for people."""
        return [*self.keys, *(f"tag {tag}" for tag in self.tags), *self.patterns, *(["*"] if self.everything else [])]
