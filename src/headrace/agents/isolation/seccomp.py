"""The list of system calls that a worker may make, as a BPF program for seccomp.

Intuition: a guest list, not a list of troublemakers. What is on it passes; a few pass with the right argument; what
only an attack needs ends the process; what a library may innocently try is refused with EPERM; everything else, calls
that do not exist yet too, looks like an older kernel (ENOSYS), for which libraries have a fallback.
Source: Linux, Documentation/userspace-api/seccomp_filter.rst; the list began with what CPython and glibc make when an
asyncio loop, threads, imports and timers run. Limit: what arguments point to
cannot be seen, so files are Landlock's.
"""

import errno
import platform
import struct
from collections.abc import Iterable, Sequence
from functools import cache

from headrace.agents.isolation import kernel, syscalls

Instruction = tuple[int, int, int, int]
"""Operation, jumps when true and false, constant: `struct sock_filter`."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ALLOWED = _names("""
read write futex epoll_wait epoll_pwait clock_gettime mmap munmap mremap mprotect madvise brk close
readv writev pread64 pwrite64 lseek fstat newfstatat stat lstat statx open openat getdents64 readlink readlinkat
access faccessat faccessat2 getcwd chdir fchdir mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2
ftruncate truncate fallocate fsync fdatasync umask fadvise64 sendfile copy_file_range statfs fstatfs utimensat
fchmod chmod fchmodat mincore membarrier set_robust_list rseq sched_yield sched_getaffinity set_tid_address
restart_syscall exit exit_group rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend
sigaltstack poll ppoll select pselect6 epoll_create1 epoll_ctl eventfd2 pipe pipe2 dup dup2 dup3 timerfd_create
timerfd_settime timerfd_gettime shutdown getsockopt getsockname getpeername getpid gettid
getppid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp getpgid getsid getpriority uname sysinfo
getrusage times getrlimit setrlimit arch_prctl getcpu time clock_getres clock_nanosleep nanosleep gettimeofday
getitimer setitimer alarm getrandom
""")
"""Sockets that are open may be used; none can be opened. Lowering a limit of one's own harms nobody."""

REFUSED = _names("""
socket connect bind listen accept accept4 sendmsg recvmsg setsockopt fork vfork execve execveat kill tkill
rt_sigqueueinfo rt_tgsigqueueinfo memfd_create setpriority sched_setscheduler sched_setaffinity setsid setpgid setuid
setgid setreuid setregid setresuid setresgid setgroups capset wait4 waitid inotify_init1 inotify_add_watch pidfd_open
pidfd_send_signal mknodat symlinkat linkat chown fchownat sethostname mlock mlockall shmget msgget semget mq_open
""")
"""What would hold more than the limit of the address space sees: `memfd_create`, shared memory, and `sendmsg`, with
which descriptors wait in sockets where no limit counts them. `setsockopt` enlarges buffers and runs BPF programs."""

FATAL = _names("""
ptrace process_vm_readv process_vm_writev pidfd_getfd bpf keyctl add_key request_key mount umount2 pivot_root chroot
unshare setns open_tree move_mount mount_setattr fsopen fsconfig fsmount fspick kexec_load kexec_file_load init_module
finit_module delete_module perf_event_open userfaultfd open_by_handle_at name_to_handle_at io_uring_setup
io_uring_enter io_uring_register reboot swapon swapoff acct quotactl settimeofday clock_settime clock_adjtime adjtimex
iopl ioperm personality seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret
process_madvise kcmp syslog vhangup fanotify_init
""")

ALLOW = 0x7FFF_0000
KILL = 0x8000_0000
_EPERM, _ENOTTY, _ENOSYS = 1, 25, 38
EPERM = 0x0005_0000 | _EPERM
ENOTTY = 0x0005_0000 | _ENOTTY
ENOSYS = 0x0005_0000 | _ENOSYS

AUDIT_ARCH = {syscalls.X86_64: 0xC000_003E, syscalls.AARCH64: 0xC000_00B7}

LOAD, EQUAL, AT_LEAST, AND, RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16
_X32_BIT = 0x4000_0000

