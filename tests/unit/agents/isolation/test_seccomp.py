"""The list of system calls as the kernel would read it: the program is interpreted here, call by call."""

import struct

import pytest

from headrace.agents.isolation import seccomp, syscalls

COLUMNS = {"x86_64": syscalls.X86_64, "aarch64": syscalls.AARCH64}
OWN_PID = 1
THREAD = 0x3D0F00  # what glibc's pthread_create asks of clone
FORK = 0x0120_0011  # what its fork asks of it


def verdict(column: int, name: str | int, *arguments: int, arch: int | None = None) -> int:
    """What the filter says to a call: classic BPF over `struct seccomp_data`, as in the kernel's documentation."""
    number = syscalls.number(name, column) if isinstance(name, str) else name
    assert number is not None
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    machine = seccomp.AUDIT_ARCH[column] if arch is None else arch
    data = struct.pack("=IIQ6Q", number, machine, 0, *padded)
    code = seccomp.program(column, pid=OWN_PID)
    accumulator, at = 0, 0
    while True:
        operation, when_true, when_false, constant = code[at]
        at += 1
        if operation == seccomp.LOAD:
            accumulator = struct.unpack_from("=I", data, constant)[0]
        elif operation == seccomp.AND:
            accumulator &= constant
        elif operation == seccomp.EQUAL:
            at += when_true if accumulator == constant else when_false
        elif operation == seccomp.AT_LEAST:
            at += when_true if accumulator >= constant else when_false
        else:
            assert operation == seccomp.RETURN
            return constant


@pytest.fixture(params=COLUMNS)
def column(request: pytest.FixtureRequest) -> int:
    return COLUMNS[request.param]


def there(names: tuple[str, ...], column: int) -> list[str]:
    return [name for name in names if syscalls.number(name, column) is not None]


def test_every_call_of_each_list_gets_its_verdict(column: int) -> None:
    """What is allowed passes, what is refused gets EPERM, and what only attackers need ends the process."""
    verdicts = {
        seccomp.ALLOW: there(seccomp.ALLOWED, column),
        seccomp.EPERM: there(seccomp.REFUSED, column),
        seccomp.KILL: there(seccomp.FATAL, column),
    }

    for expected, names in verdicts.items():
        assert len(names) > 30
        assert {name: verdict(column, name) for name in names} == dict.fromkeys(names, expected)


def test_no_call_is_on_two_lists() -> None:
    """The first list that names a call would win, whichever was meant."""
    names = [*seccomp.ALLOWED, *seccomp.REFUSED, *seccomp.FATAL]

    assert len(set(names)) == len(names)
    assert set(names) < syscalls.NUMBERS.keys()


def test_no_two_names_share_a_number(column: int) -> None:
    """A slip in the table would allow another call than was meant."""
    numbers = [pair[column] for pair in syscalls.NUMBERS.values() if pair[column] is not None]

    assert len(set(numbers)) == len(numbers)


def test_a_call_that_is_not_known_looks_like_an_older_kernel(column: int) -> None:
    """Calls that do not exist yet are answered with ENOSYS."""
    assert verdict(column, 600) == seccomp.ENOSYS


def test_a_foreign_set_of_calls_ends_the_process(column: int) -> None:
    """Calls of another architecture, by which a number means something else, are deadly."""
    i386 = 0x4000_0003

    assert verdict(column, "read", arch=i386) == seccomp.KILL


def test_the_x32_numbers_end_the_process() -> None:
    """x86_64 has each call twice; the second set is closed."""
    assert verdict(syscalls.X86_64, 0x4000_0000) == seccomp.KILL
    assert verdict(syscalls.X86_64, 0x4000_0029, 2, 1) == seccomp.KILL


def test_clone_makes_threads_and_nothing_else(column: int) -> None:
    """A process, and a namespace in the flags of a thread, are refused; clone3 is unknown."""
    assert verdict(column, "clone", THREAD) == seccomp.ALLOW
    assert verdict(column, "clone", FORK) == seccomp.EPERM
    for namespace in (0x2_0000, 0x200_0000, 0x400_0000, 0x800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000):
        assert verdict(column, "clone", THREAD | namespace) == seccomp.EPERM
    assert verdict(column, "clone3") == seccomp.ENOSYS


@pytest.mark.parametrize(
    ("name", "passes", "fails"),
    [
        ("prctl", (15,), (1,)),  # PR_SET_NAME, PR_SET_PDEATHSIG
        ("prctl", (16,), (4,)),  # PR_GET_NAME, PR_SET_DUMPABLE
        ("socketpair", (1,), (2,)),  # AF_UNIX, AF_INET
        ("prlimit64", (0,), (7,)),  # itself, another
        ("tgkill", (OWN_PID,), (OWN_PID + 1,)),
        ("ioctl", (0, 0x5421), (0, 0x5412)),  # FIONBIO, TIOCSTI
        ("fcntl", (0, 4), (0, 8)),  # F_SETFL, F_SETOWN
        ("fcntl", (0, 1030), (0, 1031)),  # F_DUPFD_CLOEXEC, F_SETPIPE_SZ
        ("sendto", (3, 0, 1, 0x4000), (3, 0, 1, 0x4001)),  # MSG_NOSIGNAL, MSG_OOB with it
        ("recvfrom", (3, 0, 1, 0), (3, 0, 1, 1)),
    ],
)
def test_some_calls_depend_on_an_argument(column: int, name: str, passes: tuple[int], fails: tuple[int]) -> None:
    """What is harmless with one argument is refused with another."""
    assert verdict(column, name, *passes) == seccomp.ALLOW
    assert verdict(column, name, *fails) in {seccomp.EPERM, seccomp.ENOTTY}


def test_the_program_is_packed_as_the_kernel_reads_it(column: int) -> None:
    """Eight bytes an instruction, and no more instructions than the kernel takes."""
    code = seccomp.program(column, pid=OWN_PID)

    assert len(seccomp.packed(code)) == 8 * len(code)
    assert len(code) <= 4096
