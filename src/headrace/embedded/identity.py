"""Who an embedded Postgres runs as. It refuses root, and it wants a name for its uid.

As an ordinary user it simply runs as that user. As root, a user namespace makes root look like another uid from
inside, so that all files stay root's; where namespaces are forbidden (Docker's default profile) it becomes `nobody`,
which then owns the data directory. No directory that exists already ever gets another mode.
"""

import os
import pwd
import sys
from dataclasses import dataclass
from typing import Literal

from headrace.embedded.directory import Owner


@dataclass(frozen=True, slots=True)
class Identity:
    """What `launch` is told to become."""

    mode: Literal["own", "namespace", "account"]
    """See `headrace.embedded.launch`."""
    uid: int = 0
    """The uid that the server sees itself as; unused when `own`."""
    gid: int = 0
    """The gid that the server sees itself as; unused when `own`."""

    @property
    def owner(self) -> Owner:
        """Whom the server's files belong to, as everybody else sees it."""
        return Owner(self.uid, self.gid) if self.mode == "account" else Owner(os.geteuid(), os.getegid())

    @property
    def groups(self) -> frozenset[int]:
        """The groups whose rights the server has."""
        return frozenset({self.gid}) if self.mode == "account" else frozenset({os.getegid(), *os.getgroups()})

    def __str__(self) -> str:
        match self.mode:
            case "own":
                return f"uid {os.geteuid()}"
            case "namespace":
                return f"uid {os.geteuid()} in a user namespace"
            case "account":
                return f"the account {pwd.getpwuid(self.uid).pw_name!r}"


OWN = Identity("own")


def candidates() -> list[Identity]:
    """The identities that a Postgres may run as here, best first; the caller tries them in turn."""
    euid = os.geteuid()
    if euid != 0 and _has_account(euid):
        return [OWN]
    accounts = {account.pw_name: account for account in pwd.getpwall() if account.pw_uid != 0}
    found = []
    # nobody's uid also stands for every unmapped owner inside a namespace, so any other one shows clearer listings.
    inside = min(
        (account for name, account in accounts.items() if name != "nobody"), key=lambda a: a.pw_uid, default=None
    )
    if inside is not None and sys.platform == "linux":
        found.append(Identity("namespace", inside.pw_uid, inside.pw_gid))
    outside = accounts.get("nobody")
    if outside is not None and euid == 0:
        found.append(Identity("account", outside.pw_uid, outside.pw_gid))
    return found


def _has_account(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True
