"""Each part of the isolation by itself, as the kernel reports it of a real worker or as it works alone."""

import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from headrace.agents.definition import Source
from headrace.agents.isolation import IsolationConfig, Limits, ProcessPool, WorkerKey, kernel, landlock, probe, seccomp

achievable = probe()
pytestmark = pytest.mark.skipif(achievable.level != "process", reason=f"this kernel lacks {achievable.missing}")

KEY = WorkerKey("tenant", "agent", "1")
LIMITS = Limits(memory_bytes=100 << 20, cpu_s=7, files=33, processes=22)
AGENT = """
import os, resource, sys
async def Agent(input, context):
    if input == "tree":
        return {path: sorted(os.listdir(path)) for path in ("/", "/scratch")}
    if input == "imports":
        import sqlite3, ssl, msgspec, xml.etree.ElementTree
        return [ssl.OPENSSL_VERSION != "", sqlite3.sqlite_version != ""]
    if input == "limits":
        names = ("CPU", "NOFILE", "NPROC", "FSIZE", "CORE", "AS")
        return {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in names}
    return os.uname().nodename
"""


@pytest.fixture
async def pool() -> AsyncIterator[ProcessPool]:
    async with ProcessPool(IsolationConfig(), limits=LIMITS) as pool:
        await pool.start(KEY, Source(agent_id="agent", version="1", text=AGENT))
        yield pool


async def answer(pool: ProcessPool, input: str) -> Any:
    outcome = await pool.execute(KEY, json.dumps(input).encode(), execution_id="e", deadline_s=60)
    assert outcome.output_json is not None, outcome.error
    return json.loads(outcome.output_json)


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


# -- as the kernel reports it -------------------------------------------------------------------------------------


