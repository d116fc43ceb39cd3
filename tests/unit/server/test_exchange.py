"""One request and its answer: bodies, limits, time, bugs."""

import asyncio
import json

import msgspec
import pytest

from headrace.errors import BugError, DatabaseUnavailable, Overloaded, RateLimited
from headrace.events import RequestFailed
from headrace.server.exchange import Endpoint, Methods, Operation, answer

DECODER = msgspec.json.Decoder(dict[str, int])
JSON = ((b"content-type", b"application/json"),)


class Notes:
    """Keeps every event."""

    def __init__(self):
        self.events = []

    def on(self, event):
        self.events.append(event)


async def echo(exchange):
    return answer(await exchange.body(DECODER))


async def called(handler, *messages, method="POST", headers=JSON, bytes_max=100, timeout_s=5.0, notes=None):
    """The messages that an operation sends for the messages that it receives."""
    operation = Operation(method="POST", path="/x", name="x", summary="", handler=handler, permission="agent:execute")
    endpoint = Endpoint(operation, bytes_max=bytes_max, timeout_s=timeout_s, observer=notes or Notes())
    endpoint = Methods("/x", {"POST": endpoint})
    waiting, sent = list(messages), []

    async def receive():
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": "/x", "headers": list(headers), "query_string": b""}
    await endpoint(scope, receive, send)
    return sent


def part(body, *, more=False):
    return {"type": "http.request", "body": body, "more_body": more}


def status_and_body(sent):
    return sent[0]["status"], json.loads(sent[1]["body"])


async def test_a_body_in_parts_is_put_together():
    """However the server cut it."""
    sent = await called(echo, part(b'{"a"', more=True), part(b": ", more=True), part(b"1}"))
    assert status_and_body(sent) == (200, {"a": 1})


@pytest.mark.parametrize("media_type", [b"application/json; charset=utf-8", b"Application/JSON"])
async def test_json_may_be_spelt_in_several_ways(media_type):
    """Parameters and letter case of a media type do not matter."""
    sent = await called(echo, part(b'{"a": 1}'), headers=[(b"content-type", media_type)])
    assert status_and_body(sent) == (200, {"a": 1})


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"content-type", b"")],
        [(b"content-type", b"text/plain")],
        [(b"content-type", b"text/plain; application/json")],
        [(b"content-type", b"application/x-www-form-urlencoded")],
        [(b"content-type", b"multipart/form-data; boundary=application/json")],
    ],
)
async def test_a_body_that_a_page_may_send_unasked_is_not_read(headers):
    """A browser sends these types anywhere without asking the server first."""
    sent = await called(echo, part(b'{"a": 1}'), headers=headers)
    status, problem = status_and_body(sent)
    assert (status, problem["code"]) == (415, "not-json")
    assert "Content-Type: application/json" in problem["fix"]


async def test_a_body_without_length_is_cut_off_at_the_limit():
    """Not a byte beyond it is kept."""
    sent = await called(echo, part(b"x" * 60, more=True), part(b"x" * 60, more=True), part(b"never read"))
    status, problem = status_and_body(sent)
    assert (status, problem["code"]) == (413, "body-too-large")


async def test_a_body_in_one_part_is_measured_too():
    """A server that cuts nothing does not lift the limit."""
    sent = await called(echo, part(b'"%b"' % (b"x" * 100)))
    status, problem = status_and_body(sent)
    assert (status, problem["code"]) == (413, "body-too-large")


async def test_a_client_that_leaves_gets_no_answer():
    """There is nobody to send to."""
    assert await called(echo, part(b'{"a"', more=True), {"type": "http.disconnect"}) == []
    assert await called(echo, {"type": "http.disconnect"}) == []


async def test_an_answer_takes_no_longer_than_allowed():
    """The client is told, and the event names the route."""

    async def slow(exchange):
        await asyncio.sleep(60)

    notes = Notes()
    sent = await called(slow, timeout_s=0.01, notes=notes)
    status, problem = status_and_body(sent)
    assert (status, problem["code"]) == (504, "request-timeout")
    assert notes.events == [RequestFailed("POST", "/x", 504, "request-timeout")]


async def test_what_we_depend_on_fails_with_a_503():
    """And a time to come back."""

    async def fails(exchange):
        raise DatabaseUnavailable("Shard a does not answer.")

    sent = await called(fails)
    assert status_and_body(sent)[0] == 503
    assert (b"retry-after", b"1") in sent[0]["headers"]


async def test_a_503_that_an_operation_answers_itself_is_no_failed_request():
    """Only errors are; an operation may say with its status that something is down."""

    async def says_down(exchange):
        return answer({"status": "down"}, 503)

    notes = Notes()
    sent = await called(says_down, notes=notes)
    assert status_and_body(sent) == (503, {"status": "down"})
    assert notes.events == []


async def test_a_bug_is_a_500_that_tells_nothing(monkeypatch):
    """The traceback goes to the loop's exception handler, not to the client."""
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context["exception"]))

    async def buggy(exchange):
        raise KeyError("secret")

    status, problem = status_and_body(await called(buggy))
    assert (status, problem["code"]) == (500, "bug")
    assert "secret" not in json.dumps(problem)
    assert [type(error) for error in told] == [KeyError]


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "OPTIONS"])
async def test_another_method_is_refused_with_the_right_one(method):
    """The Allow header names it."""
    sent = await called(echo, method=method)
    assert sent[0]["status"] == 405
    assert (b"allow", b"POST") in sent[0]["headers"]


@pytest.mark.parametrize(
    ("error", "status", "seconds"),
    [
        (RateLimited("too often", retry_after_s=0.2), 429, b"1"),
        (RateLimited("used up", retry_after_s=3_600.4), 429, b"3601"),
        (Overloaded("full", retry_after_s=7.0), 503, b"7"),
    ],
)
async def test_who_is_refused_for_now_is_told_when_to_come_back(error, status, seconds):
    """In whole seconds, never too early."""

    async def refuses(exchange):
        raise error

    sent = await called(refuses)
    assert status_and_body(sent)[0] == status
    assert dict(sent[0]["headers"])[b"retry-after"] == seconds


async def test_head_is_answered_where_get_is():
    """And a path tells all its methods to who asks for another."""
    sent = []

    async def app(scope, receive, send):
        sent.append(scope["method"])

    async def send(message):
        sent.append(message)

    methods = Methods("/x", {"GET": app, "DELETE": app})
    for method in ("GET", "HEAD", "DELETE", "PUT"):
        await methods({"type": "http", "method": method, "path": "/x", "headers": []}, None, send)
    assert sent[:3] == ["GET", "HEAD", "DELETE"]
    assert dict(sent[3]["headers"])[b"allow"] == b"GET, DELETE, HEAD"


def test_an_operation_has_a_lock_or_is_public():
    """One that was forgotten cannot be made."""
    with pytest.raises(BugError):
        Operation(method="GET", path="/x", name="x", summary="", handler=echo)
    with pytest.raises(BugError):
        Operation(
            method="GET", path="/x", name="x", summary="", handler=echo, permission="agent:monitor", is_public=True
        )
