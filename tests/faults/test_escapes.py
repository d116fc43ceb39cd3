"""Agents that try to get out of their worker, or to take the host down: each is contained, and the next one works.

The attacks run in the real pool, as deployed source. What they try is what the isolation promises to refuse; the level
is not downgraded where the kernel lacks a part, so these tests are skipped there.
"""

import asyncio
import json
import os
import signal
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from headrace.agents.definition import Source
from headrace.agents.isolation import IsolationConfig, Limits, ProcessOutcome, ProcessPool, WorkerKey, probe

achievable = probe()
pytestmark = pytest.mark.skipif(achievable.level != "process", reason=f"this kernel lacks {achievable.missing}")

GOOD = WorkerKey("neighbour", "good", "1")
EVIL = WorkerKey("tenant", "evil", "1")
SECRET = "a secret of the host"

FRAME = """
import asyncio, ctypes, errno, math, os, signal, socket, struct, sys, threading, time

def tried(function, *arguments):
    try:
        return repr(function(*arguments))
    except OSError as error:
        return errno.errorcode[error.errno]

def system_call(number, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")

class Agent:
    async def execute(self, input, context):
        if input == "behave":
            return "fine"
{body}
"""


def attack(body: str, *, is_async: bool = True) -> Source:
    text = FRAME.format(body=textwrap.indent(textwrap.dedent(body), " " * 8))
    if not is_async:
        text = text.replace("async def", "def")
    return Source(agent_id="evil", version="1", text=text)


@pytest.fixture
async def pool() -> AsyncIterator[ProcessPool]:
    config = IsolationConfig(cancel_grace_s=0.2, start_timeout_s=60.0, warm_min=1)
    async with ProcessPool(config, limits=Limits(memory_bytes=128 << 20)) as pool:
        await pool.start(GOOD, Source(agent_id="good", version="1", text="async def Agent(input, context): return 1"))
        yield pool
        await contained(pool)


async def contained(pool: ProcessPool) -> None:
    """The host is well: a neighbour runs, and the attacker's version runs again in a sound worker."""
    neighbour = await pool.execute(GOOD, b"0", execution_id="after", deadline_s=60)
    assert (neighbour.status, neighbour.output_json) == ("completed", b"1")
    again = await pool.execute(EVIL, b'"behave"', execution_id="again", deadline_s=60)
    assert (again.status, again.output_json) == ("completed", b'"fine"')


async def outcome_of(
    pool: ProcessPool, source: Source, *, input: Any = None, deadline_s: float = 60.0, limits: Limits | None = None
) -> ProcessOutcome:
    await pool.start(EVIL, source, limits)
    return await pool.execute(EVIL, json.dumps(input).encode(), execution_id="evil", deadline_s=deadline_s)


async def answer_of(pool: ProcessPool, source: Source, *, input: Any = None) -> Any:
    outcome = await outcome_of(pool, source, input=input)
    assert outcome.status == "completed", outcome.error
    return json.loads(outcome.output_json or b"null")


# -- what can be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/etc/shadow", "/proc/self/environ", "/proc/1/environ", "/dev/mem", __file__, "/"]
)
async def test_no_file_of_the_host_can_be_opened(pool: ProcessPool, path: str) -> None:
    """A path outside of the libraries does not exist for a worker, or is refused."""
    answer = await answer_of(pool, attack("return tried(os.open, input, os.O_RDONLY)"), input=path)

    assert answer in {"ENOENT", "EACCES", "ENOTDIR"}


