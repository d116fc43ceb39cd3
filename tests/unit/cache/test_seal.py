"""Seals: which one a configuration asks for, what is in it, and that secrets stay out of sight."""

import hmac
import itertools
import json
import sys
from dataclasses import fields
from typing import Literal

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from headrace.cache import Cache, RemoteConfig
from headrace.cache import seal as seal_module
from headrace.cache.codec import HEAD_BYTES, Codec, Envelope, Rejected
from headrace.cache.seal import Encryption, Signature, seal_of
from headrace.cli import main
from headrace.config import Config, leaves, load_config
from headrace.errors import ConfigError

SECRET = "correct horse battery staple"
ENTRY = Envelope("value", 1, 2, 3)


def numbered(count: int) -> bytes:
    """Randomness that can be foreseen: 1, 2, 3 ... in as many bytes as asked for."""
    return next(NUMBERS).to_bytes(count, "big")


NUMBERS = itertools.count(1)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, None),
        ({"signing_key": SECRET}, Signature),
        ({"signing_keys": {"2026-11": SECRET}}, Signature),
        ({"encryption_keys": {"2026-11": SECRET}}, Encryption),
    ],
)
def test_the_configuration_names_the_seal(options, kind):
    """None, a signature or encryption."""
    found = seal_of(RemoteConfig(**options), namespace="shop")
    assert found is None if kind is None else isinstance(found, kind)


def test_one_signing_key_has_the_id_1():
    """A plain `signing_key` can be rotated away from: as id "1" it still reads what it wrote."""
    before = seal_of(RemoteConfig(signing_key=SECRET), namespace="shop")
    after = seal_of(RemoteConfig(signing_keys={"2": "another secret of ours", "1": SECRET}), namespace="shop")
    assert Codec(seal=after).open("k", Codec(seal=before).seal("k", ENTRY)) == ENTRY


def test_a_signed_entry_is_as_documented():
    """Header, id length, body length, id and body, with HMAC-SHA256 over the place and all of it."""
    data = Codec(seal=Signature({"ab": SECRET}, namespace="ns")).seal("key", ENTRY)
    place = b"\x02\0\0\0ns" + b"\x03\0\0\0key"
    assert data[HEAD_BYTES:-32] == b"\x02" + b"\x06\0\0\0" + b"ab" + b"\xa5value"
    assert data[-32:] == hmac.digest(SECRET.encode(), place + data[:-32], "sha256")


def test_an_encrypted_entry_is_as_documented():
    """Salt and nonce are legible; key by HKDF-SHA256, AES-256-GCM over the body and all before the nonce."""
    data = Codec(seal=Encryption({"ab": SECRET}, namespace="ns")).seal("key", ENTRY)
    at = HEAD_BYTES + 5 + 2
    kdf = HKDF(algorithm=SHA256(), length=32, salt=data[at : at + 16], info=b"headrace cache entry, AES-256-GCM")
    place = b"\x02\0\0\0ns" + b"\x03\0\0\0key"
    body = AESGCM(kdf.derive(SECRET.encode())).decrypt(
        data[at + 16 : at + 28], data[at + 28 :], place + data[: at + 16]
    )
    assert body == b"\xa5value"


def test_nonces_and_salts_come_from_the_given_source():
    """One salt when the seal is made, one nonce a write."""
    seal = Encryption({"a": SECRET}, namespace="ns", random=numbered)
    first, second = (Codec(seal=seal).seal("k", ENTRY) for _ in range(2))
    at = HEAD_BYTES + 6
    salt, nonce, next_nonce = (
        int.from_bytes(part) for part in (first[at : at + 16], first[at + 16 : at + 28], second[at + 16 : at + 28])
    )
    assert second[at : at + 16] == first[at : at + 16]
    assert (nonce - salt, next_nonce - salt) == (1, 2)


def test_a_salt_is_given_up_before_its_nonces_could_repeat(monkeypatch):
    """After the bound the next write begins another salt, and all entries stay readable."""
    monkeypatch.setattr(seal_module, "WRITES_A_SALT_MAX", 3)
    codec = Codec(seal=Encryption({"a": SECRET}, namespace="ns"))
    written = [codec.seal("k", ENTRY) for _ in range(8)]
    assert [len(list(group)) for _, group in itertools.groupby(data[HEAD_BYTES + 6 :][:16] for data in written)] == [
        3,
        3,
        2,
    ]
    assert [codec.open("k", data) for data in written] == [ENTRY] * 8


def test_derived_keys_are_kept_in_bounds(monkeypatch):
    """Entries of more processes than are remembered can be read, and forged salts are not remembered at all."""
    monkeypatch.setattr(seal_module, "CIPHERS_MAX", 4)
    reader = Encryption({"a": SECRET}, namespace="ns")
    written = [Codec(seal=Encryption({"a": SECRET}, namespace="ns")).seal("k", ENTRY) for _ in range(10)]
    assert [Codec(seal=reader).open("k", data) for data in written] == [ENTRY] * 10
    kept = set(reader._ciphers)
    assert len(kept) == 4
    assert [Codec(seal=reader).open("k", data) for data in written[-3:]] == [ENTRY] * 3
    assert set(reader._ciphers) == kept
    forged = written[-1][: HEAD_BYTES + 6] + bytes(16) + written[-1][HEAD_BYTES + 22 :]
    assert isinstance(Codec(seal=reader).open("k", forged), Rejected)
    assert set(reader._ciphers) == kept


