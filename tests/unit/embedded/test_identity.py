import os
import pwd

import pytest

from headrace.embedded import identity
from headrace.embedded.directory import Owner
from headrace.embedded.identity import OWN, Identity


def test_an_ordinary_user_runs_postgres_as_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an account and without root there is nothing to become."""
    monkeypatch.setattr(os, "geteuid", lambda: pwd.getpwnam("nobody").pw_uid)
    assert identity.candidates() == [OWN]


def test_root_tries_a_namespace_before_the_account_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The namespace leaves the files to root, so it comes first; neither of the two is root inside."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(identity.sys, "platform", "linux")
    namespace, account = identity.candidates()
    assert namespace.mode == "namespace"
    assert pwd.getpwuid(namespace.uid).pw_uid != 0
    assert account == Identity("account", pwd.getpwnam("nobody").pw_uid, pwd.getpwnam("nobody").pw_gid)


def test_without_namespaces_root_has_the_account_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere than on Linux there are no user namespaces to try."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(identity.sys, "platform", "darwin")
    assert [candidate.mode for candidate in identity.candidates()] == ["account"]


def test_a_uid_without_an_account_borrows_a_name_by_a_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's random uid has no name, which initdb insists on; inside a namespace it gets one."""
    monkeypatch.setattr(os, "geteuid", lambda: 1_234_567)
    monkeypatch.setattr(identity.sys, "platform", "linux")
    assert [candidate.mode for candidate in identity.candidates()] == ["namespace"]


def test_files_belong_to_us_except_under_an_account() -> None:
    """A namespace changes what the server calls itself, not whom its files belong to."""
    me = Owner(os.geteuid(), os.getegid())
    assert OWN.owner == me
    assert Identity("namespace", 1, 1).owner == me
    assert Identity("account", 65534, 65533).owner == Owner(65534, 65533)
    assert Identity("account", 65534, 65533).groups == {65533}


def test_an_identity_is_named_as_people_would() -> None:
    """Error messages say who the server runs as."""
    nobody = pwd.getpwnam("nobody")
    assert str(Identity("account", nobody.pw_uid, nobody.pw_gid)) == "the account 'nobody'"
    assert str(Identity("namespace", 1, 1)) == f"uid {os.geteuid()} in a user namespace"
    assert str(OWN) == f"uid {os.geteuid()}"