async def test_the_parents_environment_and_descriptors_are_out_of_reach(
    pool: ProcessPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker has an environment of its own, no parent that it could name, and five descriptors."""
    monkeypatch.setenv("HEADRACE_SECRET", SECRET)
    body = """
    open_ones = []
    for descriptor in range(64):
        if tried(os.fstat, descriptor) != "EBADF":
            open_ones.append(descriptor)
    parent = [tried(os.open, f"/proc/{os.getppid()}/{name}", os.O_RDONLY) for name in ("environ", "fd", "mem")]
    return [os.getppid(), os.getpid(), dict(os.environ), len(open_ones), parent]
    """

    parent, own, environment, descriptors, opened = await answer_of(pool, attack(body))

    assert (parent, own) == (0, 1)
    assert SECRET not in str(environment)
    assert set(environment) <= {"MALLOC_ARENA_MAX", "LC_ALL", "LC_CTYPE", "TMPDIR"}
    # stdin, stdout, stderr, the host's socket, the loop's epoll and its pair of wake-up sockets.
    assert descriptors == 7
    assert set(opened) == {"ENOENT"}


async def test_the_memory_of_another_tenants_worker_cannot_be_read(pool: ProcessPool) -> None:
    """Reading another process's memory ends the worker, and the other one is no process it could name."""
    number = 310 if os.uname().machine == "x86_64" else 270
    body = f"""
    if input == "name":
        return [tried(os.getpgid, pid) for pid in range(2, 60)]
    system_call({number}, {pool.pids(GOOD)[0]}, 0, 0, 0, 0, 0)
    """
    names = await answer_of(pool, attack(body), input="name")

    outcome = await outcome_of(pool, attack(body))

    assert set(names) == {"ESRCH"}
    assert (outcome.status, "forbidden system call" in str(outcome.error)) == ("failed", True)


async def test_nothing_can_be_written(pool: ProcessPool) -> None:
    """Site-packages, the standard library, the root and, without a scratch space, /scratch are read-only."""
    body = """
    import json, msgspec
    places = [os.path.dirname(os.path.dirname(msgspec.__file__)), os.path.dirname(json.__file__), "/", "/scratch"]
    return [tried(os.open, f"{place}/planted.py", os.O_CREAT | os.O_WRONLY) for place in places]
    """
    answer = await answer_of(pool, attack(body))

    assert set(answer) <= {"EROFS", "EACCES"}


async def test_a_scratch_space_is_private_and_bounded(pool: ProcessPool) -> None:
    """With a scratch space an agent can write to TMPDIR up to its size, and nobody else sees it."""
    body = """
    import tempfile
    with open(f"{tempfile.gettempdir()}/planted", "wb", buffering=0) as file:
        first = file.write(b"x" * 1000)
        return [first, tried(file.write, b"x" * 10_000_000), os.listdir("/scratch")]
    """
    outcome = await outcome_of(pool, attack(body), limits=Limits(scratch_bytes=1 << 20))

    first, rest, listing = json.loads(outcome.output_json or b"null")
    assert first == 1000
    assert rest in {"EFBIG", "ENOSPC"} or int(rest) <= 1 << 20
    assert listing == ["planted"]
    assert not Path("/scratch/planted").exists()


# -- what can be reached ------------------------------------------------------------------------------------------


async def test_no_socket_can_be_opened(pool: ProcessPool) -> None:
    """Internet, Unix and netlink sockets are refused, and so is connecting a pair that is allowed."""
    body = """
    families = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET)
    return [tried(socket.socket, family, socket.SOCK_DGRAM) for family in families]
    """
    answer = await answer_of(pool, attack(body))

    assert set(answer) == {"EPERM"}


async def test_no_process_can_be_started(pool: ProcessPool) -> None:
    """A fork bomb does not get its first fork, and a program cannot be executed."""
    body = """
    program = sys.executable, ["python"]
    return [tried(os.fork), tried(os.execv, *program), tried(os.posix_spawn, *program, {})]
    """
    answer = await answer_of(pool, attack(body))

    assert answer[:2] == ["EPERM", "EPERM"]
    assert answer[2] in {"EPERM", "ENOENT", "ENOSYS"}


async def test_a_daemon_cannot_be_made(pool: ProcessPool) -> None:
    """Leaving by a double fork and a session of its own fails at both; the worker has no child."""
    answer = await answer_of(pool, attack("return [tried(os.fork), tried(os.setsid), tried(os.fork)]"))

    assert answer == ["EPERM", "EPERM", "EPERM"]
    assert [psutil.Process(pid).children() for pid in pool.pids(EVIL)] == [[]]


async def test_threads_are_bounded(pool: ProcessPool) -> None:
    """A bomb of threads stops at the limit of the worker alone."""
    body = """
    wall = threading.Event()
    threads = []
    try:
        for _ in range(10_000):
            threads.append(threading.Thread(target=wall.wait, daemon=True))
            threads[-1].start()
    except RuntimeError:
        pass
    wall.set()
    return len(threads)
    """
    outcome = await outcome_of(pool, attack(body), limits=Limits(processes=40, step_s=5))

    assert int(outcome.output_json or b"0") <= 40


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, 0])
async def test_the_parent_cannot_be_signalled(pool: ProcessPool, number: int) -> None:
    """Neither the host by its pid, nor its group, nor everybody."""
    body = f"return [tried(os.kill, pid, {int(number)}) for pid in (*input, 0, -1, os.getppid() or 2)]"

    answer = await answer_of(pool, attack(body), input=[os.getpid(), os.getppid()])

    assert set(answer) == {"EPERM"}


