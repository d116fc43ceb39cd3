"""What a task wrote is known to it, to those that it starts, and in a session to all."""

import asyncio

from headrace.database.postgres.sessions import note_write, seen_lsn, session, wrote_at


async def in_a_task(function, *arguments):
    async def call():
        return function(*arguments)

    return await asyncio.get_running_loop().create_task(call())


async def test_a_task_knows_what_it_wrote():
    """And one that it starts then; its own writes are its own."""
    note_write("a", 1.0)
    assert await in_a_task(wrote_at, "a") == 1.0
    await in_a_task(note_write, "a", 2.0)
    assert wrote_at("a") == 1.0
    assert wrote_at("b") is None


async def test_tasks_of_a_session_share_what_they_wrote():
    """What was written before it counts inside; what was written inside does not count outside."""
    note_write("a", 1.0)
    with session():
        await in_a_task(note_write, "b", 2.0)
        assert (wrote_at("a"), wrote_at("b")) == (1.0, 2.0)
    assert wrote_at("b") is None


async def test_a_bookmark_is_seen_inside():
    """By the tasks of the session only."""
    with session({"a": 5}):
        assert await in_a_task(seen_lsn, "a") == 5
        assert seen_lsn("b") is None
    assert seen_lsn("a") is None
