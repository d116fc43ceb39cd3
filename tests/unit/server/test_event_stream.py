"""Streams of events: frames, ids, the end, silence, departures, limits."""

import asyncio
from dataclasses import replace

import msgspec
import pytest

from headrace.agents import Emitted
from headrace.errors import ExecutionNotFound, InvalidRequest, Overloaded, RateLimited
from headrace.server.event_stream import EventStreams, Source, last_seen


class Reader:
    """The other end: what it got, and when it leaves."""

    def __init__(self):
        self.text = ""
        self.gone = asyncio.Event()
        self.got = asyncio.Event()

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.text += message.get("body", b"").decode()
        self.got.set()

    async def wait_for(self, text):
        while text not in self.text:
            self.got.clear()
            await asyncio.wait_for(self.got.wait(), 30)


def event(number, *, dropped=0, data=None):
    return Emitted(id=number, data=msgspec.Raw(data or b"%d" % number), dropped=dropped)


def source(*events, ends=True, left=None, error=None, tenant="default"):
    """These events, then the end, or silence."""

    async def emitted():
        for each in events:
            yield each
        if error is not None:
            raise error
        if not ends:
            await asyncio.Event().wait()

    async def ending():
        return b'{"status":"completed"}'

    return Source(events=emitted, ending=ending, left=left, tenant=tenant)


async def served(streams, what, reader=None):
    """The whole text of a stream."""
    reader = reader or Reader()
    await asyncio.wait_for(streams.serve(what, reader.receive, reader.send), 30)
    return reader.text


async def test_every_event_has_its_id_and_the_end_has_one_too():
    """So that a reader can go on from anywhere, and knows when to stop."""
    text = await served(EventStreams(), source(event(1), event(2, data=b'{"a":\n1}'), event(7, dropped=4)))
    assert text == (
        "retry: 1000\n\n"
        "id: 1\ndata: 1\n\n"
        'id: 2\ndata: {"a": 1}\n\n'
        'event: dropped\ndata: {"count":4}\n\n'
        "id: 7\ndata: 7\n\n"
        'event: end\nid: 7.end\ndata: {"status":"completed"}\n\n'
    )


async def test_in_silence_there_is_a_sign_of_life():
    """A comment, which readers pass over."""
    reader = Reader()
    streams = EventStreams(heartbeat_s=0.01)
    serving = asyncio.create_task(streams.serve(source(event(1), ends=False), reader.receive, reader.send))
    await reader.wait_for(": still here")
    reader.gone.set()
    await serving
    assert "event: end" not in reader.text
    assert len(streams) == 0


@pytest.mark.parametrize("stops", [True, False])
async def test_a_reader_that_leaves_stops_the_work_only_if_that_was_asked_for(stops):
    """Cancel, or let it go on."""
    left = []

    async def cancel():
        left.append(True)

    reader = Reader()
    what = source(event(1), ends=False, left=cancel if stops else None)
    serving = asyncio.create_task(EventStreams().serve(what, reader.receive, reader.send))
    await reader.wait_for("id: 1")
    reader.gone.set()
    await serving
    assert left == [True] * stops


async def test_a_reader_that_saw_the_end_has_not_left():
    """Nothing is cancelled that is over."""

    async def cancel():
        raise AssertionError("it was over")

    assert "event: end" in await served(EventStreams(), source(event(1), left=cancel))


async def test_a_stopping_server_ends_its_streams_without_an_end():
    """The reader comes back elsewhere; the work is not cancelled."""

    async def cancel():
        raise AssertionError("nobody left")

    reader, streams = Reader(), EventStreams()
    serving = asyncio.create_task(
        streams.serve(source(event(1), ends=False, left=cancel), reader.receive, reader.send)
    )
    await reader.wait_for("id: 1")
    await streams.close()
    await serving
    assert "event: end" not in reader.text
    with pytest.raises(Overloaded):
        streams.admit("default")


async def test_a_reader_that_takes_nothing_is_dropped():
    """It would hold its place for ever."""
    reader = Reader()

    async def stuck(message):
        if b"id: 1" in message.get("body", b""):
            await asyncio.Event().wait()

    await asyncio.wait_for(EventStreams(stalled_s_max=0.01).serve(source(event(1)), reader.receive, stuck), 30)


async def test_a_failure_in_the_middle_is_told_as_an_event():
    """The status has left already."""
    text = await served(EventStreams(), source(event(1), error=ExecutionNotFound("gone")))
    assert 'event: problem\ndata: {"type":"urn:headrace:problem:execution-not-found"' in text


async def test_a_bug_in_a_source_is_not_swallowed():
    """It reaches the server, which logs it."""
    with pytest.raises(ZeroDivisionError):
        await served(EventStreams(), source(error=ZeroDivisionError()))


async def test_there_are_so_many_streams_and_a_quarter_of_them_for_a_tenant():
    """One tenant cannot take all places."""
    streams, readers, serving = EventStreams(streams_max=8), [], []
    for index in range(8):
        tenant = f"t{index // 2}"
        streams.admit(tenant)
        readers.append(Reader())
        what = source(event(1), ends=False, tenant=tenant)
        serving.append(asyncio.create_task(streams.serve(what, readers[-1].receive, readers[-1].send)))
        await readers[-1].wait_for("id: 1")
        if index == 1:
            with pytest.raises(RateLimited, match="'t0'"):
                streams.admit("t0")
    with pytest.raises(Overloaded, match="All 8"):
        streams.admit("t9")
    await streams.close()
    await asyncio.gather(*serving)


@pytest.mark.parametrize(
    ("header", "after", "expected"),
    [(None, None, 0), (None, 5, 5), ("7", None, 7), ("7", 5, 7), ("", 5, 5), ("7.end", None, None), (" 7 ", None, 7)],
)
def test_the_header_goes_before_the_query(header, after, expected):
    """A browser that reconnects sends the header, and the URL is still the old one."""
    assert last_seen(header, after) == expected


@pytest.mark.parametrize("header", ["x", "-1", "1" * 17, "٣", "1.5"])
def test_an_id_that_is_none_is_refused(header):
    """Rather than begin from the beginning."""
    with pytest.raises(InvalidRequest, match="Last-Event-ID"):
        last_seen(header, None)


async def test_no_line_of_a_result_begins_a_field():
    """White space in JSON that is a line break to a reader of events becomes another one."""
    injected = b'{"output":[1,\nevent: forged\r\rdata: 2\n\n]}'

    async def ending():
        return injected

    text = await served(EventStreams(), replace(source(event(1)), ending=ending))
    last = text.split("id: 1.end")[1]
    assert last == '\ndata: {"output":[1, event: forged  data: 2  ]}\n\n'