def test_what_was_rejected_shows_a_strange_id_safely():
    """The id in a reason comes from the bytes: it is short and escaped."""
    codec = Codec(seal=Signature({"a" * 32: SECRET}, namespace="ns"))
    data = codec.seal("k", ENTRY)
    strange = data[: HEAD_BYTES + 5] + b"\n\xff" + data[HEAD_BYTES + 7 :]
    opened = codec.open("k", strange)
    assert isinstance(opened, Rejected)
    assert opened.reason.isprintable()
    assert len(opened.reason) < 80


def test_a_reason_does_not_quote_an_encrypted_value():
    """Reasons are logged. That the schema changed may be told, but not with the value that does not fit."""
    values = Literal["known"]
    reasons = []
    for kind in (Signature, Encryption):
        codec = Codec(seal=kind({"a": SECRET}, namespace="ns"))
        opened = codec.open("k", codec.seal("k", Envelope("a private value", 1, 2, 3)), values)
        assert isinstance(opened, Rejected)
        reasons.append(opened.reason)
    assert reasons == ["not readable: Invalid enum value 'a private value'", "not readable: ValidationError"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"encryption_keys": {"a": "short"}}, r"encryption_keys\['a'\].*16 bytes"),
        ({"signing_keys": {"a": SECRET, "b": "short"}}, r"signing_keys\['b'\].*16 bytes"),
        ({"encryption_keys": {"a": SECRET.encode()}}, r"encryption_keys\['a'\] must be text"),
        ({"encryption_keys": {}}, "encryption_keys must be a mapping of at least one"),
        ({"encryption_keys": SECRET}, "encryption_keys must be a mapping"),
        ({"signing_keys": {SECRET: "id"}}, "id of key 1 in RemoteConfig.signing_keys"),
        ({"signing_keys": {"a" * 33: SECRET}}, "1 to 32"),
        ({"signing_key": SECRET, "signing_keys": {"a": SECRET}}, "signing_key and signing_keys; .* one seal"),
        ({"signing_key": SECRET, "encryption_keys": {"a": SECRET}}, "signing_key and encryption_keys; .* one seal"),
        ({"value_bytes_max": 2**30}, "value_bytes_max"),
    ],
)
def test_impossible_keys_are_refused_unseen(options, said):
    """The error names the field, the id and the rule, and never a secret."""
    with pytest.raises(ConfigError, match=said) as caught:
        RemoteConfig(**options)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("field", ["signing_keys", "encryption_keys"])
def test_a_file_has_a_table_of_keys(tmp_path, field):
    """Ids are bare or quoted keys of the table, and the first line is the one that writes."""
    path = tmp_path / "headrace.toml"
    path.write_text(f'[cache.remote.{field}]\n"2026-11" = "{SECRET}"\nolder = "fedcba9876543210"\n')
    config = load_config(path).cache.remote
    assert config is not None
    assert list(getattr(config, field).items()) == [("2026-11", SECRET), ("older", "fedcba9876543210")]


def test_a_variable_has_the_table_in_one_line():
    """As an inline table of TOML; anything else is refused without being shown."""
    name = "HEADRACE_CACHE_REMOTE_ENCRYPTION_KEYS"
    config = load_config(environment={name: f'{{"2026-11" = "{SECRET}"}}'}).cache.remote
    assert config is not None
    assert config.encryption_keys == {"2026-11": SECRET}
    for wrong in (SECRET, f'["{SECRET}"]', "{a = 5}"):
        with pytest.raises(ConfigError, match=r"encryption_keys is \*\*\*") as caught:
            load_config(environment={name: wrong})
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("field", ["signing_key", "signing_keys", "encryption_keys"])
def test_secrets_are_not_shown(tmp_path, field):
    """Neither by the configuration, nor by what is made of it, nor by `headrace doctor`."""
    path = tmp_path / "headrace.toml"
    value = f'"{SECRET}"' if field == "signing_key" else f'{{ a = "{SECRET}" }}'
    path.write_text(f"[cache.remote]\n{field} = {value}\nurl = 'unix://{tmp_path}/nothing'\n")
    config = load_config(path)
    assert config.cache.remote is not None
    assert dict(leaves(config))[f"cache.remote.{field}"] == "***"
    sealing = seal_of(config.cache.remote, namespace="ns")
    shown = [config, config.cache.remote, sealing, Codec(seal=sealing)]
    assert not [each for each in shown if SECRET in repr(each)]
    said = CliRunner().invoke(main, ["doctor", "--json", "--config", str(path)]).output
    assert json.loads(said)["settings"][f"cache.remote.{field}"] == "***"
    assert SECRET not in said


def test_no_keys_are_shown_as_none():
    """Whoever looks whether entries are encrypted sees that they are not."""
    listed = dict(leaves(Config(cache=type(Config().cache)(remote=RemoteConfig()))))
    assert [listed[f"cache.remote.{name}"] for name in ("signing_key", "signing_keys", "encryption_keys")] == [
        None
    ] * 3


def test_a_configuration_with_keys_is_a_value():
    """It can be compared and hashed like any other."""
    a, b = (RemoteConfig(encryption_keys={"a": SECRET}) for _ in range(2))
    assert (a, hash(a)) == (b, hash(b))
    assert a != RemoteConfig()
    assert {each.name for each in fields(a) if not each.repr} >= {"signing_key", "signing_keys", "encryption_keys"}


async def test_without_the_package_the_fix_is_named(monkeypatch):
    """Encryption needs `cryptography`; who did not install it is told how, when the cache is opened."""
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(ConfigError, match=r"headrace\[encryption\]") as caught:
        await Cache(remote=RemoteConfig(encryption_keys={"a": SECRET})).open()
    assert SECRET not in str(caught.value)
