"""A node of its own: an AgentHost on the shards named in its arguments, told what to do by JSON lines.

Each line is {"id": …, "do": method of the host, …its arguments}; each answer has the "id" and "result" or "error".
"""

import asyncio
import json
import sys

import msgspec

from headrace.agents import AgentHost, AgentsConfig
from headrace.database import Database, DatabaseConfig, ShardConfig
from headrace.errors import HeadraceError
from headrace.events import ExecutionFinished

_out = sys.stdout


def say(message):
    """One line, at once."""
    _out.write(msgspec.json.encode(message).decode() + "\n")
    _out.flush()


class Told:
    """Passes events on, but not the frequent ones."""

    def on(self, event):
        if not isinstance(event, ExecutionFinished):
            say({"event": type(event).__name__, **msgspec.to_builtins(event)})


async def answer(host, order):
    """Do one thing and say what came of it."""
    number, do = order.pop("id"), order.pop("do")
    try:
        if do == "submit_many":
            inputs = order.pop("inputs")
            result = await asyncio.gather(*(host.submit(input=each, **order) for each in inputs))
        elif do == "events":
            result = [event async for event in host.events(**order)]
        elif do == "code":
            await asyncio.to_thread(host.code_cache.flush)
            result = host.code_cache.statistics()
        else:
            result = await getattr(host, do)(**order)
    except HeadraceError as error:
        say({"id": number, "error": error.code, "message": error.message})
        return
    shown = msgspec.to_builtins(result, builtin_types=(bytes,), enc_hook=repr)
    say({"id": number, "result": json.loads(msgspec.json.encode(shown, enc_hook=repr))})


async def main(name, config, *urls):
    """Serve until the input ends."""
    shards = tuple(ShardConfig(name=f"shard-{index}", dsn=url) for index, url in enumerate(urls))
    reader = asyncio.StreamReader(limit=1 << 26)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    options = msgspec.json.decode(config)
    # Hundreds of submissions at once wait for the few connections, on a busy machine for longer than a request would.
    async with (
        Database(DatabaseConfig(shards=shards, connections_max=4, acquire_timeout_s=60.0)) as database,
        AgentHost(AgentsConfig(**options), database=database, writer=name, observer=Told()) as host,
        asyncio.TaskGroup() as tasks,
    ):
        say({"ready": name})
        async for line in reader:
            tasks.create_task(answer(host, json.loads(line)))


asyncio.run(main(*sys.argv[1:]))
