"""The door of MCP in one process: eras, pages of tools, schemas, results, progress."""

import msgspec
import pytest

from headrace.agents import Execution, Progress
from headrace.server.protocols.mcp_objects import LEGACY, MODERN, ToolWords, result_of, tool
from tests.unit.server.protocols.profiles import profile

OBJECT = {"type": "object", "properties": {"a": {"type": "number"}}}
LIST = {"type": "array", "items": {"type": "number"}}


def execution(status="completed", output=None, **more):
    """An execution as it is answered."""
    output_json = None if output is None else msgspec.json.encode(output)
    return Execution(id="e", agent_id="a", version="1.0.0", status=status, output_json=output_json, **more)


@pytest.mark.parametrize(
    ("asked", "answered"),
    [*((version, version) for version in LEGACY), (MODERN, LEGACY[0]), ("1999-01-01", LEGACY[0])],
)
async def test_a_handshake_agrees_on_a_revision(doors, asked, answered):
    """The client's, if it is a legacy one, else the newest of them; nothing is kept of it."""
    answer = await doors.mcp("initialize", {"protocolVersion": asked, "capabilities": {}, "clientInfo": {"name": "c"}})

    assert answer.json()["result"]["protocolVersion"] == answered
    assert "mcp-session-id" not in answer.headers
    assert (await doors.mcp("ping", {})).json()["result"] == {}


async def test_an_error_of_the_older_revisions_comes_with_a_200(doors):
    """Their clients read it there; those of the modern one want a status, too."""
    answer = await doors.mcp("resources/list", {})
    assert (answer.status_code, answer.json()["error"]["code"]) == (200, -32601)


async def test_tools_come_in_pages(doors):
    """Each once, by id; a cursor of somebody else's is refused."""
    for number in range(60):
        await doors.deploy(f"a{number:02}")
    first = (await doors.mcp("tools/list", {})).json()["result"]
    second = (await doors.mcp("tools/list", {"cursor": first["nextCursor"]})).json()["result"]
    wrong = [(await doors.mcp("tools/list", {"cursor": cursor})).json() for cursor in ("", "-1", "1e3", "9" * 5_000)]

    names = [tool["name"] for page in (first, second) for tool in page["tools"]]
    assert names == [*(f"a{number:02}" for number in range(60)), "echo"]
    assert len(first["tools"]) == 50
    assert "nextCursor" not in second
    assert {answer["error"]["code"] for answer in wrong} == {-32602}


async def test_a_call_wants_a_client_that_reads_streams(doors):
    """Its answer is one."""
    refused = await doors.mcp("tools/call", {"name": "echo", "arguments": {"input": 1}}, accept="application/json")
    assert refused.status_code == 406
    assert doors.headrace.rooms.agents.started == 0


async def test_a_call_is_answered_with_its_result_alone(doors, frames):
    """Where no progress is asked for, the stream is one message."""
    (told,) = frames(await doors.mcp("tools/call", {"name": "echo", "arguments": {"input": "hi"}}))

    assert told == {
        "jsonrpc": "2.0",
        "id": 7,
        "result": {"content": [{"type": "text", "text": "hi"}], "isError": False},
    }


def test_a_legacy_client_learns_no_schema_that_it_could_not_read():
    """Outputs that are not objects came with the modern revision."""
    listing = profile(output_schema=LIST)

    assert tool(listing, modern=True)["outputSchema"] == LIST
    assert "outputSchema" not in tool(listing, modern=False)
    done = execution(output=[1, 2])
    assert result_of(done, listing, modern=True)["structuredContent"] == [1, 2]
    assert "structuredContent" not in result_of(done, listing, modern=False)


def test_an_output_is_for_reading_and_for_programs():
    """Text as it is, data as JSON, a framework's answer as both, nothing as nothing."""

    def texts(output):
        return [each["text"] for each in result_of(execution(output=output), profile(), modern=True)["content"]]

    assert texts("words") == ["words"]
    assert texts({"n": 1}) == ['{"n":1}']
    assert texts({"text": "done", "data": [1], "usage": {}}) == ["done", "[1]"]
    assert texts(None) == []


@pytest.mark.parametrize("status", ["failed", "timeout", "cancelled", "interrupted"])
def test_what_did_not_complete_is_an_error_with_its_reason(status):
    """Whatever the reason is; and it has no structure that a schema would have to fit."""
    result = result_of(execution(status, error="because"), profile(output_schema=OBJECT), modern=True)

    assert result["isError"]
    assert result["content"] == [{"type": "text", "text": f"{status}: because"}]
    assert "structuredContent" not in result


def test_progress_only_grows():
    """A report that goes back, or says the same again, is not told."""
    words = ToolWords(1, profile(), "token", modern=True)

    told = [words.seen(execution("running", progress=Progress(done, 10))) for done in (0, 3, 3, 2, 4)]

    assert [frame != b"" for frame in told] == [True, True, False, False, True]
    assert ToolWords(1, profile(), None, modern=True).seen(execution("running", progress=Progress(1, 2))) == b""


def test_a_schema_asks_for_no_headers():
    """An annotation that would have clients repeat arguments in headers is taken out, wherever it stands."""
    annotated = {"type": "object", "properties": {"a": {"type": "string", "x-mcp-header": "A"}}, "x-mcp-header": "B"}
    told = tool(profile(input_schema=annotated), modern=True)

    assert told["inputSchema"] == {"type": "object", "properties": {"a": {"type": "string"}}}
