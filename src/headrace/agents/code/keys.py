"""The secrets that compiled code on disk is signed with.

The first of several signs, all of them verify: to rotate, put a new one in front and remove the old one when its
records are replaced. A secret is known by an id that is derived from it, so no name has to be kept beside it.
"""

import hmac
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from headrace.errors import ConfigError

SECRET_BYTES_MIN = 16
KEY_ID_BYTES = 8
MAC_BYTES = 32
_FILE_BYTES_MAX = 4096
_PURPOSE = b"headrace agent code, "


class SigningKeys:
    """One or several secrets: HMAC-SHA256 by the first, verified by the one that a record names."""

    __slots__ = ("_keys", "current")

    def __init__(self, secrets: Sequence[bytes]) -> None:
        # Not the secrets themselves: somebody may sign other things with the same ones.
        self._keys = {
            hmac.digest(secret, _PURPOSE + b"id", "sha256")[:KEY_ID_BYTES]: hmac.digest(
                secret, _PURPOSE + b"signature", "sha256"
            )
            for secret in secrets
        }
        self.current = next(iter(self._keys))
        """Id of the key that signs."""

    @classmethod
    def given(cls, signing_key: str | Sequence[str]) -> "SigningKeys":
        """Keys from a configuration. Raises `ConfigError`, which does not show them."""
        secrets = [signing_key] if isinstance(signing_key, str) else list(signing_key)
        if not secrets:
            raise ConfigError("CodeCache.signing_key is an empty list.", fix="Give one secret at least, or None.")
        if any(len(secret.encode()) < SECRET_BYTES_MIN for secret in secrets):
            raise ConfigError(
                f"A CodeCache.signing_key is shorter than {SECRET_BYTES_MIN} bytes; that is no secret.",
                fix="Make one with `openssl rand -base64 32`.",
            )
        return cls([secret.encode() for secret in secrets])

    @classmethod
    def of_file(cls, path: Path) -> "SigningKeys":
        """Keys from a file, one a line, which is made with a fresh one if it is not there.

        Raises OSError when it can be neither read nor made, or when somebody else could have written or read it.
        """
        try:
            return cls(_read(path))
        except FileNotFoundError:
            _create(path)
            return cls(_read(path))

    def __repr__(self) -> str:
        return f"SigningKeys({len(self._keys)} of them)"

    def sign(self, data: bytes) -> bytes:
        """The signature of `data` by the current key."""
        return hmac.digest(self._keys[self.current], data, "sha256")

    def knows(self, key_id: bytes) -> bool:
        """Whether a key has this id."""
        return key_id in self._keys

    def verifies(self, key_id: bytes, data: bytes | memoryview, signature: bytes) -> bool:
        """Whether the key of this id made the signature; compared in constant time."""
        return hmac.compare_digest(hmac.digest(self._keys[key_id], data, "sha256"), signature)


def _read(path: Path) -> list[bytes]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise PermissionError(f"{path} must be a file of this user with mode 0600: nobody else may know the key")
        secrets = [line.strip() for line in os.read(descriptor, _FILE_BYTES_MAX).splitlines() if line.strip()]
    finally:
        os.close(descriptor)
    if not secrets or any(len(secret) < SECRET_BYTES_MIN for secret in secrets):
        raise PermissionError(f"{path} must hold secrets of {SECRET_BYTES_MIN} bytes or more, one a line")
    return secrets


def _create(path: Path) -> None:
    """Make the file whole or not at all, once, however many processes try."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.write(descriptor, os.urandom(32).hex().encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.link(fresh, path)
    except FileExistsError:
        return  # another process was first; its key is everybody's
    finally:
        fresh.unlink()
