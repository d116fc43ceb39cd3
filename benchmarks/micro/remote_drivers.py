"""What a driver costs: plain awaited gets of many tasks over one TCP connection to Redis, driver by driver.

    python benchmarks/micro/remote_drivers.py

valkey-glide is measured if it is installed; it is no dependency of headrace. Every figure is the best of several
rounds in this process, and the rounds of all drivers alternate, so that what else the machine does hits them alike.
The Redis server is started here, on a free port, and stopped by pid. CPU is that of this process with all its threads.
"""

import asyncio
import importlib.util
import os
import socket
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import redis.asyncio

from headrace.cache import Cache, RemoteConfig
from headrace.cache.remote import Remote, RemoteWatcher
from headrace.clock import SystemClock
from headrace.embedded.binaries import find_redis

ROUNDS = 5
TASKS = 64
GETS_A_TASK = 200
KEYS = [f"user:{number}" for number in range(1000)]
VALUE = b'{"name": "Ada", "tags": ["a", "b"], "n": 12345}'
now = SystemClock.monotonic

Get = Callable[[str], Awaitable[object]]


async def glide_get(port: int, closing: AsyncExitStack) -> Get:
    import glide

    address = glide.NodeAddress("127.0.0.1", port)
    client = await glide.GlideClient.create(glide.GlideClientConfiguration([address]))
    closing.push_async_callback(client.close)
    return client.get


async def wire_get(url: str, closing: AsyncExitStack) -> Get:
    remote = Remote(RemoteConfig(url=url), RemoteWatcher(), rng=lambda: 0.5)
    await remote.open()
    closing.push_async_callback(remote.close)
    return lambda key: remote.get(key.encode())


async def measure(get: Get) -> tuple[float, float]:
    """Gets a second, and microseconds of this process's CPU a get."""

    async def task(number: int) -> None:
        for step in range(GETS_A_TASK):
            assert await get(KEYS[(number * 7 + step) % len(KEYS)]) is not None

    cpu, started = os.times(), now()
    await asyncio.gather(*(task(number) for number in range(TASKS)))
    took, used = now() - started, os.times()
    calls = TASKS * GETS_A_TASK
    return calls / took, (used.user + used.system - cpu.user - cpu.system) / calls * 1e6


async def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    binary = find_redis()
    server = subprocess.Popen(
        [str(binary.path), "--port", str(port), "--bind", "127.0.0.1", "--save", ""], stdout=subprocess.DEVNULL
    )
    try:
        async with AsyncExitStack() as closing:
            url = f"redis://127.0.0.1:{port}/0"
            client = await closing.enter_async_context(redis.asyncio.Redis.from_url(url))
            while True:
                try:
                    await client.mset(dict.fromkeys(KEYS, VALUE))
                    break
                except redis.ConnectionError:
                    await asyncio.sleep(0.01)
            cache = await closing.enter_async_context(Cache(memory=None, remote=RemoteConfig(url=url)))
            await cache.set_many({key: {"name": "Ada", "tags": ["a", "b"], "n": 12345} for key in KEYS})
            gets: dict[str, Get] = {"redis-py": client.get}
            if importlib.util.find_spec("glide") is not None:
                gets["valkey-glide"] = await glide_get(port, closing)
            gets["our wire"] = await wire_get(url, closing)
            gets["Cache.get"] = cache.get
            rounds = [{name: await measure(get) for name, get in gets.items()} for _ in range(ROUNDS)]
    finally:
        server.kill()
        server.wait()
    print(f"server {binary.version_text}, {TASKS} tasks, best of {ROUNDS} rounds")
    for name in gets:
        speed = max(figures[name][0] for figures in rounds)
        cpu = min(figures[name][1] for figures in rounds)
        print(f"{name:>18} {speed:10,.0f} gets/s {cpu:7.1f} us CPU a get")


if __name__ == "__main__":
    asyncio.run(main())