FORBIDDEN = {
    "ptrace": ((101, 117), "16, {host}, 0, 0"),
    "bpf": ((321, 280), "0, 0, 0"),
    "keyctl": ((250, 219), "0, 0, 0, 0, 0"),
    "mount": ((165, 40), "b'none', b'/', 0, 0x4000, 0"),
    "unshare": ((272, 97), "0x10000000"),
    "setns": ((308, 268), "0, 0"),
    "pivot_root": ((155, 41), "b'.', b'.'"),
    "kexec_load": ((246, 104), "0, 0, 0, 0"),
    "process_vm_writev": ((311, 271), "{host}, 0, 0, 0, 0, 0"),
    "pidfd_getfd": ((438, 438), "0, 0, 0"),
    "io_uring_setup": ((425, 425), "1, 0"),
    "userfaultfd": ((323, 282), "0"),
    "perf_event_open": ((298, 241), "0, 0, 0, 0, 0"),
}


@pytest.mark.parametrize("name", FORBIDDEN)
async def test_a_system_call_of_attackers_ends_the_worker(pool: ProcessPool, name: str) -> None:
    """What no agent needs is not refused but deadly; the execution failed, and says why."""
    numbers, arguments = FORBIDDEN[name]
    number = numbers[os.uname().machine != "x86_64"]

    outcome = await outcome_of(pool, attack(f"system_call({number}, {arguments.format(host=os.getpid())})"))

    assert outcome.status == "failed"
    assert outcome.error == "Its worker ended: it made a forbidden system call."
    assert pool.statistics().killed == 1


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x32 is a second set of calls of x86_64 alone")
async def test_the_second_set_of_call_numbers_is_closed(pool: ProcessPool) -> None:
    """The x32 numbers, which name the same calls again, do not get around the list."""
    outcome = await outcome_of(pool, attack("system_call(0x40000000 + 41, 2, 1, 0)"))

    assert outcome.error == "Its worker ended: it made a forbidden system call."


async def test_new_namespaces_cannot_be_had_by_clone(pool: ProcessPool) -> None:
    """`clone` makes threads and nothing else; `clone3`, whose flags no filter can see, does not exist."""
    clone, clone3 = (56, 435) if os.uname().machine == "x86_64" else (220, 435)
    body = f"return [tried(system_call, {clone}, 0x10000000 | 17, 0, 0, 0, 0), tried(system_call, {clone3}, 0, 0)]"

    assert await answer_of(pool, attack(body)) == ["EPERM", "ENOSYS"]


async def test_its_death_cannot_be_untied_from_the_hosts(pool: ProcessPool) -> None:
    """The parent-death signal cannot be reset, and no limit can be raised again."""
    prctl, prlimit = (157, 302) if os.uname().machine == "x86_64" else (167, 261)
    body = f"""
    import resource
    higher = struct.pack("QQ", 2**62, 2**62)
    def raised():
        try:
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        except ValueError:
            raise OSError(errno.EPERM, "refused")
    return [tried(system_call, {prctl}, 1, 0, 0, 0, 0), tried(raised), tried(system_call, {prlimit}, 2, 9, higher, 0)]
    """
    assert await answer_of(pool, attack(body)) == ["EPERM", "EPERM", "EPERM"]


# -- what can be used up ------------------------------------------------------------------------------------------


async def test_two_gigabytes_are_refused(pool: ProcessPool) -> None:
    """An allocation above the limit is the agent's own MemoryError; its worker and its neighbours go on."""
    outcome = await outcome_of(pool, attack("return len(bytearray(2 << 30))"))

    assert outcome.status == "failed"
    assert "MemoryError" in str(outcome.error)
    assert pool.statistics().killed == 0