# CLONE_VM | CLONE_SIGHAND | CLONE_THREAD and no namespace: a thread, which is all that clone may make.
_THREAD = 0x0001_0900
_CLONE_MASK = _THREAD | 0x7E02_0000 | 0x80  # every CLONE_NEW*: time's is 0x80
_AF_UNIX = 1
_PR_SET_NAME, _PR_GET_NAME = 15, 16
_MSG_OOB = 1
# F_DUPFD to F_SETLKW, OFD locks, F_DUPFD_CLOEXEC, F_GETPIPE_SZ: no signals to owners, no leases, no larger pipes.
_FCNTLS = (*range(8), 36, 37, 38, 1030, 1032)
_IOCTLS = (0x5401, 0x5421, 0x5450, 0x5451)  # TCGETS (isatty), FIONBIO, FIONCLEX, FIOCLEX


def program(column: int, *, pid: int) -> list[Instruction]:
    """The filter for a machine, for a process that calls itself `pid`."""
    code: list[Instruction] = [
        (LOAD, 0, 0, _ARCH_AT),
        (EQUAL, 1, 0, AUDIT_ARCH[column]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, _NUMBER_AT),
    ]
    if column == syscalls.X86_64:
        code += [(AT_LEAST, 0, 1, _X32_BIT), (RETURN, 0, 0, KILL)]
    code += _each(ALLOWED, column, ALLOW)
    code += _when("clone", column, _argument_is(0, (_THREAD,), EPERM, mask=_CLONE_MASK))
    code += _when("clone3", column, [(RETURN, 0, 0, ENOSYS)])  # its flags are behind a pointer; glibc falls back
    code += _when("prctl", column, _argument_is(0, (_PR_SET_NAME, _PR_GET_NAME), EPERM))
    code += _when("fcntl", column, _argument_is(1, _FCNTLS, EPERM))
    for name in ("sendto", "recvfrom"):  # urgent data on Unix sockets, which nobody uses, has led into the kernel
        code += _when(name, column, _argument_is(3, (0,), EPERM, mask=_MSG_OOB))
    code += _when("ioctl", column, _argument_is(1, _IOCTLS, ENOTTY))
    code += _when("socketpair", column, _argument_is(0, (_AF_UNIX,), EPERM))
    code += _when("prlimit64", column, _argument_is(0, (0,), EPERM))
    code += _when("tgkill", column, _argument_is(0, (pid,), EPERM))
    code += _each(REFUSED, column, EPERM)
    code += _each(FATAL, column, KILL)
    code.append((RETURN, 0, 0, ENOSYS))
    return code


def _each(names: Iterable[str], column: int, action: int) -> list[Instruction]:
    return [step for name in names for step in _when(name, column, [(RETURN, 0, 0, action)])]


def _when(name: str, column: int, then: Sequence[Instruction]) -> list[Instruction]:
    number = syscalls.number(name, column)
    return [] if number is None else [(EQUAL, 0, len(then), number), *then]


def _argument_is(index: int, values: Sequence[int], otherwise: int, *, mask: int = 0) -> list[Instruction]:
    """Allow when the lower half of an argument, masked, is one of the values; the kernel reads no more of them."""
    code: list[Instruction] = [(LOAD, 0, 0, _ARGUMENTS_AT + 8 * index)]
    if mask:
        code.append((AND, 0, 0, mask))
    for value in values:
        code += [(EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOW)]
    return [*code, (RETURN, 0, 0, otherwise)]


def packed(code: Sequence[Instruction]) -> bytes:
    """The program as the kernel reads it."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


@cache
def compiled(*, pid: int) -> bytes:
    """The filter for this machine; it is made once, before the workers that need it are forked."""
    column = syscalls.machine()
    if column is None:
        raise OSError(errno.ENOSYS, f"this machine ({platform.machine()}) is neither x86_64 nor aarch64")
    return packed(program(column, pid=pid))


def enforce(*, pid: int) -> None:
    """Hold this process to the list, for good."""
    kernel.install_filter(compiled(pid=pid))
