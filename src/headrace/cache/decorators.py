"""`@cache.cached("user:{user_id}")`: the key of a call from its arguments, and the function behind the cache.

A template is typed by the signature. A parameter annotated with `str`, `int` or another type of `PARTS` takes exactly
that type, so that `f(1)` and `f("1")` can never share an entry; one without such an annotation takes any of them. In a
template of several parts, a part's own separators are percent-encoded, because two calls ("a:b" + "c" and "a" + "b:c")
could else spell one key. What has no stable spelling (a list, an object) is refused with the parameter's name; `key=`
builds keys of one's own.
"""

import datetime
import decimal
import enum
import functools
import inspect
import string
import sys
import typing
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import msgspec

from headrace.cache.entry import Entry
from headrace.errors import ConfigError, InvalidKey


def _text(part: str) -> str:
    return part if "%" not in part else part.replace("%", "%25")


PARTS: dict[type, Callable[[Any], str]] = {
    str: _text,
    int: str,
    bool: str,
    float: repr,
    bytes: bytes.hex,
    type(None): lambda _: "%N",
    uuid.UUID: str,
    decimal.Decimal: str,
    datetime.date: datetime.date.isoformat,
    datetime.datetime: datetime.datetime.isoformat,
}
"""The types that a part of a key can have, and how each is spelt."""


def spell(name: str, part: Any) -> str:
    """A part as it stands in a key; raises InvalidKey for what has no stable spelling."""
    speller = PARTS.get(part.__class__)
    if speller is not None:
        return speller(part)
    if isinstance(part, enum.Enum):
        return _text(part.name)
    why = "is not hashable" if part.__class__.__hash__ is None else "has no stable spelling"
    raise InvalidKey(
        f"The key part {name!r} is a {part.__class__.__name__}, which {why}.",
        fix="Put something of it that names it into the template, or build the key with `key=`.",
    )


PlainPart = tuple[int, Any, str, str]
"""Position and type of the only part of a template whose spelling is its str(), and the text around it."""
NOT_PLAIN: PlainPart = (sys.maxsize, None, "", "")


