"""Which files a worker may read: Landlock, by the process upon itself, without any privilege.

Everything that this kernel's Landlock can deny is denied, then reading is allowed below the given directories.
Source: Linux, Documentation/userspace-api/landlock.rst. Limit: it does not govern stat and chmod, for which there is
the read-only root.
"""

import os
from collections.abc import Iterable

from headrace.agents.isolation import kernel

_READ = 1 << 2 | 1 << 3  # READ_FILE, READ_DIR
_BELOW_ABI_2 = (1 << 13) - 1
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_EXECUTE, _DEVICES, _LINKS = 1 << 0, 1 << 6 | 1 << 11, 1 << 12  # MAKE_CHAR, MAKE_BLOCK; MAKE_SYM
_TCP = 0b11  # bind, connect
_SCOPES = 0b11  # abstract unix sockets, signals


def _known(abi: int) -> tuple[kernel.RulesetAttributes, int]:
    """All that can be denied at this ABI, and the size of the structure there."""
    fs = _BELOW_ABI_2
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        if abi >= since:
            fs |= right
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    return kernel.RulesetAttributes(fs, _TCP if abi >= 4 else 0, _SCOPES if abi >= 6 else 0), size


def enforce(*, readable: Iterable[str], writable: Iterable[str]) -> None:
    """Allow reading below `readable`, plain files and directories to be made below `writable`, and nothing else."""
    attributes, size = _known(kernel.landlock_version())
    everything = attributes.fs & ~(_EXECUTE | _DEVICES | _LINKS | _IOCTL_DEV)
    ruleset = kernel.landlock_ruleset(attributes, size)
    try:
        for paths, access in ((readable, _READ), (writable, everything)):
            for path in paths:
                directory = os.open(path, os.O_PATH | os.O_CLOEXEC)
                try:
                    kernel.landlock_allow(ruleset, access, directory)
                finally:
                    os.close(directory)
        kernel.landlock_enforce(ruleset)
    finally:
        os.close(ruleset)
