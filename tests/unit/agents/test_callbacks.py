"""Callbacks: signed, tried again, and never a way into a private network."""

import asyncio
import hashlib
import hmac
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from headrace.agents import AgentHost, AgentsConfig, TenantConfig
from headrace.agents.callbacks import _AT_ONCE_MAX, _TENANT_AT_ONCE_MAX, _is_public
from headrace.errors import InvalidRequest
from headrace.events import CallbackGivenUp

ECHO = "async def Agent(input, context): return input"
OPEN = {"callback_key": "a key", "callback_private": True, "queue_poll_s": 0.05, "callback_timeout_s": 30.0}
HASTY = {**OPEN, "callback_timeout_s": 0.3}  # for receivers that do not answer


class Receiver:
    """A real HTTP server that answers as it is told."""

    def __init__(self):
        self.requests = []
        self.answers = []
        self.silent = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.requests.append((self.path, dict(self.headers), body))
                status = receiver.answers.pop(0) if receiver.answers else 204
                if status == "silence":
                    receiver.silent.wait(60)
                    return
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/done?x=1"


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield receiver
    finally:
        receiver.silent.set()
        receiver.server.shutdown()
        receiver.server.server_close()
        thread.join()


class Notes:
    def __init__(self):
        self.events = []

    def on(self, event):
        if isinstance(event, CallbackGivenUp):
            self.events.append(event)


@pytest.fixture
def impatient(monkeypatch):
    """Waits between tries are short."""
    monkeypatch.setattr("headrace.agents.callbacks._RETRY_FIRST_S", 0.01)
    monkeypatch.setattr("headrace.agents.callbacks._RETRY_MAX_S", 0.02)


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_the_result_is_posted_and_signed():
    """The receiver can tell by the shared key that it is ours, and when it was sent."""
    with receiving() as receiver:
        async with AgentHost(AgentsConfig(**OPEN)) as host:
            await host.deploy("a", ECHO, version="1.0.0")
            await host.submit("a", {"x": 1}, execution_id="e", callback_url=receiver.url)
            await until(lambda: receiver.requests)
        (path, headers, body), *more = receiver.requests
    sent = json.loads(body)
    stamp, signature = (part.split("=")[1] for part in headers["Headrace-Signature"].split(","))
    expected = hmac.new(b"a key", f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
    assert (path, more, signature) == ("/done?x=1", [], expected)
    assert (sent["execution_id"], sent["status"], sent["output"]) == ("e", "completed", {"x": 1})
    assert headers["Headrace-Execution"] == "e"


@pytest.mark.parametrize("trouble", [500, 302, 404, "silence"])
async def test_what_does_not_arrive_is_tried_again(impatient, trouble):
    """A redirect is not followed; a receiver that says nothing is given up after its time."""
    with receiving() as receiver:
        receiver.answers = [trouble, trouble]
        async with AgentHost(AgentsConfig(**(HASTY if trouble == "silence" else OPEN))) as host:
            await host.deploy("a", ECHO, version="1.0.0")
            await host.submit("a", 1, callback_url=receiver.url)
            await until(lambda: len(receiver.requests) >= 3)
        assert {path for path, _, _ in receiver.requests} == {"/done?x=1"}


async def test_a_receiver_that_never_answers_is_given_up(impatient):
    """After a bounded number of tries, and that is told."""
    notes = Notes()
    with receiving() as receiver:
        receiver.answers = [503] * 10
        async with AgentHost(AgentsConfig(**OPEN, callback_attempts_max=3), observer=notes) as host:
            await host.deploy("a", ECHO, version="1.0.0")
            await host.submit("a", 1, execution_id="e", callback_url=receiver.url)
            await until(lambda: notes.events)
        assert len(receiver.requests) == 3
    assert [(event.execution_id, event.attempts) for event in notes.events] == [("e", 3)]
    assert "503" in notes.events[0].reason


async def test_a_tenant_has_a_key_of_its_own():
    """Another tenant's key does not sign for it."""
    tenants = (TenantConfig(name="t", callback_key="theirs"),)
    with receiving() as receiver:
        async with AgentHost(AgentsConfig(**OPEN, tenants=tenants)) as host:
            await host.deploy("a", ECHO, version="1.0.0", tenant="t")
            await host.submit("a", 1, callback_url=receiver.url, tenant="t")
            await until(lambda: receiver.requests)
        _, headers, body = receiver.requests[0]
    stamp, signature = (part.split("=")[1] for part in headers["Headrace-Signature"].split(","))
    assert signature == hmac.new(b"theirs", f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/",
        "ftp://example.org/",
        "https:///nowhere",
        "https://user:secret@example.org/",
        "https://example.org/a b",
        "https://example.org:0/",
        "https://[::1/",
        "https://example.org/" + "x" * 3000,
    ],
)
async def test_only_https_urls_with_a_host_are_taken(url):
    """When they are asked for, not when they fail."""
    async with AgentHost(AgentsConfig(callback_key="k")) as host:
        await host.deploy("a", ECHO, version="1.0.0")
        with pytest.raises(InvalidRequest, match="callback URL"):
            await host.submit("a", 1, callback_url=url)


