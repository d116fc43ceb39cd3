"""What a cache can be told, as two frozen dataclasses: one for each tier."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from headrace.cache.topology import parse_addresses
from headrace.errors import ConfigError

SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel")

KEY_ID = re.compile(r"[A-Za-z0-9._-]{1,32}")
SECRET_BYTES_MIN = 16
VALUE_BYTES_LIMIT = 512 * 1024 * 1024


def _require(rule: bool, message: str) -> None:  # noqa: FBT001 - reads as a sentence at each call
    if not rule:
        raise ConfigError(message)


def _is_place(url: str) -> bool:
    """Whether a URL says where to connect to, in the form of its scheme."""
    try:
        parts = urlsplit(url)
        if "+" not in parts.scheme:
            return parts.port is None or parts.port > 0
        parse_addresses(parts.netloc.rsplit("@", 1)[-1])
    except ValueError:
        return False
    name, _, database = parts.path.strip("/").partition("/")
    return not parts.scheme.endswith("+sentinel") or (name != "" and (database == "" or database.isdigit()))


def _check_keys(name: str, keys: Any) -> None:
    """Refuse what is no keyring. No id is shown unless it is one: it may be a secret in the wrong place."""
    if keys is None:
        return
    _require(
        isinstance(keys, Mapping) and len(keys) > 0,
        f"RemoteConfig.{name} must be a mapping of at least one id to its secret; None turns it off.",
    )
    for number, (key_id, secret) in enumerate(keys.items(), start=1):
        _require(
            isinstance(key_id, str) and KEY_ID.fullmatch(key_id) is not None,
            f"The id of key {number} in RemoteConfig.{name} must be 1 to 32 letters, digits, dots, - or _.",
        )
        _require(
            isinstance(secret, str) and len(secret.encode()) >= SECRET_BYTES_MIN,
            f"RemoteConfig.{name}[{key_id!r}] must be text of at least {SECRET_BYTES_MIN} bytes;"
            " anything shorter is no secret.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """The in-memory tier (L1) of one process."""

    entries_max: int = 10_000
    """Upper bound of the number of entries."""
    ttl: float | None = 300.0
    """Seconds that a key without a policy lives, and the longest that a copy of a remote entry is kept; None: for
    ever."""
    policy: str = "adaptive"
    """Eviction policy: adaptive, lru, s3fifo, wtinylfu or sieve."""
    weight_max: int | None = None
    """Upper bound of the sum of all entries' estimated bytes; None: entries are only counted."""

    def __post_init__(self) -> None:
        _require(self.entries_max >= 1, f"MemoryConfig.entries_max is {self.entries_max}; it must be at least 1.")
        _require(
            self.ttl is None or self.ttl > 0, f"MemoryConfig.ttl is {self.ttl}; it must be above 0, or None for ever."
        )
        _require(
            self.weight_max is None or self.weight_max >= 1,
            f"MemoryConfig.weight_max is {self.weight_max}; it must be at least 1 byte, or None.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteConfig:
    """The shared tier (L2): Redis or Valkey, alone, behind Sentinel, or a Cluster."""

    url: str = field(default="redis://127.0.0.1:6379/0", repr=False)
    """`redis://user:password@host:6379/0`, `rediss://` for TLS, `unix:///path?db=0`,
    `redis+cluster://host1:port,host2:port`, `redis+sentinel://host1:port,host2:port/name/0`.
    TLS and other connection options go into the query as in redis-py: `?ssl_ca_certs=/etc/ca.pem`."""
    username: str | None = None
    """ACL user; the one of the URL if None."""
    password: str | None = field(default=None, repr=False)
    """Overrides the one of the URL."""
    connections_max: int = 100
    """Upper bound of open connections: one a node for calls, one a primary for invalidation."""
    timeout: float = 0.5
    """Seconds that one call may wait for its reply; later it counts as unavailable."""
    connect_timeout: float = 0.5
    """Seconds that connecting, TLS and authentication may take together."""
    pending_max: int = 16_384
    """Calls in flight a connection; beyond it a call fails at once instead of queueing."""
    compress_min: int | None = 1024
    """Bytes from which a payload is compressed with zstd; None: never."""
    value_bytes_max: int = 16 * 1024 * 1024
    """Largest payload that is written, read or unpacked; anything larger is refused."""
    signing_key: str | None = field(default=None, repr=False)
    """Secret of at least 16 bytes. With it every entry carries an HMAC-SHA256 and unsigned or altered ones are
    misses. The same as `signing_keys={"1": ...}`."""
    signing_keys: Mapping[str, str] | None = field(default=None, repr=False, hash=False)
    """Secrets by id, in order: the first one signs, all are accepted. For rotation."""
    encryption_keys: Mapping[str, str] | None = field(default=None, repr=False, hash=False)
    """Secrets by id, in order: the first one encrypts, all decrypt. With them every entry is encrypted with
    AES-256-GCM, and plain, only signed or altered ones are misses. Needs `pip install 'headrace[encryption]'`."""
    reconnect_wait_max: float = 5.0
    """Seconds between attempts to reconnect, at most; the first ones come sooner."""
    deferred_max: int = 10_000
    """Invalidations remembered while the tier is away; more of them clear the whole namespace on its return."""

    lease: float = 3.0
    """Seconds after which others may load a key whose loader died; a living loader renews it."""
    lease_wait_max: float = 30.0
    """Seconds that a caller waits for another process's load before it loads for itself and keeps nothing."""
    tracking: bool = True
    """Have the server tell which keys change, so that copies in memory are dropped at once (CLIENT TRACKING)."""
    degraded_ttl: float = 1.0
    """Seconds that copies in memory stay fresh, at most, while the server cannot tell."""
    write_behind_max: int = 10_000
    """Writes of WRITE_BEHIND keys that may be queued; when it is full, `set` waits for the shared tier itself."""
    spool_directory: str | None = None
    """Where queued writes are kept on disk, so that they outlive the process; None: in memory only. Processes share
    it."""
    spool_sync: bool = False
    """Wait for the disk itself before a queued write returns, to outlive a power loss too."""

    def __post_init__(self) -> None:
        scheme = self.url.split("://", 1)[0]
        _require(
            scheme in SCHEMES and "://" in self.url,
            # Without "://" it may be anything, a password for instance: only a scheme is shown.
            f"RemoteConfig.url starts with {scheme[:20]!r}; it must start with one of {', '.join(SCHEMES)}."
            if "://" in self.url
            else f"RemoteConfig.url has no '://'; it must start with one of {', '.join(SCHEMES)}.",
        )
        _require(
            _is_place(self.url),
            # Not shown: what stands where a port is looked for may be a password with a slash in it.
            "RemoteConfig.url does not name hosts, ports (and for Sentinel the primary and a database) as it should.",
        )
        for name in ("timeout", "connect_timeout", "reconnect_wait_max", "lease", "lease_wait_max", "degraded_ttl"):
            value = getattr(self, name)
            _require(value > 0, f"RemoteConfig.{name} is {value}; it must be above 0 seconds.")
        for name in ("connections_max", "pending_max", "value_bytes_max", "deferred_max", "write_behind_max"):
            value = getattr(self, name)
            _require(value >= 1, f"RemoteConfig.{name} is {value}; it must be at least 1.")
        _require(
            self.compress_min is None or self.compress_min >= 0,
            f"RemoteConfig.compress_min is {self.compress_min}; it must be 0 or more bytes, or None.",
        )
        _require(
            self.value_bytes_max <= VALUE_BYTES_LIMIT,
            f"RemoteConfig.value_bytes_max is {self.value_bytes_max}; Redis holds at most {VALUE_BYTES_LIMIT} bytes.",
        )
        _require(
            self.signing_key is None or len(self.signing_key.encode()) >= SECRET_BYTES_MIN,
            f"RemoteConfig.signing_key is shorter than {SECRET_BYTES_MIN} bytes; that is no secret.",
        )
        _check_keys("signing_keys", self.signing_keys)
        _check_keys("encryption_keys", self.encryption_keys)
        given = [
            name for name in ("signing_key", "signing_keys", "encryption_keys") if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ConfigError(
                f"RemoteConfig has {' and '.join(given)}; an entry has one seal.",
                fix="Keep one of them. What is encrypted needs no signature: AES-GCM notices every change by itself.",
            )

    @property
    def address(self) -> str:
        """The URL without user, password and query: what may be shown."""
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{rest.rsplit('@', 1)[-1].partition('?')[0]}"
