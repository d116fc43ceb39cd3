"""Where a key lives in a Redis Cluster: hash slots and who serves them. Pure: bytes and replies in, data out.

[1] Redis Cluster specification, https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
"""

import binascii
from collections.abc import Sequence
from typing import Any

SLOTS = 16384

Address = tuple[str, int]


def slot_of(key: bytes) -> int:
    """The hash slot of a key: CRC16/XMODEM of its hash tag, or of all of it if it has none [1, Hash tags]."""
    start = key.find(b"{")
    if start >= 0:
        end = key.find(b"}", start + 1)
        if end > start + 1:
            key = key[start + 1 : end]
    return binascii.crc_hqx(key, 0) % SLOTS


def primaries(reply: Any, asked: Address) -> list[tuple[int, int, Address]] | None:
    """The (first slot, last slot, primary) of each range in a CLUSTER SLOTS reply; None if it is not one.

    A node may not know its own name yet and send an empty one: it means the address that was `asked`.
    """
    if not isinstance(reply, list):
        return None
    ranges: list[tuple[int, int, Address]] = []
    for line in reply:
        match line:
            case [int(first), int(last), [host, int(port), *_], *_] if 0 <= first <= last < SLOTS:
                name = host.decode() if isinstance(host, bytes) else ""
                ranges.append((first, last, (name if name not in {"", "?"} else asked[0], port)))
            case _:
                return None
    return ranges


def redirection(message: str, asked: Address) -> tuple[str, int, Address] | None:
    """`MOVED 3999 10.0.0.1:6381` or `ASK …` as (kind, slot, address); None for every other message."""
    words = message.split()
    if len(words) < 3 or words[0] not in {"MOVED", "ASK"}:
        return None
    host, colon, port = words[2].rpartition(":")
    if not colon or not port.isdigit() or not words[1].isdigit() or int(words[1]) >= SLOTS:
        return None
    return words[0], int(words[1]), (host.strip("[]") or asked[0], int(port))


def parse_addresses(text: str, *, port: int = 6379) -> list[Address]:
    """`h1:7000,h2,[::1]:7001` as addresses; ports that are not given are `port`."""
    addresses: list[Address] = []
    for part in text.split(","):
        host, colon, number = part.strip().rpartition(":")
        if not colon or number.endswith("]"):
            host, number = part.strip(), str(port)
        if not host or not number.isdigit() or not 0 < int(number) < 65536:
            raise ValueError(f"{part!r} is not host:port")
        addresses.append((host.strip("[]"), int(number)))
    return addresses


class SlotMap:
    """Which primary serves a slot, as last heard."""

    __slots__ = ("_owners",)

    def __init__(self) -> None:
        self._owners: list[Address | None] = [None] * SLOTS

    def owner(self, slot: int) -> Address | None:
        """The primary of the slot, if known."""
        return self._owners[slot]

    def move(self, slot: int, address: Address) -> None:
        """Note what a MOVED reply said."""
        self._owners[slot] = address

    def replace(self, ranges: Sequence[tuple[int, int, Address]]) -> None:
        """Note a whole CLUSTER SLOTS reply; slots that it leaves out are served by nobody."""
        owners: list[Address | None] = [None] * SLOTS
        for first, last, address in ranges:
            owners[first : last + 1] = [address] * (last + 1 - first)
        self._owners = owners

    def addresses(self) -> set[Address]:
        """Every primary that serves a slot."""
        return {address for address in self._owners if address is not None}