async def test_without_a_key_there_are_no_callbacks():
    """An unsigned one could be anybody's."""
    async with AgentHost() as host:
        await host.deploy("a", ECHO, version="1.0.0")
        with pytest.raises(InvalidRequest, match="no key"):
            await host.submit("a", 1, callback_url="https://example.org/")


async def test_a_name_that_leads_inside_is_not_connected_to(impatient):
    """Whatever it is called, its address decides."""
    notes = Notes()
    with receiving() as receiver:
        url = f"https://localhost:{receiver.server.server_port}/"
        config = AgentsConfig(callback_key="k", callback_attempts_max=1, queue_poll_s=0.05)
        async with AgentHost(config, observer=notes) as host:
            await host.deploy("a", ECHO, version="1.0.0")
            await host.submit("a", 1, callback_url=url)
            await until(lambda: notes.events)
        assert receiver.requests == []
    assert "not a public address" in notes.events[0].reason


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("2002:0a00:0001::1", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b:1::a00:1", False),
        ("::10.0.0.1", False),
        ("fec0::1", False),
    ],
)
def test_only_public_addresses_are_public(address, public):
    """Loopback, private, link-local and shared ones are not, however they are written."""
    assert _is_public(address) is public


@contextmanager
def dripping():
    """A receiver that never comes to the end of its first TLS record, byte by byte; its port."""
    stop = threading.Event()

    def drip(listener):
        with suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc")
                while not stop.wait(0.02):
                    connection.sendall(b"\x03")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = [threading.Thread(target=drip, args=(listener,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            stop.set()
            listener.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


async def test_a_receiver_that_drips_its_greeting_holds_no_thread(impatient):
    """The time of a callback is over for the handshake too, and its thread is free for others."""
    notes = Notes()
    with dripping() as port:
        config = AgentsConfig(**{**HASTY, "callback_attempts_max": 1})
        async with AgentHost(config, observer=notes) as host:
            await host.deploy("a", ECHO, version="1.0.0")
            await host.submit("a", 1, callback_url=f"https://127.0.0.1:{port}/")
            await until(lambda: notes.events)
            await until(lambda: host._callbacks._threads.busy == 0)
    assert "no answer within 0.3 s" in notes.events[0].reason


async def test_every_address_of_a_name_is_tried(monkeypatch):
    """One that cannot be reached is not the end."""
    asked = socket.getaddrinfo

    def with_a_dead_one(host, port, *more, **named):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.9", port)), *asked(host, port, *more, **named)]

    monkeypatch.setattr("headrace.agents.callbacks.socket.getaddrinfo", with_a_dead_one)
    with receiving() as receiver:
        async with AgentHost(AgentsConfig(**OPEN, callback_attempts_max=1)) as host:
            await host.deploy("a", ECHO, version="1.0.0")
            await host.submit("a", 1, callback_url=receiver.url)
            await until(lambda: receiver.requests)


async def test_a_tenants_dead_receiver_does_not_hold_up_the_others():
    """It holds its own share of the places for as long as it is waited for, however much is due to it."""
    patient = {**OPEN, "callback_timeout_s": 100.0}
    with receiving() as dead, receiving() as alive:
        dead.answers = ["silence"] * 100
        async with AgentHost(AgentsConfig(**patient)) as host:
            for tenant in ("t", "u"):
                await host.deploy("a", ECHO, version="1.0.0", tenant=tenant)
            for n in range(2 * _AT_ONCE_MAX):
                await host.submit("a", n, tenant="t", callback_url=dead.url)
            await until(lambda: len(dead.requests) == _TENANT_AT_ONCE_MAX)
            await host.submit("a", 1, tenant="u", callback_url=alive.url)
            await until(lambda: alive.requests)
            assert len(dead.requests) == _TENANT_AT_ONCE_MAX
            dead.answers.clear()
            dead.silent.set()
            await until(lambda: len(dead.requests) >= 2 * _AT_ONCE_MAX and not host._callbacks._threads.busy)