async def test_memory_behind_files_is_refused_too(pool: ProcessPool) -> None:
    """What would hold memory outside of the address space cannot be made."""
    body = """
    near, far = socket.socketpair()
    reading, writing = os.pipe()
    return [
        tried(os.memfd_create, "hoard"),
        tried(socket.send_fds, near, [b"x"], [reading]),
        tried(near.setsockopt, socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24),
        tried(__import__("fcntl").fcntl, writing, 1031, 1 << 20),
    ]
    """
    assert await answer_of(pool, attack(body)) == ["EPERM"] * 4


@pytest.mark.parametrize(
    "event", [pytest.param("1", id="many small events"), pytest.param('"x" * 45_000', id="large events")]
)
async def test_a_flood_of_events_leaves_the_host_its_time(pool: ProcessPool, event: str) -> None:
    """What an agent says beyond what its host has time for is dropped and counted; the result comes all the same."""
    body = f"""
    heard = []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(True))
    until = time.monotonic() + 1.5
    while time.monotonic() < until or not heard:
        for _ in range(300):
            context.emit({event})
        await asyncio.sleep(0)
    return "said"
    """
    heard: list[bytes] = []
    await pool.start(EVIL, attack(body))
    (pid,) = pool.pids(EVIL)
    began, cpu_began = time.monotonic(), time.process_time()

    def hear(event: bytes) -> None:
        heard.append(event)
        if len(heard) == 11:
            os.kill(pid, signal.SIGUSR1)

    outcome = await pool.execute(EVIL, b"0", execution_id="evil", deadline_s=60, on_event=hear)

    assert (outcome.status, outcome.output_json) == ("completed", b'"said"')
    assert len(heard) > 10
    assert outcome.dropped_bytes > 0
    assert (time.process_time() - cpu_began) / (time.monotonic() - began) < 0.25


@pytest.mark.parametrize(
    "loop",
    [
        pytest.param("while True: pass", id="endless"),
        pytest.param(
            """
            while True:
                try:
                    while True: pass
                except BaseException: pass
            """,
            id="endless and swallowing every exception",
        ),
        pytest.param('sum(range(10**14)) + len("in C, where no signal interrupts")', id="endless in C"),
        pytest.param("time.sleep(60)", id="blocking the event loop"),
    ],
)
async def test_a_step_that_does_not_end_is_ended(pool: ProcessPool, loop: str) -> None:
    """An agent that keeps its loop to itself is killed and counted as a hog, long before its deadline."""
    outcome = await outcome_of(pool, attack(loop), deadline_s=60)

    assert outcome.status == "failed"
    assert "kept its event loop for more than 2 s" in str(outcome.error)
    assert pool.statistics().hogs == 1


async def test_the_others_of_a_hogs_worker_are_interrupted(pool: ProcessPool) -> None:
    """Executions beside a hog end as interrupted, which says that they may have run in part; the hog as failed."""
    body = """
    if input == "hog":
        while True: pass
    await asyncio.sleep(60)
    """
    await pool.start(EVIL, attack(body))
    calls = {
        name: asyncio.ensure_future(pool.execute(EVIL, json.dumps(name).encode(), execution_id=name, deadline_s=60))
        for name in ("one", "two", "hog")
    }

    outcomes = {name: await call for name, call in calls.items()}

    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "one": "interrupted",
        "two": "interrupted",
        "hog": "failed",
    }
    assert pool.statistics().interrupted == 2


async def test_a_thread_that_does_not_end_is_ended_at_its_deadline(pool: ProcessPool) -> None:
    """A synchronous agent cannot be cancelled, so its worker is killed a grace after the deadline."""
    outcome = await outcome_of(pool, attack("while True: pass", is_async=False), deadline_s=5.0)

    assert (outcome.status, outcome.error) == ("timeout", "It ran longer than 5 s; its worker was killed.")


