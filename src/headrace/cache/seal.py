"""What makes an entry believable in a place that others can write to: a signature, or encryption.

    signed      header | 1 id length | 4 body length | id | body | 32 HMAC-SHA256
    encrypted   header | 1 id length | 4 body length | id | 16 salt | 12 nonce | body in AES-256-GCM | 16 tag

A seal covers all bytes of the entry and its place, the namespace and key that it was written for, which is not stored.
Which kind is required is decided by the configuration alone. The id only picks one of the configured secrets.

Random nonces are safe for 2^32 messages under one AES key (NIST SP 800-38D, 8.3), which busy processes that share a
key write within days. So nobody encrypts with the secret itself: each process derives a key from it with HKDF-SHA256
(RFC 5869) and a random salt, and takes a fresh salt long before the limit.
"""

import hmac
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import msgspec

from headrace.cache.config import RemoteConfig
from headrace.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SIGNED = 0x20
ENCRYPTED = 0x40
WRITES_A_SALT_MAX = 2**28
"""A sixteenth of what is safe, because a process that forks shares its salt with its children."""
CIPHERS_MAX = 1024
"""Derived keys that are kept: about one for each process that wrote what is read."""
_FRAME = struct.Struct("<BI")
_LENGTH = struct.Struct("<I")
_MAC_BYTES = 32
_SALT_BYTES = 16
_NONCE_BYTES = 12
_TAG_BYTES = 16
_PURPOSE = b"headrace cache entry, AES-256-GCM"


class Rejected(msgspec.Struct, frozen=True):
    """Bytes that are not a trustworthy entry for the key."""

    reason: str


class Seal(ABC):
    """Closes entries with the first of its secrets and opens those of any of them."""

    __slots__ = ("_namespace", "_secrets", "_writing_id")

    flag: ClassVar[int]
    """Its bit in an entry's flags."""
    kind: ClassVar[str]
    _purpose: ClassVar[str]
    _overhead: ClassVar[int]

    def __init__(self, secrets: Mapping[str, str], *, namespace: str) -> None:
        self._secrets = {name.encode(): secret.encode() for name, secret in secrets.items()}
        self._writing_id = next(iter(self._secrets))
        encoded = namespace.encode()
        self._namespace = _LENGTH.pack(len(encoded)) + encoded

    def place(self, key: str) -> bytes:
        """Where an entry belongs; lengths first, so that no two places read the same."""
        encoded = key.encode()
        return b"".join((self._namespace, _LENGTH.pack(len(encoded)), encoded))

    def close(self, place: bytes, head: bytes, body: bytes) -> bytes:
        """The whole entry."""
        return self._closed(
            place, b"".join((head, _FRAME.pack(len(self._writing_id), len(body)), self._writing_id)), body
        )

    def open(self, place: bytes, data: bytes, head_bytes: int) -> bytes | Rejected:
        """The body of an entry that belongs there and was closed by someone who knows a secret."""
        id_from = head_bytes + _FRAME.size
        if len(data) < id_from:
            return Rejected("cut")
        id_len, body_len = _FRAME.unpack_from(data, head_bytes)
        id_end = id_from + id_len
        if len(data) != id_end + self._overhead + body_len:
            return Rejected("cut, or longer than it was written")
        key_id = data[id_from:id_end]
        if key_id not in self._secrets:
            return Rejected(f"no {self._purpose} key has the id {key_id[:32].decode('ascii', 'backslashreplace')!r}")
        return self._opened(place, key_id, data, id_end)

    @abstractmethod
    def _closed(self, place: bytes, start: bytes, body: bytes) -> bytes:
        """All bytes of the entry, of which `start` comes before the seal's own."""

    @abstractmethod
    def _opened(self, place: bytes, key_id: bytes, data: bytes, at: int) -> bytes | Rejected:
        """The body; the seal's own bytes begin `at`, and the length of `data` is right."""


