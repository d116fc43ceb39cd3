"""The Django back end: what Django documents, what it leaves open, and what is ours, on a real Redis."""

import datetime
import decimal
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pickle import PickleError

import pytest

pytest.importorskip("django", reason="Django is not installed")

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

if not settings.configured:
    settings.configure(
        SECRET_KEY="tests", ALLOWED_HOSTS=["*"], INSTALLED_APPS=["django.contrib.contenttypes"], USE_TZ=True
    )
    import django

    django.setup()

from django.contrib.contenttypes.models import ContentType
from django.http import HttpResponse, StreamingHttpResponse
from django.utils.safestring import SafeString, mark_safe

from headrace.cache import CachePolicy, RemoteConfig
from headrace.cache.integrations.django import HeadraceCache
from headrace.cache.integrations.settings import close_shared
from headrace.errors import UnencodableValue
from tests.redis_servers import CLOCK, PATIENT, wait_until


@pytest.fixture
def make_cache(server) -> Iterator[Callable[..., HeadraceCache]]:
    def make(location: str | None = None, *, options: dict | None = None, **params: object) -> HeadraceCache:
        location = server.url if location is None else location
        remote = {"remote": PATIENT} if location else {}
        return HeadraceCache(location, {**params, "OPTIONS": {**remote, **(options or {})}})

    yield make
    close_shared()


@pytest.fixture
def cache(make_cache) -> HeadraceCache:
    return make_cache()


@pytest.fixture
def other(make_cache) -> HeadraceCache:
    """Another process, as far as memory goes."""
    return make_cache(options={"memory": None})


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 0, -1, 2**64, 1.5, "text", b"bytes", [1, [2]], (1, (2,)), {"a": {1, 2}}, {1: "a", (1, 2): "b"}),
        *(frozenset({"a"}), 1 + 2j, decimal.Decimal("1.10"), uuid.UUID(int=7), bytearray(b"x")),
        *(datetime.date(2026, 1, 2), datetime.time(3, 4, 5), datetime.timedelta(days=-1, microseconds=3)),
        datetime.datetime(2026, 1, 2, 3, 4),  # noqa: DTZ001 - naive ones are cached too
        datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    ],
    ids=repr,
)
def test_a_value_comes_back_as_itself(cache, other, value):
    """In this process and in another, a value is equal to what was stored, and of the same type."""
    cache.set("k", value)
    for reader in (cache, other):
        found = reader.get("k", "missing")
        assert found == value
        assert found.__class__ is value.__class__


def test_a_safe_string_stays_safe(cache, other):
    """A cached template fragment is not escaped again."""
    cache.set("k", [mark_safe("<b>")])
    assert isinstance(other.get("k")[0], SafeString)


def test_a_response_comes_back_whole(cache, other):
    """Status, headers, cookies and content survive; what streams is refused."""
    response = HttpResponse(b"\xff", status=201, reason="Made", headers={"X-Y": "z"}, content_type="a/b")
    response.set_cookie("c", "v;w", max_age=5, httponly=True)
    cache.set("k", response)
    found = other.get("k")
    assert (found.status_code, found.reason_phrase, found.content) == (201, "Made", b"\xff")
    assert dict(found.items()) == dict(response.items())
    assert found.cookies == response.cookies
    with pytest.raises(UnencodableValue, match="StreamingHttpResponse"):
        cache.set("k", StreamingHttpResponse([b"x"]))


def test_a_model_instance_comes_back_as_from_the_database(cache, other):
    """Loaded fields and annotations are there, others are deferred, and it is not new."""
    kind = ContentType.from_db("default", ["id", "model"], [3, "cat"])
    kind.legs = 4
    cache.set("k", {"kinds": [kind]})
    found = other.get("k")["kinds"][0]
    assert (found, found.model, found.legs) == (kind, "cat", 4)
    assert found.get_deferred_fields() == {"app_label"}
    assert (found._state.adding, found._state.db) == (False, "default")


def test_what_cannot_be_stored_says_so(cache):
    """A function, a query set, an object: refused at once, also for code that expects a PickleError."""
    for value in (len, ContentType.objects.none(), object(), HeadraceCache):
        with pytest.raises(UnencodableValue, match="not stored") as raised:
            cache.set("k", value)
        assert isinstance(raised.value, PickleError)
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(UnencodableValue, match="in itself"):
        cache.add("k", loop)
    assert cache.get("k") is None


def test_what_is_got_may_be_changed(cache):
    """Each `get` is a value of its own: a session that a request spoils does not reach the next request."""
    cache.set("session", {"user": 1})
    cache.get("session")["user"] = 2
    assert cache.get("session") == {"user": 1}


def test_foreign_bytes_are_a_miss(cache, other):
    """A value that another program wrote under the key is not ours, and breaks nothing."""
    other._cache.set(":1:k", b"\xc1")
    other._cache.set(":1:l", {"not": "bytes"})
    assert cache.get("k", "default") == "default"
    assert cache.get("l", "default") == "default"
    assert cache.get_many(["k", "l"]) == {}