async def test_an_agent_that_swallows_its_cancellation_is_ended(pool: ProcessPool) -> None:
    """A cancelled call comes back only when the work has stopped, if need be because its worker was killed."""
    body = """
    context.emit("begun")
    while True:
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            pass
    """
    await pool.start(EVIL, attack(body))
    (pid,) = pool.pids(EVIL)
    said: list[bytes] = []
    call = asyncio.ensure_future(pool.execute(EVIL, b"0", execution_id="evil", deadline_s=60, on_event=said.append))
    while not said:  # cancelled before its first step it would not begin
        await asyncio.sleep(0.01)

    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    assert not psutil.pid_exists(pid)


async def test_cpu_time_is_bounded_for_the_life_of_a_worker(pool: ProcessPool) -> None:
    """The kernel kills what uses up its CPU time, whatever the deadlines are."""
    source = attack("while True: pass", is_async=False)

    outcome = await outcome_of(pool, source, deadline_s=90, limits=Limits(cpu_s=1))

    assert (outcome.status, outcome.error) == ("failed", "Its worker ended: it used up its CPU time (Limits.cpu_s).")


async def test_a_gigabyte_printed_is_counted_and_dropped(pool: ProcessPool) -> None:
    """Of what an agent prints the first part arrives; the rest costs nobody memory."""
    said: list[str] = []
    body = """
    line = "x" * (1 << 20)
    for _ in range(1024):
        print(line)
        await asyncio.sleep(0)
    return "printed"
    """
    await pool.start(EVIL, attack(body))

    outcome = await pool.execute(
        EVIL, b"0", execution_id="loud", deadline_s=90, on_output=lambda _, text: said.append(text)
    )

    assert outcome.output_json == b'"printed"'
    assert sum(map(len, said)) == pool.limits.printed_bytes
    assert outcome.dropped_bytes == (1024 * ((1 << 20) + 1)) - pool.limits.printed_bytes
    assert pool.statistics().dropped_bytes == outcome.dropped_bytes


async def test_a_gigabyte_written_past_python_is_dropped(pool: ProcessPool) -> None:
    """The descriptors of stdout and stderr take a pipe's worth and then refuse; nobody reads them meanwhile."""
    body = """
    refused = 0
    for _ in range(1024):
        refused += tried(os.write, 1, bytes(1 << 20)) == "EAGAIN"
    return refused
    """
    assert await answer_of(pool, attack(body)) >= 1023


async def test_a_gigabyte_of_result_fails_the_execution(pool: ProcessPool) -> None:
    """A result above the limit is not sent, whether its size or the memory for it ends it."""
    limits = Limits(memory_bytes=128 << 20, step_s=20)
    outcome = await outcome_of(pool, attack('return ["x" * 1000] * (1 << 20)'), limits=limits)

    assert (outcome.status, outcome.output_json) == ("failed", None)


async def test_stopping_itself_ends_at_the_deadline(pool: ProcessPool) -> None:
    """SIGSTOP to itself is refused; a worker that is stopped from outside is killed like one that hangs."""
    assert await answer_of(pool, attack("return tried(os.kill, os.getpid(), signal.SIGSTOP)")) == "EPERM"
    await pool.stop(EVIL)
    # Stopped before its first step ended it would be one that keeps its loop, which ends earlier.
    limits = Limits(memory_bytes=128 << 20, step_s=60.0)
    await pool.start(EVIL, attack("context.emit('begun')\nawait asyncio.sleep(60)"), limits)
    (pid,) = pool.pids(EVIL)

    def stop(_event: bytes) -> None:
        os.kill(pid, signal.SIGSTOP)

    outcome = await pool.execute(EVIL, b"0", execution_id="stopped", deadline_s=5.0, on_event=stop)

    assert (outcome.status, outcome.error) == ("timeout", "It ran longer than 5 s; its worker was killed.")


@pytest.mark.parametrize(
    "death",
    ["os._exit(0)", "ctypes.string_at(0)", "os.abort()", "sys.setrecursionlimit(10**9); f = lambda: f(); f()"],
)
async def test_the_death_of_a_worker_is_the_failure_of_its_execution(pool: ProcessPool, death: str) -> None:
    """An exit, a crash or an abort ends the worker alone, and the execution says how."""
    outcome = await outcome_of(pool, attack(death))

    assert outcome.status == "failed"
    assert pool.statistics().killed == (1 if "recursion" not in death else pool.statistics().killed)


# -- what can be forged -------------------------------------------------------------------------------------------

