"""A process that dies by SIGKILL at one step of a two-phase transaction: python -m ... STEP KEY KEY NAME=DSN..."""

import asyncio
import os
import signal
import sys
from typing import Any

from headrace.database import Database, DatabaseConfig, ShardConfig
from headrace.database.postgres.transaction import Transaction
from headrace.database.postgres.two_phase import TwoPhase

INSERT = "INSERT INTO parts VALUES ($1)"


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(step: str) -> None:
    """Replace what comes after the step by death."""
    prepare, end_one = Transaction.prepare, TwoPhase._end_one

    async def prepare_and_die(self: Transaction, gid: str) -> None:
        await prepare(self, gid)
        die()

    async def end_first_and_die(self: TwoPhase, part: Any, verb: str, wait_s: float) -> bool | None:
        if part.shard != part.decision_shard:
            await asyncio.Event().wait()
        await end_one(self, part, verb, wait_s)
        return die()

    match step:
        case "one part is prepared":
            Transaction.prepare = prepare_and_die
        case "all parts are prepared":
            TwoPhase._decide = die
        case "it is decided":
            TwoPhase._end = die
        case "one part is committed":
            TwoPhase._end_one = end_first_and_die


async def main(step: str, keys: list[str], dsns: list[str]) -> None:
    """Write one row on each of two shards, as far as the step."""
    named = [dsn.split("=", 1) for dsn in dsns]
    shards = tuple(ShardConfig(name=name, dsn=dsn) for name, dsn in named)
    config = DatabaseConfig(shards=shards, connections_max=4, acquire_timeout_s=20.0)
    async with Database(config) as database:
        arm(step)
        async with database.transaction(keys=keys, two_phase=True) as transaction:
            for key in keys:
                await transaction.execute(INSERT, step, key=key)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:4], sys.argv[4:]))
