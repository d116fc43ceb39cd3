"""Key templates: which calls share an entry, which never do, and which are refused."""

import datetime
import enum
import uuid
from collections.abc import AsyncIterator

import pytest

from headrace.cache import Cache
from headrace.cache.decorators import KeyTemplate
from headrace.errors import ConfigError, InvalidKey


class Colour(enum.Enum):
    RED = "red: the colour"


def key(template, function, *args, **kwargs) -> str:
    return KeyTemplate(template, function).compiled()(*args, **kwargs)


@pytest.fixture
async def cache(clock) -> AsyncIterator[Cache]:
    async with Cache(clock=clock) as cache:
        yield cache


def user(user_id: int, team="core", *, deep: bool = False): ...


def anything(a, b=None): ...


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((7,), {}), ((), {"user_id": 7}), ((7, "core"), {}), ((7,), {"deep": True})],
)
def test_a_call_has_one_key_however_it_is_spelt(args, kwargs):
    """Positional, named and default arguments give the same key."""
    assert key("user:{user_id}:{team}", user, *args, **kwargs) == "user:7:core"


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("a/b:c", "x:a/b:c"),
        ("", "x:"),
        ("50%", "x:50%25"),
        (7, "x:7"),
        (-1.5, "x:-1.5"),
        (True, "x:True"),
        (None, "x:%N"),
        (b"\x00\xff", "x:00ff"),
        (uuid.UUID(int=1), "x:00000000-0000-0000-0000-000000000001"),
        (datetime.date(2024, 2, 29), "x:2024-02-29"),
        (Colour.RED, "x:RED"),
    ],
)
def test_what_a_part_can_be(part, text):
    """Strings, numbers, bytes, UUIDs, dates, enums and None have a stable spelling."""
    assert key("x:{a}", anything, part) == text


@pytest.mark.parametrize(
    ("one", "other"),
    [(("a:b", "c"), ("a", "b:c")), (("", "a"), (":a", "")), (("%3A", "x"), (":", "x")), ((None, "x"), ("%N", "x"))],
)
def test_two_calls_never_share_a_key_by_accident(one, other):
    """Parts that hold the template's own separators are escaped."""
    assert key("x:{a}:{b}", anything, *one) != key("x:{a}:{b}", anything, *other)


def test_separators_of_several_bytes_are_told_apart():
    """However wide its code, an escaped separator cannot be read as another one and what follows it."""
    assert key("!{a}→{b}!{a}", anything, "!92", "x") != key("!{a}→{b}!{a}", anything, "→", "x")


@pytest.mark.parametrize(
    ("part", "why"),
    [([1], "not hashable"), ({}, "not hashable"), (object(), "no stable spelling"), ((1, 2), "no stable")],
)
def test_a_part_without_a_spelling_is_refused(part, why):
    """Lists, dicts and objects cannot be part of a key; the error names the parameter."""
    with pytest.raises(InvalidKey, match=f"'a'.*{why}"):
        key("x:{a}", anything, part)


@pytest.mark.parametrize("part", ["7", True, 7.0, None])
def test_an_annotated_part_takes_its_type_alone(part):
    """A parameter annotated int does not take the string of the number: they would share an entry."""
    with pytest.raises(InvalidKey, match="annotated int"):
        key("user:{user_id}", user, part)


def test_an_int_is_a_float_where_one_is_asked_for():
    """As in Python's own typing, an int may stand for a float, and both spell the same."""

    def area(radius: float): ...

    assert key("area:{radius}", area, 2) == key("area:{radius}", area, 2.0)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("user:{usr}", "no parameter"),
        ("user:{user_id.name}", "more than a name"),
        ("user:{user_id!r}", "more than a name"),
        ("user:{user_id:>8}", "more than a name"),
        ("user:{}", "more than a name"),
        ("user:{user_id", "cannot be read"),
        ("{user_id}{team}", "nothing separates"),
        ("{user_id}x{team}", "nothing separates"),
        ("{user_id}%{team}", "nothing separates"),
        ("", "empty"),
    ],
)
def test_a_wrong_template_is_refused_at_once(template, why):
    """Mistakes are found when the function is decorated, not when it is called."""
    with pytest.raises(ConfigError, match=why):
        KeyTemplate(template, user)


def test_star_arguments_cannot_be_parts():
    """*args and **kwargs have no name for one part."""

    def many(*args, **kwargs): ...

    with pytest.raises(ConfigError, match="no parameter"):
        KeyTemplate("x:{args}", many)


async def test_a_missing_argument_is_the_functions_own_error(cache):
    """A call that the function would not accept raises TypeError, as without the cache."""

    @cache.cached("user:{user_id}")
    async def load(user_id: int): ...

    with pytest.raises(TypeError, match="user_id"):
        await load()


async def test_an_async_function_is_called_once_a_key(cache):
    """A decorated coroutine function stays one, keeps its name, and runs once for each key."""
    calls = []

    @cache.cached("user:{user_id}:{team}", tags=["team:{team}"])
    async def load_user(user_id: int, team: str = "core") -> list:
        """Load a user."""
        calls.append(user_id)
        return [user_id, team]

    assert [await load_user(1), await load_user(1), await load_user(user_id=1), await load_user(2)] == [
        [1, "core"],
        [1, "core"],
        [1, "core"],
        [2, "core"],
    ]
    assert calls == [1, 2]
    assert (load_user.__name__, load_user.__doc__) == ("load_user", "Load a user.")
    assert await cache.get("user:2:core") == [2, "core"]
    assert await cache.invalidate_tag("team:core") == 2


async def test_the_short_way_spells_as_the_long_one(cache):
    """The fast path for one positional argument and the general path give the same key, escapes included."""
    calls = []

    @cache.cached("page:{path}")
    async def page(path: str) -> str:
        calls.append(path)
        return path.upper()

    for path in ("/a/b", "50%", "é*", ""):
        assert await page(path) == path.upper()
        assert await page(path=path) == path.upper()
    assert calls == ["/a/b", "50%", "é*", ""]


async def test_a_plain_function_stays_plain(cache):
    """A decorated plain function returns its value, not a coroutine."""
    calls = []

    @cache.cached("square:{number}")
    def square(number: int) -> int:
        calls.append(number)
        return number * number

    assert [square(3), square(3), square(4)] == [9, 9, 16]
    assert calls == [3, 4]


async def test_methods_leave_self_out_of_the_key(cache):
    """A method's key is made of the parameters that the template names."""

    class Shop:
        @cache.cached("price:{item}")
        async def price(self, item: str) -> int:
            return len(item)

    assert await Shop().price("tea") == 3
    assert await cache.get("price:tea") == 3


async def test_a_key_of_ones_own(cache):
    """key= builds the key from the call's arguments."""

    @cache.cached(key=lambda items: "sum:" + "-".join(map(str, sorted(items))))
    async def total(items: list) -> int:
        return sum(items)

    assert [await total([2, 1]), await total([1, 2])] == [3, 3]
    assert await cache.get("sum:1-2") == 3


async def test_template_and_key_exclude_each_other(cache):
    """Exactly one of template and key= is given."""
    for options in ({"template": "x", "key": str}, {}):
        with pytest.raises(ConfigError, match="not both"):
            cache.cached(**options)(user)


async def test_exceptions_pass_through(cache):
    """What the function raises reaches the caller and is not cached."""
    calls = []

    @cache.cached("x:{number}")
    async def fail(number: int) -> int:
        calls.append(number)
        raise ValueError(number)

    for _ in range(2):
        with pytest.raises(ValueError, match="1"):
            await fail(1)
    assert calls == [1, 1]