class KeyTemplate:
    """A template that was checked against a signature."""

    __slots__ = ("_fields", "_format", "_hints", "_positions", "_signature", "_spellers", "template")

    def __init__(self, template: str, function: Callable[..., Any]) -> None:
        self.template = template
        self._signature = inspect.signature(function)
        self._format, self._fields = _parse(template)
        parameters = self._signature.parameters
        for field in self._fields:
            if field not in parameters or parameters[field].kind in {
                inspect.Parameter.VAR_POSITIONAL,
                inspect.Parameter.VAR_KEYWORD,
            }:
                raise ConfigError(
                    f"The key template {template!r} names {field!r}, which is no parameter of"
                    f" {function.__qualname__}{self._signature}.",
                    fix=f"Use one of: {', '.join(parameters) or 'no parameters at all'}.",
                )
        hints = _hints(function)
        self._spellers = tuple(_speller(field, hints.get(field)) for field in self._fields)
        if len(self._fields) > 1:
            self._spellers = _escaping(template, self._spellers)
        order = [name for name, one in parameters.items() if one.kind is not inspect.Parameter.KEYWORD_ONLY]
        self._positions = tuple(order.index(field) if field in order else -1 for field in self._fields)
        self._hints = hints

    def plain_part(self) -> PlainPart:
        """How to spell the key without this template, for the calls that allow it; NOT_PLAIN if none does."""
        kind = self._hints.get(self._fields[0]) if len(self._fields) == 1 else None
        if kind not in (str, int, uuid.UUID) or self._positions[0] < 0 or "%" in self.template:
            return NOT_PLAIN
        head, tail = self._format.split("%s")
        return self._positions[0], kind, head, tail

    def render(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """The key of a call; raises InvalidKey for a part that cannot be in one, TypeError as the function itself
        would."""
        if not kwargs and all(0 <= position < len(args) for position in self._positions):
            parts = [args[position] for position in self._positions]
        else:
            bound = self._signature.bind(*args, **kwargs)
            bound.apply_defaults()
            parts = [bound.arguments[field] for field in self._fields]
        return self._format % tuple(speller(part) for speller, part in zip(self._spellers, parts, strict=True))


def _parse(template: str) -> tuple[str, list[str]]:
    """`user:{user_id}` as `user:%s` and its fields."""
    text: list[str] = []
    fields: list[str] = []
    try:
        for literal, field, spec, conversion in string.Formatter().parse(template):
            text.append(literal.replace("%", "%%"))
            if field is not None:
                if spec or conversion or not field.isidentifier():
                    raise ConfigError(f"The key template {template!r} holds more than a name in braces: {field!r}.")
                fields.append(field)
                text.append("%s")
    except ValueError as error:
        raise ConfigError(f"The key template {template!r} cannot be read: {error}.") from error
    if not template:
        raise ConfigError("A key template must not be empty.", fix='Write something like "user:{user_id}".')
    return "".join(text), fields


def _escaping(template: str, spellers: "tuple[Callable[[Any], str], ...]") -> "tuple[Callable[[Any], str], ...]":
    """The spellers, with every character that separates parts in this template percent-encoded inside a part."""
    between = [literal for literal, _, _, _ in string.Formatter().parse(template)][1 : len(spellers)]
    if not all(any(not character.isalnum() for character in literal) for literal in between):
        raise ConfigError(
            f"The key template {template!r} has parts that nothing separates.", fix='Put a ":" between them.'
        )
    separators = {character for literal in between for character in literal if not character.isalnum()} - {"%"}
    table = str.maketrans({character: f"%{ord(character):02X}" for character in separators})

    def escaping(spell_part: Callable[[Any], str]) -> Callable[[Any], str]:
        def spell_escaped(part: Any) -> str:
            text = spell_part(part)
            return text if text.isalnum() else text.translate(table)

        return spell_escaped

    return tuple(escaping(speller) for speller in spellers)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError:  # a forward reference to what is not imported at run time: those parameters take any part
        return {}


def _speller(name: str, hint: Any) -> Callable[[Any], str]:
    if not isinstance(hint, type) or hint not in PARTS:
        return functools.partial(spell, name)
    kind = hint
    write = PARTS[kind]

    def spell_exactly(part: Any) -> str:
        if part.__class__ is kind:
            return write(part)
        if kind is float and part.__class__ is int:
            return repr(float(part))
        if kind is str and isinstance(part, str):
            return _text(str.__str__(part))
        raise InvalidKey(
            f"The key part {name!r} is annotated {kind.__name__} and got a {part.__class__.__name__}.",
            fix="Convert it before the call, or correct the annotation.",
        )

    return spell_exactly


def result_type(function: Callable[..., Any]) -> Any:
    """The annotated return type, by which values from the shared tier are checked; Any if there is none."""
    hint = _hints(function).get("return", Any)
    return Any if hint is type(None) else hint


class Door(Protocol):
    """What a decorated function needs of a cache."""

    @property
    def entry_lookup(self) -> Callable[[str], Entry | None]:
        """The memory tier's lookup."""

    @property
    def now(self) -> Callable[[], float]:
        """The monotonic clock that entries are measured by."""

    async def load_async(
        self,
        key: str,
        entry: Entry | None,
        loader: Callable[[], Any],
        *,
        ttl: float | msgspec.UnsetType | None,
        tags: Iterable[str],
        type: Any,
    ) -> Any:
        """What follows a miss in memory."""

    def load_blocking(
        self,
        key: str,
        entry: Entry | None,
        loader: Callable[[], Any],
        *,
        ttl: float | msgspec.UnsetType | None,
        tags: Iterable[str],
        type: Any,
    ) -> Any:
        """The same for a caller that blocks."""


def decorate(
    cache: Door,
    function: Callable[..., Any],
    *,
    template: str | None,
    ttl: float | msgspec.UnsetType | None,
    tags: Iterable[str],
    key: Callable[..., str] | None,
) -> Callable[..., Any]:
    """The function behind the cache: a coroutine function stays one, a plain one stays plain."""
    if (template is None) == (key is None):
        raise ConfigError(
            f"cached() on {function.__qualname__} needs either a key template or key=, and not both.",
            fix='Write @cache.cached("user:{user_id}") or @cache.cached(key=lambda user: ...).',
        )
    labels = [KeyTemplate(tag, function) for tag in tags]
    options = _CallOptions(ttl=ttl, labels=labels, type=result_type(function))
    if key is not None:
        make_key = key

        def render(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
            return make_key(*args, **kwargs)

        plain = NOT_PLAIN
    else:
        assert template is not None
        checked = KeyTemplate(template, function)
        render, plain = checked.render, checked.plain_part()
    wrap = _wrap_async if inspect.iscoroutinefunction(function) else _wrap_sync
    return wrap(cache, function, render, options, plain)


class _CallOptions:
    """What a decorated function was told once, for all its calls."""

    __slots__ = ("_labels", "ttl", "type")

    def __init__(self, *, ttl: float | msgspec.UnsetType | None, labels: list[KeyTemplate], type: Any) -> None:
        self.ttl = ttl
        self.type = type
        self._labels = labels

    def tags(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
        """The tags of one call: they may have parameters like the key."""
        return tuple(label.render(args, kwargs) for label in self._labels)


def _wrap_async(
    cache: Door, function: Callable[..., Any], render: Callable[..., str], options: _CallOptions, plain: "PlainPart"
) -> Callable[..., Any]:
    lookup, now, load = cache.entry_lookup, cache.now, cache.load_async
    position, kind, head, tail = plain

    @functools.wraps(function)
    async def cached(*args: Any, **kwargs: Any) -> Any:
        # The commonest call, one positional part of exactly the annotated type, is spelt without another call.
        if not kwargs and len(args) > position and args[position].__class__ is kind:
            key = f"{head}{args[position]}{tail}"
            if "%" in key:
                key = render(args, kwargs)
        else:
            key = render(args, kwargs)
        entry = lookup(key)
        if entry is not None and entry.attention_at > now():
            return entry.value
        return await load(
            key,
            entry,
            functools.partial(function, *args, **kwargs),
            ttl=options.ttl,
            tags=options.tags(args, kwargs),
            type=options.type,
        )

    return cached


def _wrap_sync(
    cache: Door, function: Callable[..., Any], render: Callable[..., str], options: _CallOptions, plain: "PlainPart"
) -> Callable[..., Any]:
    lookup, now, load = cache.entry_lookup, cache.now, cache.load_blocking
    position, kind, head, tail = plain

    @functools.wraps(function)
    def cached(*args: Any, **kwargs: Any) -> Any:
        if not kwargs and len(args) > position and args[position].__class__ is kind:
            key = f"{head}{args[position]}{tail}"
            if "%" in key:
                key = render(args, kwargs)
        else:
            key = render(args, kwargs)
        entry = lookup(key)
        if entry is not None and entry.attention_at > now():
            return entry.value
        return load(
            key,
            entry,
            functools.partial(function, *args, **kwargs),
            ttl=options.ttl,
            tags=options.tags(args, kwargs),
            type=options.type,
        )

    return cached