async def test_a_worker_has_no_rights(pool: ProcessPool) -> None:
    """No capability in any set, none to be gained, a filter on its calls, and no group of the host's."""
    (pid,) = pool.pids(KEY)

    found = status(pid)

    assert {found[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    assert found["Groups"] == "" or os.geteuid() != 0


async def test_a_worker_of_root_is_nobody(pool: ProcessPool) -> None:
    """A pool of root gives its workers a user without rights on files; another user's are that user."""
    (pid,) = pool.pids(KEY)
    expected = 65534 if os.geteuid() == 0 else os.geteuid()

    assert set(status(pid)["Uid"].split()) == {str(expected)}
    assert pool.zygote_pid is not None
    assert set(status(pool.zygote_pid)["Uid"].split()) == {str(expected)}


async def test_a_worker_has_namespaces_of_its_own(pool: ProcessPool) -> None:
    """None of the six is the host's or another worker's; who has no right over a worker cannot even look."""
    other = KEY._replace(version="2")
    await pool.start(other, Source(agent_id="agent", version="2", text=AGENT))
    pids = [os.getpid(), *pool.pids(KEY), *pool.pids(other)]

    for name in ("user", "mnt", "pid", "ipc", "net", "uts"):
        if os.geteuid() == 0:
            assert len({Path(f"/proc/{pid}/ns/{name}").readlink() for pid in pids}) == 3
        else:
            with pytest.raises(PermissionError):
                Path(f"/proc/{pids[1]}/ns/{name}").readlink()
    assert status(pids[1])["NSpid"].split()[-1] == "1"
    assert await answer(pool, "name") == "worker"


async def test_a_workers_limits_are_in_force(pool: ProcessPool) -> None:
    """What was asked for is what the kernel holds it to."""
    found = await answer(pool, "limits")

    address_space = found.pop("AS")
    assert found == {"CPU": [7, 8], "NOFILE": [33, 33], "NPROC": [22, 22], "FSIZE": [0, 0], "CORE": [0, 0]}
    assert 100 << 20 < address_space[0] == address_space[1] < 400 << 20


async def test_a_worker_goes_before_its_host_when_memory_runs_out(pool: ProcessPool) -> None:
    """The kernel looks for whom to kill by this score; the zygote, which is soon made again, has it too."""
    for pid in (*pool.pids(KEY), pool.zygote_pid):
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"


async def test_a_worker_is_a_child_of_its_host(pool: ProcessPool) -> None:
    """Not of the zygote: so its end is seen, and it ends with the host."""
    (pid,) = pool.pids(KEY)

    assert status(pid)["PPid"] == str(os.getpid())
    assert os.getpgid(pid) == pid != os.getpgid(0)


async def test_a_worker_sees_libraries_and_nothing_else(pool: ProcessPool) -> None:
    """Its root holds the way to the libraries and an empty /scratch; what extension modules link to can be loaded."""
    with_root = await answer_or_error(pool, "tree")

    assert "Permission denied" in with_root
    assert await answer(pool, "imports") == [True, True]
    if os.geteuid() == 0:
        root = Path(f"/proc/{pool.pids(KEY)[0]}/root")
        names = {path.name for path in root.iterdir()}
        assert names.isdisjoint({"etc", "proc", "sys", "dev", "var", "run", "home", "boot", "mnt"})
        assert not list((root / "scratch").iterdir())


async def answer_or_error(pool: ProcessPool, input: str) -> str:
    outcome = await pool.execute(KEY, json.dumps(input).encode(), execution_id="e", deadline_s=60)
    return outcome.error or ""


async def test_the_readable_directories_can_be_chosen(tmp_path: Path) -> None:
    """An agent reads what its host shows it, and cannot write there."""
    shown = Path("/usr/share/zoneinfo")
    if not shown.is_dir():
        shown = Path("/usr/share")
    text = f"""
import os
async def Agent(input, context):
    found = os.listdir({str(shown)!r})
    try:
        os.mkdir({str(shown / "planted")!r})
    except OSError as error:
        return [len(found), error.errno]
"""
    async with ProcessPool(IsolationConfig(readable=(str(shown),))) as pool:
        await pool.start(KEY, Source(agent_id="agent", version="1", text=text))
        found, error = await answer(pool, "read")

    assert found == len(list(shown.iterdir()))
    assert error in {1, 13, 30}


# -- alone, in a child of this test -------------------------------------------------------------------------------


def in_child(work: Callable[[], str]) -> str:
    """What the work said in a forked child; how it ended when it said nothing."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = work()
        except OSError as error:
            said = f"{type(error).__name__} {error.strerror}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return said or (signal.Signals(-code).name if code < 0 else f"exit {code}")


def tried(function: Callable[..., Any], *arguments: Any) -> str:
    try:
        function(*arguments)
    except OSError as error:
        return type(error).__name__
    return "done"


def test_landlock_alone_allows_what_it_names(tmp_path: Path) -> None:
    """Without any other part: reading below one directory, writing below another, nothing elsewhere."""
    readable, writable = tmp_path / "readable", tmp_path / "writable"
    for directory in (readable, writable):
        directory.mkdir()
        (directory / "file").write_text("text")

    def work() -> str:
        kernel.gain_nothing()
        landlock.enforce(readable=[str(readable)], writable=[str(writable)])
        tries = [
            tried(os.open, readable / "file", os.O_RDONLY),
            tried(os.open, readable / "file", os.O_WRONLY),
            tried(os.open, readable / "new", os.O_CREAT | os.O_WRONLY),
            tried(os.unlink, readable / "file"),
            tried(os.open, writable / "new", os.O_CREAT | os.O_WRONLY),
            tried(os.symlink, "/etc/passwd", writable / "link"),
            tried(os.open, "/etc/passwd", os.O_RDONLY),
            tried(os.listdir, "/"),
        ]
        return " ".join(tries)

    assert in_child(work).split() == [
        "done",
        *["PermissionError"] * 3,
        "done",
        *["PermissionError"] * 3,
    ]


def test_seccomp_alone_refuses_and_kills() -> None:
    """Without any other part: a socket is refused, a thread is made, ptrace is the end."""

    def refuse() -> str:
        kernel.gain_nothing()
        seccomp.enforce(pid=os.getpid())
        return f"{tried(socket.socket)} {tried(os.fork)} {tried(os.open, '/etc/passwd', os.O_RDONLY)}"

    def die() -> str:
        kernel.gain_nothing()
        seccomp.enforce(pid=os.getpid())
        kernel.syscall("ptrace", 0, 0, 0, 0)
        return "alive"

    assert in_child(refuse) == "PermissionError PermissionError done"
    assert in_child(die) == "SIGSYS"


def test_a_part_that_fails_says_which() -> None:
    """An error inside of a part carries its name, for the refusal that a person reads."""
    with pytest.raises(kernel.PartMissing) as caught, kernel.part("Landlock"):
        raise OSError(38, "Function not implemented")

    assert (caught.value.part, caught.value.reason) == ("Landlock", "Function not implemented")
