"""What ends with what, and as whom: a killed host, and an ordinary user's pool, each in a process of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

import headrace
from headrace.agents.definition import Source
from headrace.agents.isolation import ProcessPool, WorkerKey, probe

achievable = probe()
pytestmark = pytest.mark.skipif(achievable.level != "process", reason=f"this kernel lacks {achievable.missing}")

SOMEBODY = 61234

HOST = textwrap.dedent("""
    import asyncio, json, os, sys
    from headrace.agents.definition import Source
    from headrace.agents.isolation import Limits, ProcessPool, WorkerKey, probe

    TEXT = '''
    import errno, os, socket
    def tried(function, *arguments):
        try:
            return repr(function(*arguments))
        except OSError as error:
            return errno.errorcode[error.errno]
    async def Agent(input, context):
        if input == "spin":
            while True: pass
        return [os.getuid(), tried(os.open, "/etc/passwd", 0), tried(socket.socket), tried(os.fork), len(bytearray(9))]
    '''

    async def main():
        async with ProcessPool() as pool:
            key = WorkerKey("t", "a", "1")
            # The worker is to be busy when its host dies, and not ended before because it is.
            await pool.start(key, Source(agent_id="a", version="1", text=TEXT), Limits(step_s=600.0))
            (worker,) = (pool._workers[pid] for pid in pool.pids(key))
            outcome = await pool.execute(key, b"0", execution_id="e", deadline_s=60)
            said = {"level": probe().level, "output": json.loads(outcome.output_json)}
            if sys.argv[1:] == ["stay"]:
                spinning = asyncio.ensure_future(pool.execute(key, b'"spin"', execution_id="s", deadline_s=600))
                while worker._page.read()[1] != 2:  # its second execution has taken a step, which does not end
                    await asyncio.sleep(0.005)
                print(json.dumps({**said, "pids": [pool.zygote_pid, *pool.pids()]}), flush=True)
                await spinning
            print(json.dumps(said), flush=True)

    asyncio.run(main())
""")


def ends(pids: list[int], *, within_s: float) -> bool:
    ends_at = time.monotonic() + within_s
    while time.monotonic() < ends_at:
        if not any(map(runs, pids)):
            return True
        time.sleep(0.01)
    return False


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def host() -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen([sys.executable, "-c", HOST, "stay"], stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_a_killed_host_takes_its_zygote_and_its_workers_along(host: "subprocess.Popen[str]") -> None:
    """After kill -9 of the host no process of its pool is left, not even a worker that spins."""
    assert host.stdout is not None
    pids = json.loads(host.stdout.readline())["pids"]
    assert len(pids) >= 2
    assert all(psutil.pid_exists(pid) for pid in pids)

    host.send_signal(signal.SIGKILL)

    assert ends(pids, within_s=30.0)


def interpreter_of_everybody() -> str | None:
    """An interpreter of our version that an ordinary user may execute."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for path in (sys.executable, shutil.which(version, path="/usr/local/bin:/usr/bin")):
        if path is not None and all(parent.stat().st_mode & 0o001 for parent in Path(path).resolve().parents):
            return path
    return None


def test_an_ordinary_user_gets_the_same_isolation(tmp_path: Path) -> None:
    """Without any privilege the level is `process` too, and the worker is that user without rights."""
    is_root = os.geteuid() == 0
    interpreter = interpreter_of_everybody() if is_root else sys.executable
    if interpreter is None:
        pytest.skip("every interpreter of this version stands in a directory that is root's alone")
    libraries = [Path(headrace.__file__).parents[1], Path(msgspec.__file__).parents[1]]

    done = subprocess.run(
        [interpreter, "-c", HOST],
        env={"PYTHONPATH": ":".join(map(str, libraries))},
        user=SOMEBODY if is_root else None,
        group=SOMEBODY if is_root else None,
        extra_groups=[] if is_root else None,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["level"] == "process"
    assert said["output"][0] == (SOMEBODY if is_root else os.geteuid())
    assert said["output"][1] in {"ENOENT", "EACCES"}
    assert said["output"][2:] == ["EPERM", "EPERM", 9]


def test_the_pool_runs_on_uvloop() -> None:
    """The loop that servers run on watches workers as asyncio's own does."""
    uvloop = pytest.importorskip("uvloop")
    key = WorkerKey("tenant", "agent", "1")
    text = "import os\nasync def Agent(input, context): return input or os._exit(1)"

    async def work() -> list[str]:
        async with ProcessPool() as pool:
            await pool.start(key, Source(agent_id="agent", version="1", text=text))
            calls = [await pool.execute(key, data, execution_id="e", deadline_s=60) for data in (b"1", b"0", b"1")]
            return [outcome.status for outcome in calls]

    assert uvloop.run(work()) == ["completed", "failed", "completed"]