class Signature(Seal):
    """HMAC-SHA256: readable for all, written by those who know a secret."""

    __slots__ = ()

    flag = SIGNED
    kind = "signed"
    _purpose = "signing"
    _overhead = _MAC_BYTES

    def _closed(self, place: bytes, start: bytes, body: bytes) -> bytes:
        entry = start + body
        return entry + hmac.digest(self._secrets[self._writing_id], place + entry, "sha256")

    def _opened(self, place: bytes, key_id: bytes, data: bytes, at: int) -> bytes | Rejected:
        mac = hmac.digest(self._secrets[key_id], place + data[:-_MAC_BYTES], "sha256")
        if not hmac.compare_digest(mac, data[-_MAC_BYTES:]):
            return Rejected("signature does not match")
        return data[at:-_MAC_BYTES]


class Encryption(Seal):
    """AES-256-GCM: read and written by those who know a secret. Times, version and key id stay legible.

    Raises ConfigError if the package `cryptography` is not there.
    """

    __slots__ = ("_aead", "_ciphers", "_hash", "_invalid", "_kdf", "_random", "_salt", "_writes_left", "_writing")

    flag = ENCRYPTED
    kind = "encrypted"
    _purpose = "encryption"
    _overhead = _SALT_BYTES + _NONCE_BYTES + _TAG_BYTES

    def __init__(
        self, secrets: Mapping[str, str], *, namespace: str, random: Callable[[int], bytes] = os.urandom
    ) -> None:
        super().__init__(secrets, namespace=namespace)
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
            from cryptography.hazmat.primitives.hashes import SHA256
            from cryptography.hazmat.primitives.kdf.hkdf import HKDF
        except ImportError as error:
            raise ConfigError(
                f"RemoteConfig.encryption_keys is set, but the package cryptography is not usable: {error}.",
                fix="Run `pip install 'headrace[encryption]'`.",
            ) from error
        self._aead, self._kdf, self._hash, self._invalid = AESGCM, HKDF, SHA256, InvalidTag
        self._random = random
        self._ciphers: dict[tuple[bytes, bytes], AESGCM] = {}
        self._begin_salt()

    def _begin_salt(self) -> None:
        self._salt = self._random(_SALT_BYTES)
        self._writing = self._derived(self._writing_id, self._salt)
        self._keep(self._writing_id, self._salt, self._writing)
        self._writes_left = WRITES_A_SALT_MAX

    def _derived(self, key_id: bytes, salt: bytes) -> "AESGCM":
        kdf = self._kdf(algorithm=self._hash(), length=32, salt=salt, info=_PURPOSE)
        return self._aead(kdf.derive(self._secrets[key_id]))

    def _keep(self, key_id: bytes, salt: bytes, cipher: "AESGCM") -> None:
        if len(self._ciphers) >= CIPHERS_MAX:
            del self._ciphers[next(iter(self._ciphers))]
        self._ciphers[key_id, salt] = cipher

    def _closed(self, place: bytes, start: bytes, body: bytes) -> bytes:
        if self._writes_left == 0:
            self._begin_salt()
        self._writes_left -= 1
        nonce = self._random(_NONCE_BYTES)
        legible = start + self._salt
        return b"".join((legible, nonce, self._writing.encrypt(nonce, body, place + legible)))

    def _opened(self, place: bytes, key_id: bytes, data: bytes, at: int) -> bytes | Rejected:
        nonce_from = at + _SALT_BYTES
        body_from = nonce_from + _NONCE_BYTES
        salt = data[at:nonce_from]
        known = self._ciphers.get((key_id, salt))
        cipher = known or self._derived(key_id, salt)
        try:
            body = cipher.decrypt(data[nonce_from:body_from], data[body_from:], place + data[:nonce_from])
        except self._invalid:
            return Rejected("cannot be decrypted: altered, or encrypted with another secret of this id")
        if known is None:  # kept only now: forged salts must not push out the good ones
            self._keep(key_id, salt, cipher)
        return body


def seal_of(config: RemoteConfig, *, namespace: str) -> Seal | None:
    """The seal that a configuration asks for; None: entries are plain."""
    if config.encryption_keys is not None:
        return Encryption(config.encryption_keys, namespace=namespace)
    if config.signing_keys is not None:
        return Signature(config.signing_keys, namespace=namespace)
    if config.signing_key is not None:
        return Signature({"1": config.signing_key}, namespace=namespace)
    return None