def test_timeouts_are_those_that_django_documents(make_cache, server):
    """Unset is TIMEOUT, None is for ever, 0 and less are not stored."""
    cache = make_cache(TIMEOUT=50)
    cache.set("default", 1)
    cache.set("given", 1, 20.5)
    cache.set("kept", 1, None)
    for timeout in (0, -5):
        cache.set("none", 1)
        cache.set("none", 1, timeout)
        assert cache.get("none") is None
    ttls = {name.split(b"{")[1]: server.call("PTTL", name) for name in server.call("KEYS", "django:*}")}
    assert 40_000 < ttls[b":1:default}"] <= 50_000
    assert 10_000 < ttls[b":1:given}"] <= 20_500
    assert ttls[b":1:kept}"] == -1


def test_one_add_succeeds_over_threads_and_processes(cache, other):
    """Of many who take a lock with `add`, one gets it."""
    with ThreadPoolExecutor(8) as pool:
        for turn in range(10):
            took = list(pool.map(lambda place, turn=turn: (cache, other)[place % 2].add(f"l{turn}", place), range(16)))
            assert sum(took) == 1
            assert cache.get(f"l{turn}") == took.index(True)


def test_counting_is_atomic_and_keeps_the_expiry(cache, other, server):
    """`incr` and `decr` from many threads of two processes lose nothing, and the window that they count in ends."""
    cache.set("n", 0, 100)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda place: (cache, other)[place % 2].incr("n", 3), range(40)))
    assert other.decr("n", 20) == 100
    wait_until(lambda: cache.get("n") == 100, "the last count is heard of")
    (name,) = server.call("KEYS", "django:*:n}")
    assert 60_000 < server.call("PTTL", name) <= 100_100
    with pytest.raises(ValueError, match="'missing' not found"):
        cache.incr("missing")


def test_touch_gives_a_new_timeout(cache, server):
    """The value stays, its end moves."""
    cache.set("k", "v", 500)
    assert cache.touch("k", None) is True
    (name,) = server.call("KEYS", "django:*:k}")
    assert server.call("PTTL", name) == -1
    assert cache.touch("k", 0) is True
    assert cache.get("k") is None
    assert cache.touch("k") is False


def test_a_default_is_computed_once_for_all_who_ask(cache):
    """`get_or_set` with a slow callable runs it in one thread."""
    calls = []

    def compute() -> str:
        calls.append(1)
        wait_until(lambda: len(pool._threads) == 6, "all ask")
        return "value"

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda _: cache.get_or_set("k", compute, 30), range(6))) == ["value"] * 6
    assert calls == [1]


def test_threads_and_aliases_share_one_cache(make_cache):
    """Backends that are told the same share memory and connections; prefixes and versions keep them apart."""
    one, same, prefixed = make_cache(), make_cache(), make_cache(KEY_PREFIX="p", VERSION=2)
    memory_alone = make_cache("", options={"namespace": "other"})
    one.set("k", 1)
    assert one._cache is same._cache is prefixed._cache
    assert memory_alone._cache is not one._cache
    assert [cache.get("k") for cache in (same, prefixed, memory_alone)] == [1, None, None]


def test_memory_alone_needs_no_server(make_cache):
    """Without LOCATION it is a cache of this process, bounded by MAX_ENTRIES."""
    cache = make_cache("", options={"MAX_ENTRIES": 10})
    cache.set_many({str(number): number for number in range(100)})
    assert len(cache.get_many(map(str, range(100)))) == 10
    cache.clear()
    assert cache.add("n", 1)
    assert not cache.add("n", 1)
    assert cache.incr("n") == 2


def test_options_reach_the_configuration(make_cache, server):
    """Policies may be objects or their fields; a wrong option says which are known."""
    policies = [CachePolicy(match="*:a", stale_max=5), {"match": "*:b", "strategy": "write-behind"}]
    make_cache(options={"policies": policies}).set("b", 1)
    whole = RemoteConfig(url=server.url, encryption_keys={"one": "a secret of more than sixteen bytes"})
    assert make_cache(options={"remote": whole})._cache is make_cache(options={"remote": whole})._cache
    with pytest.raises(ImproperlyConfigured, match="Did you mean 'policies'"):
        make_cache(options={"polices": []})
    with pytest.raises(ImproperlyConfigured, match="entries_max is 0"):
        make_cache(options={"memory": {"entries_max": 0}})
    with pytest.raises(ImproperlyConfigured, match="starts with 'http'"):
        make_cache("http://cache")


def test_get_or_set_replaces_what_cannot_be_read(cache):
    """An entry that another release packed is a miss: the default is computed, stored and returned."""
    cache._cache.set(cache.make_key("k"), b"\xc1", type=bytes)
    assert cache.get_or_set("k", lambda: 2) == 2
    assert cache.get("k") == 2


def test_a_dead_server_breaks_no_view(make_cache, server):
    """Without Redis a request sees misses and its own writes; what needs Redis to be true is False."""
    patience = {"timeout": 60.0, "connect_timeout": 60.0, "degraded_ttl": 60.0}
    cache = make_cache(options={"remote": {**PATIENT, **patience}})
    cache.set("k", "v")
    server.stop()
    started = CLOCK.monotonic()
    wait_until(lambda: not cache._cache.statistics().remote_available, "the loss is noticed")
    cache.set("own", 1)
    assert cache.get("own") == 1
    assert cache.get_or_set("g", lambda: 2) == 2
    assert cache.add("lock", 1) is False
    assert cache.touch("k") is False
    cache.delete_many(["k", "own"])
    assert cache.get_many(["k", "own"]) == {}
    assert CLOCK.monotonic() - started < 50  # less than a timeout