FORGE = """
import msgspec
def frame(fields):
    data = msgspec.msgpack.encode(fields)
    return struct.pack("<I", len(data)) + data
for descriptor in range(3, 64):
    try:
        host = socket.socket(fileno=os.dup(descriptor))
        if host.family == socket.AF_UNIX and host.type == socket.SOCK_STREAM and host.getpeername() == "":
            host.setblocking(True)
            host.sendall({forged})
            host.setblocking(False)
    except OSError:
        continue
await asyncio.sleep(100)
"""


@pytest.mark.parametrize(
    "forged",
    [
        pytest.param("b'\\xff' * 100_000", id="a frame of four gigabytes"),
        pytest.param("struct.pack('<I', 3) + b'\\xc1\\xc1\\xc1'", id="no msgpack"),
        pytest.param("struct.pack('<I', 1) + b'\\x01'", id="another type"),
        pytest.param("frame(['Done', 999, 'completed', b'1', None, 0.0, 0])", id="an unknown execution"),
        pytest.param("frame(['Done', 1, 'completed', b'{]', None, 0.0, 0])", id="a result that is no JSON"),
        pytest.param("frame(['Done', 1, 'timeout', None, None, 0.0, 0])", id="a status that is the host's to give"),
        pytest.param("frame(['Emitted', 1, [b'{', b'1']])", id="an event that is no JSON"),
        pytest.param("frame(['Emitted', 1, [b'1' * 60000]])", id="more events than fit"),
        pytest.param("frame(['Emitted', 1, [b'1'] * 300])", id="too many events at once"),
        pytest.param("frame(['Done', 1, 'completed', b'1', None, math.inf, 0])", id="endless CPU time"),
        pytest.param("frame(['Loaded', True])", id="a report that nobody asked for"),
        pytest.param("frame(['Printed', 1, 'stdout', 'x' * 12000]) * 100", id="more output than it may keep"),
        pytest.param("frame(['Progressed', 1, 0, 0, '']) * 100_000", id="a flood of small frames"),
        pytest.param("frame(['Done', 1, 'failed', None, 'x' * 5000, 0.0, 0])", id="an error that is too long"),
    ],
)
async def test_a_forged_frame_ends_the_worker(pool: ProcessPool, forged: str) -> None:
    """What the protocol does not have, written onto the descriptors that a worker holds, costs it its life."""
    outcome = await outcome_of(pool, attack(FORGE.format(forged=forged)))

    assert outcome.status == "failed"
    assert "Its worker ended: it sent" in str(outcome.error)


async def test_a_forged_result_is_one_line(pool: ProcessPool) -> None:
    """Its line breaks cannot end a line of what the host writes about it."""
    forged = "frame(['Done', 1, 'completed', b'[1,\\n2]', None, 0.0, 0])"
    outcome = await outcome_of(pool, attack(FORGE.format(forged=forged)))

    assert (outcome.status, outcome.output_json) == ("completed", b"[1, 2]")


async def test_closing_every_descriptor_ends_the_worker(pool: ProcessPool) -> None:
    """A worker that hangs up on its host is killed."""
    outcome = await outcome_of(pool, attack("os.closerange(0, 64)\nawait asyncio.sleep(100)"))

    assert outcome.status == "failed"


# -- what goes down with what -------------------------------------------------------------------------------------


async def test_a_dead_zygote_is_replaced_and_its_workers_go_on(pool: ProcessPool) -> None:
    """The death of the zygote stops no execution, and a new one forks the next worker."""
    body = "await asyncio.sleep(0.3)\nreturn 7"
    await pool.start(EVIL, attack(body))
    call = asyncio.ensure_future(pool.execute(EVIL, b"0", execution_id="running", deadline_s=60))
    first = pool.zygote_pid
    assert first is not None

    os.kill(first, signal.SIGKILL)
    outcome = await call
    while pool.zygote_pid == first:
        await asyncio.sleep(0.01)

    assert outcome.output_json == b"7"
    assert pool.statistics().zygotes == 2
    forks = pool.statistics().forks
    await pool.stop(GOOD)
    await pool.start(GOOD, Source(agent_id="good", version="1", text="async def Agent(input, context): return 1"))
    while pool.statistics().forks == forks:  # the agent may have had a warm one: another takes its place
        await asyncio.sleep(0.01)
