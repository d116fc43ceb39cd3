"""Errors of ours in the words of the two protocols that speak JSON-RPC, and what is read of a call."""

import pytest

from headrace.errors import (
    AgentQuarantined,
    BugError,
    DatabaseUnavailable,
    ExecutionConflict,
    ExecutionNotFound,
    InvalidRequest,
    Overloaded,
    RateLimited,
)
from headrace.server.protocols import a2a_objects, mcp_objects


@pytest.mark.parametrize(
    ("error", "code", "status", "retry_after"),
    [
        (ExecutionNotFound("gone"), -32001, 200, None),
        (InvalidRequest("wrong"), -32602, 200, None),
        (ExecutionConflict("other words"), -32602, 200, None),
        (AgentQuarantined("held the loop"), -32603, 200, None),
        (BugError("ours"), -32603, 200, None),
        (RateLimited("often", retry_after_s=2.2), -32603, 429, b"3"),
        (Overloaded("full", retry_after_s=0.1), -32603, 503, b"1"),
        (DatabaseUnavailable("shard-0 is away"), -32603, 503, b"1"),
    ],
    ids=lambda value: getattr(value, "code", None),
)
def test_what_may_be_repeated_says_when(error, code, status, retry_after):
    """The number says whose fault it is; the status is kept where proxies act on it, with the time to come back."""
    for found, expected in ((a2a_objects.problem_of(error), code), (mcp_objects.problem_of(error), -32603)):
        assert (found.code, found.status) == (expected, status)
        assert dict(found.headers).get(b"retry-after") == retry_after
        assert found.message == error.message


async def test_an_answer_has_the_id_of_its_call(doors):
    """As it came: text stays text, a number a number; what could not be read has none."""
    for call_id in ("7", 7, 0, ""):
        for path, method in (("/a2a/echo", "GetTask"), ("/mcp", "ping")):
            body = {"jsonrpc": "2.0", "id": call_id, "method": method, "params": {"id": "x"}}
            answer = await doors.client.post(path, json=body, headers={"A2A-Version": "1.0"})
            assert answer.json()["id"] == call_id
            assert type(answer.json()["id"]) is type(call_id)
    for path in ("/a2a/echo", "/mcp"):
        answer = await doors.client.post(path, json={"id": 7}, headers={"A2A-Version": "1.0"})
        assert answer.json()["id"] is None


async def test_a_params_that_does_not_fit_says_where(doors):
    """With the path of the field, as elsewhere in the API."""
    sent = {"message": {"messageId": "m", "role": "ROLE_AGENT", "parts": [{"text": "hi"}]}}
    told = (await doors.a2a("SendMessage", sent)).json()["error"]

    assert told["code"] == -32602
    assert "$.message.role" in told["message"]
