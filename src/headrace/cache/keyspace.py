"""How the names in the shared tier are made.

    headrace:@generation                  random, and why it was made; a new one makes older entries unreachable
    headrace:@tag:<tag>                   random; an entry is valid while its tags have the tokens it was written with
    headrace:<generation>:{<key>}         an entry
    headrace@lease:<generation>:{<key>}   the lease of whoever loads it: in the same hash slot, and not tracked

Tokens are random instead of counted, so that a token that the server evicted or lost can never come back with an old
value.
"""

import re
from collections.abc import Callable

from headrace.cache.policy import glob_pattern
from headrace.errors import InvalidKey

KEY_BYTES_MAX = 1024
_WILDCARD = r"(?:\?|\[!?\]?[^\]]*\])"
_GLOB_PARTS = re.compile(
    rf"(?P<same>\[(?:[A-Za-z0-9](?:-[A-Za-z0-9])?)+\])|(?P<wider>{_WILDCARD}+)|(?P<literal>[\[\\])"
)
"""A set that Redis reads as we do; wildcards that it may not; what is none here but is one there."""


def check_key(key: object) -> str:
    """The key itself; raises InvalidKey for what cannot name an entry."""
    if not isinstance(key, str):
        raise InvalidKey(f"{key!r} is of type {key.__class__.__name__}; a key is a str.")
    if not key or len(key) > KEY_BYTES_MAX or len(key.encode("utf-8", "surrogatepass")) > KEY_BYTES_MAX:
        raise InvalidKey(f"The key {key[:64]!r} takes {len(key)} characters; 1 to {KEY_BYTES_MAX} bytes are allowed.")
    # A hash tag that begins with a closing brace is empty, and the lease would live in another slot than its entry.
    if key[0] == "}" or not key.isprintable():
        raise InvalidKey(f"The key {key[:64]!r} begins with a closing brace or holds unprintable characters.")
    return key


def _in_redis(part: re.Match[str]) -> str:
    """What matches in Redis whatever the part of a glob matches here, and perhaps more.

    There a wildcard stands for one byte, not for one character, and sets have other rules for `]`, `-` and `^`. One
    star ends a run of wildcards: more of them would cost the server a search.
    """
    text = part.group()
    match part.lastgroup:
        case "wider":
            return "?" * len(re.findall(_WILDCARD, text)) + "*"
        case "literal":
            return f"\\{text}"
        case _:
            return text


class Keyspace:
    """The names of one namespace in one generation."""

    __slots__ = ("_entry", "_lease", "generation", "generation_key", "namespace", "prefix")

    def __init__(self, namespace: str) -> None:
        if not namespace or not namespace.isprintable() or set(namespace) & set("{}*?[]\\@"):
            raise InvalidKey(
                f"The namespace {namespace!r} is empty or holds one of {{}}*?[]\\@.",
                fix="Use letters, digits, : and -.",
            )
        self.namespace = namespace
        self.prefix = f"{namespace}:".encode()
        self.generation_key = self.prefix + b"@generation"
        self.generation: bytes | None = None
        self._entry = b""
        self._lease = b""

    def enter(self, generation: bytes) -> None:
        """Speak of the entries of this generation from now on."""
        self.generation = generation
        self._entry = self.prefix + generation + b":{"
        self._lease = self.namespace.encode() + b"@lease:" + generation + b":{"

    def entry(self, key: str) -> bytes | None:
        """The name of an entry; None before the generation is known."""
        try:
            return b"%b%b}" % (self._entry, key.encode()) if self._entry else None
        except UnicodeEncodeError:
            check_key(key)  # says it in our words; reads leave the check of every key to the writers
            raise

    def name(self, key: str) -> bytes:
        """The name of an entry, once the generation is known."""
        return b"%b%b}" % (self._entry, key.encode())

    def lease(self, key: str) -> bytes:
        """The name of its lease."""
        return b"%b%b}" % (self._lease, key.encode())

    def tag(self, tag: str) -> bytes:
        """The name of a tag's token."""
        return self.prefix + b"@tag:" + tag.encode()

    def entries(self, glob: str) -> bytes:
        """A glob in Redis's own dialect of the entries and leases whose keys match, and perhaps some more."""
        dialect = _GLOB_PARTS.sub(_in_redis, glob).encode()
        return b"%b[:@]*%b:{%b}" % (self.namespace.encode(), self.generation or b"", dialect)

    def matcher(self, glob: str) -> "Callable[[bytes], bool | None]":
        """Tells of a found name whether it is an entry (True) or a lease (False) of a key that matches; None:
        neither."""
        pattern = glob_pattern(glob)

        def kind(name: bytes) -> bool | None:
            start = next((start for start in (self._entry, self._lease) if name.startswith(start)), None)
            if start is None or not pattern.match(name[len(start) : -1].decode("utf-8", "replace")):
                return None
            return start is self._entry

        return kind

    def parse(self, name: bytes) -> tuple[str, str] | None:
        """What a name speaks of: ("entry", key), ("tag", tag) or ("generation", ""); None for leases and strangers."""
        if name.startswith(self._entry) and self._entry and name.endswith(b"}"):
            return "entry", name[len(self._entry) : -1].decode("utf-8", "replace")
        if name == self.generation_key:
            return "generation", ""
        start = self.prefix + b"@tag:"
        if name.startswith(start):
            return "tag", name[len(start) :].decode("utf-8", "replace")
        return None
