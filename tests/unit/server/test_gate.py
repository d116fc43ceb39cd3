"""Who may come in: tokens, names of this machine, pages of other origins."""

import json

import pytest

from headrace.server.gate import Gate, is_own_name, is_same_origin
from headrace.server.keys import Keys

TOKEN = "a token of more than sixteen characters"
OFFERED = (b"authorization", b"Bearer " + TOKEN.encode())
HERE = (b"host", b"127.0.0.1:8000")


async def behind(scope, receive, send):
    """Whoever gets here was let in."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


async def asked(gate, *headers):
    """Status and code of the answer."""
    sent = []

    async def send(message):
        sent.append(message)

    await gate({"type": "http", "path": "/x", "headers": list(headers)}, None, send)
    return sent[0]["status"], json.loads(sent[1]["body"]).get("code")


async def test_with_a_token_only_who_knows_it_comes_in():
    """Whatever name the server was called by."""
    gate = Gate(behind, token=TOKEN)
    assert await asked(gate, (b"host", b"shop.example"), OFFERED) == (200, None)
    assert await asked(gate, HERE) == (401, "unauthorized")
    assert await asked(gate, HERE, (b"authorization", b"Bearer " + TOKEN[:-1].encode())) == (401, "unauthorized")


async def test_a_token_may_look_like_a_key():
    """It is compared before keys are looked up."""
    token = "hr_" + TOKEN
    gate = Gate(behind, token=token, keys=Keys(cache=None, database=None, clock=None))
    assert await asked(gate, HERE, (b"authorization", b"Bearer " + token.encode())) == (200, None)


@pytest.mark.parametrize("token", [None, ""])
async def test_without_a_token_only_this_machine_comes_in(token):
    """By a name that no page can point elsewhere; a client without Host is no browser."""
    gate = Gate(behind, token=token)
    assert await asked(gate, HERE) == (200, None)
    assert await asked(gate) == (200, None)
    assert await asked(gate, (b"host", b"evil.example:8000")) == (421, "foreign-host")


async def test_a_change_that_a_foreign_page_asks_for_is_refused_even_with_the_token():
    """A proxy may add the token to whatever comes by; reading is the browser's to forbid."""
    foreign = (b"sec-fetch-site", b"cross-site")
    assert await asked(Gate(behind, token=TOKEN, changes=True), OFFERED, foreign) == (403, "foreign-origin")
    assert await asked(Gate(behind, token=TOKEN), OFFERED, foreign) == (200, None)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], True),
        ([HERE], True),
        ([HERE, (b"origin", b"http://127.0.0.1:8000")], True),
        ([HERE, (b"origin", b"http://127.0.0.1:3000")], False),
        ([HERE, (b"origin", b"http://evil.example")], False),
        ([HERE, (b"origin", b"null")], False),
        ([(b"origin", b"http://evil.example")], False),
        ([HERE, (b"origin", b"https://proxy.example"), (b"sec-fetch-site", b"same-origin")], True),
        ([HERE, (b"sec-fetch-site", b"none")], True),
        ([HERE, (b"sec-fetch-site", b"same-site")], False),
        ([HERE, (b"origin", b"http://127.0.0.1:8000"), (b"sec-fetch-site", b"cross-site")], False),
    ],
)
def test_the_browser_says_whose_page_it_is(headers, expected):
    """Sec-Fetch-Site decides, else Origin against Host; neither means a program."""
    assert is_same_origin(dict(headers)) is expected


@pytest.mark.parametrize(
    "host", [b"localhost", b"LocalHost:80", b"127.0.0.1", b"127.0.0.1:8000", b"[::1]", b"[::1]:1"]
)
def test_the_names_of_this_machine(host):
    """With a port and without, in any case."""
    assert is_own_name(host)


@pytest.mark.parametrize(
    "host",
    [
        b"",
        b":8000",
        b"evil.example",
        b"localhost.evil.example",
        b"127.0.0.1.evil.example:80",
        b"localhost:80.evil.example",
        b"localhost:",
        b"evil.example:localhost",
        b"::1",
        b"0.0.0.0:8000",
    ],
)
def test_what_is_no_name_of_this_machine(host):
    """Neither what contains one nor what only leads here."""
    assert not is_own_name(host)
