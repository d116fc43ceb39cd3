"""Calls of cached functions: they are bound, refused and passed on as the function itself would have them."""

import inspect
import traceback
from collections.abc import AsyncIterator

import pytest

from headrace.cache import Cache
from headrace.cache.decorators import KeyTemplate

MISSING = object()


@pytest.fixture
async def cache(clock) -> AsyncIterator[Cache]:
    async with Cache(clock=clock) as cache:
        yield cache


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((7,), {}),
        ((), {"user_id": 7}),
        ((7, "core"), {}),
        ((7,), {"team": "core"}),
        ((), {"team": "core", "user_id": 7}),
        ((7,), {"deep": True}),
    ],
)
async def test_every_way_to_write_a_call_finds_its_entry(cache, args, kwargs):
    """Positional and named arguments and defaults, for async and plain functions."""
    calls = []

    @cache.cached("user:{user_id}:{team}")
    async def user(user_id: int, team: str = "core", *, deep: bool = False) -> str:
        calls.append((user_id, team, deep))
        return "user"

    @cache.cached("plain:{user_id}:{team}")
    def plain_user(user_id: int, team: str = "core", *, deep: bool = False) -> str:
        calls.append((user_id, team, deep))
        return "user"

    assert await user(7) == await user(*args, **kwargs) == "user"
    assert plain_user(7) == plain_user(*args, **kwargs) == "user"
    assert calls == [(7, "core", False)] * 2


@pytest.mark.parametrize(
    ("args", "kwargs"), [((7, "core"), {}), ((7,), {"team": "core"}), ((), {}), ((7,), {"user_id": 7})]
)
async def test_a_hit_refuses_what_the_function_would_refuse(cache, args, kwargs):
    """A call that is a TypeError without the cache is one also when the value is there."""

    @cache.cached("user:{user_id}")
    async def user(user_id: int) -> int:
        return user_id

    @cache.cached("plain:{user_id}")
    def plain_user(user_id: int) -> int:
        return user_id

    assert (await user(7), plain_user(7)) == (7, 7)
    with pytest.raises(TypeError, match=r"user\(\) (takes|got|missing)"):
        await user(*args, **kwargs)
    with pytest.raises(TypeError, match=r"plain_user\(\) (takes|got|missing)"):
        plain_user(*args, **kwargs)


async def test_all_kinds_of_parameters_reach_the_function(cache):
    """Positional-only, starred and keyword-only ones, and a default as the very object that it is."""

    @cache.cached("call:{first}:{named}")
    async def call(first: int, /, second=MISSING, *rest, named: int, **more) -> list:
        return [first, second, rest, named, more]

    assert await call(1, named=2) == [1, MISSING, (), 2, {}]
    assert await call(2, 3, 4, 5, named=6, other=7) == [2, 3, (4, 5), 6, {"other": 7}]


async def test_parameters_may_have_any_name(cache):
    """No name that the cache uses itself gets in the way."""

    @cache.cached("names:{key}:{entry}:{_key}:{int}:{str}", tags=["tag:{function}"])
    async def names(
        key: int, entry, lookup, now, load, function, ttl, type, int, str, _key, __bound, cached=1
    ) -> list:
        return [key, entry, lookup, now, load, function, ttl, type, int, str, _key, __bound, cached]

    arguments = list(range(12))
    for _ in range(2):
        assert await names(*arguments) == [*arguments, 1]
    assert await cache.get("names:0:1:10:8:9") == [*arguments, 1]
    assert await cache.invalidate_tag("tag:5") == 1


def test_the_text_of_a_template_is_text():
    """Quotes, backslashes, line ends and doubled braces stand in the key as they do in the template."""

    def anything(a): ...

    text = "it's \"quoted\" \\n \n %s {{a}} {a} ''' {{"

    assert KeyTemplate(text, anything).compiled()(1) == text.format(a=1)


@pytest.mark.parametrize(("a", "text"), [(1, "x-1-2"), (-1, "x-%2D1-2")])
def test_the_sign_of_a_number_is_no_separator(a, text):
    """A minus is encoded where minus signs stand between the parts."""

    def pair(a: int, b: int): ...

    assert KeyTemplate("x-{a}-{b}", pair).compiled()(a, 2) == text


async def test_a_key_function_gets_the_call_as_it_was_written(cache):
    """What `key=` is given has no defaults added to it."""
    seen = []

    def spell(*args, **kwargs) -> str:
        seen.append((args, kwargs))
        return "one"

    @cache.cached(key=spell)
    async def one(a, b=2, *, c=3) -> int:
        return a + b + c

    assert await one(1) == 6
    assert await one(1, c=4) == 6, "the key is the same"
    assert seen == [((1,), {}), ((1,), {"c": 4})]


async def test_a_decorated_function_looks_like_the_original(cache):
    """Name, documentation, signature and kind are kept: frameworks look at them."""

    async def user(user_id: int, team: str = "core", *, deep: bool = False) -> str:
        """Load a user."""
        return "user"

    decorated = cache.cached("user:{user_id}")(user)

    assert inspect.iscoroutinefunction(decorated)
    assert inspect.signature(decorated) == inspect.signature(user)
    assert (decorated.__name__, decorated.__doc__, decorated.__module__) == ("user", "Load a user.", __name__)


async def test_a_traceback_shows_the_line_of_the_cache(cache):
    """What the function raises can be followed through the function that was written around it."""

    @cache.cached("fail:{number}")
    def fail(number: int) -> int:
        raise ValueError(number)

    with pytest.raises(ValueError, match="1") as caught:
        fail(1)

    lines = "".join(traceback.format_tb(caught.value.__traceback__))
    assert "<cached " in lines
    assert "fail" in lines
    assert "return _load(" in lines
