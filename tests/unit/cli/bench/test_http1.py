import pytest

from headrace.cli.bench.http1 import Endpoint, ResponseParser, request_bytes
from headrace.errors import BenchFailed, ConfigError

PLAIN = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nContent-Length: 5\r\n\r\nhello"
CHUNKS = b"3\r\nhel\r\nA;x=1\r\nlo, world!\r\n0\r\nExpires: never\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS
CONTINUED = b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n" + PLAIN
EMPTY = b"HTTP/1.1 204 No Content\r\nserver: x\r\n\r\n"
FORMS = {"plain": (PLAIN, b"hello"), "chunked": (CHUNKED, b"hello, world!"), "continued": (CONTINUED, b"hello")}


@pytest.mark.parametrize("keep_body", [True, False])
@pytest.mark.parametrize(("wire", "body"), FORMS.values(), ids=FORMS.keys())
def test_an_answer_is_the_same_however_it_is_split(wire, body, keep_body):
    """Wherever the network cuts an answer in three, it is complete with its last byte and not before."""
    for first in range(len(wire)):
        for second in range(first, len(wire), 7):
            parser = ResponseParser(keep_body=keep_body)
            pieces = [piece for piece in (wire[:first], wire[first:second], wire[second:]) if piece]

            completions = [parser.feed(piece) for piece in pieces]

            assert completions == [False] * (len(pieces) - 1) + [True]
            assert parser.status == 200
            assert parser.body == (body if keep_body else b"")


@pytest.mark.parametrize(("wire", "body"), FORMS.values(), ids=FORMS.keys())
def test_answers_follow_each_other_on_one_connection(wire, body):
    """An answer with the very head of the one before it means the same and starts afresh."""
    parser = ResponseParser(keep_body=True)

    for answer, expected in ((wire, body), (wire, body), (EMPTY, b""), (wire, body)):
        assert parser.feed(answer)
        assert parser.body == expected
        assert parser.keep_alive


def test_a_body_without_length_ends_with_the_connection():
    """HTTP/1.0 style: only the end of the connection completes it, and nothing can follow."""
    parser = ResponseParser(keep_body=True)

    assert not parser.feed(b"HTTP/1.1 200 OK\r\n\r\nall of")
    assert not parser.feed(b" it")
    assert parser.finish()
    assert parser.body == b"all of it"
    assert not parser.keep_alive


@pytest.mark.parametrize("wire", [PLAIN[:-1], CHUNKED[:-1], PLAIN[:20]], ids=["plain", "chunked", "head"])
def test_an_answer_that_is_cut_off_is_not_complete(wire):
    """A connection that ends too soon completes nothing."""
    parser = ResponseParser()
    parser.feed(wire)

    assert not parser.finish()


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nConnection: close", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 0", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 0\r\nConnection: keep-alive", True),
    ],
)
def test_whether_a_connection_persists_is_read_from_the_head(head, expected):
    """RFC 9112, 9.3: HTTP/1.1 persists unless it says close, HTTP/1.0 only if it says keep-alive."""
    parser = ResponseParser()

    assert parser.feed(head + b"\r\n\r\n")
    assert parser.keep_alive is expected


@pytest.mark.parametrize(
    "wire",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 OK\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n",
        PLAIN + b"and more",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"1" * 2_000,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * 12_000,
    ],
    ids=[
        "other protocol",
        "no status",
        "no number",
        "too long",
        "no size",
        "endless head",
        "endless size",
        "trailers",
    ],
)
def test_what_is_not_http_is_refused(wire):
    """Bytes that mean nothing, or never end, are an error and not an answer."""
    with pytest.raises(BenchFailed):
        ResponseParser().feed(wire)


def test_a_request_is_rendered_with_host_and_length():
    """A body goes out as JSON with its length; the caller's headers go along."""
    endpoint = Endpoint(host="127.0.0.1", port=8000)

    request = request_bytes(endpoint, "POST", "/x", body=b"{}", headers={"authorization": "Bearer t"})

    head, _, body = request.partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"POST /x HTTP/1.1"
    assert {b"host: 127.0.0.1:8000", b"authorization: Bearer t", b"content-length: 2"} <= set(head.split(b"\r\n"))
    assert body == b"{}"


@pytest.mark.parametrize(
    ("url", "host", "port", "authority"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1", 8000, "127.0.0.1:8000"),
        ("http://example.org/", "example.org", 80, "example.org:80"),
        ("http://[::1]:8080", "::1", 8080, "[::1]:8080"),
    ],
)
def test_an_endpoint_is_read_from_a_url(url, host, port, authority):
    """Host, port, and both together as the Host header wants them."""
    endpoint = Endpoint.parse(url)

    assert (endpoint.host, endpoint.port, endpoint.authority) == (host, port, authority)


@pytest.mark.parametrize(
    "url", ["https://example.org", "example.org:80", "http://", "http://h:99999", "http://h/api", "http://u:p@h"]
)
def test_a_url_that_is_more_or_less_than_an_endpoint_is_refused(url):
    """Nothing of what was asked is dropped silently."""
    with pytest.raises(ConfigError, match="http://host:port"):
        Endpoint.parse(url)
