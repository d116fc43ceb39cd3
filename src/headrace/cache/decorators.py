"""`@cache.cached("user:{user_id}")`: the key of a call from its arguments, and the function behind the cache.

A template is typed by the signature. A parameter annotated with `str`, `int` or another type of `PARTS` takes exactly
that type, so that `f(1)` and `f("1")` can never share an entry; one without such an annotation takes any of them. In a
template of several parts, a part's own separators are percent-encoded, because two calls ("a:b" + "c" and "a" + "b:c")
could else spell one key. What has no stable spelling (a list, an object) is refused with the parameter's name; `key=`
builds keys of one's own.

The function that stands before the decorated one is written as source and compiled, as dataclasses do with `__init__`:
the same parameters, an f-string for the key, one lookup. So Python itself binds names, defaults and keywords, at the
price of a call written by hand (`inspect.Signature.bind` costs ten hits), and refuses on a hit what the function would
refuse on a miss.
"""

import datetime
import decimal
import enum
import functools
import inspect
import linecache
import string
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


class _Draft:
    """A function with the parameters of another, to be written as source."""

    def __init__(self, signature: inspect.Signature) -> None:
        parameters = signature.parameters.values()
        # No name of ours may be one of the parameters'.
        self._prefix = "_"
        while any(one.name.startswith(self._prefix) for one in parameters):
            self._prefix += "_"
        self._values: dict[str, Any] = {}
        empty = inspect.Parameter.empty
        plain = [one.replace(annotation=empty, default=self._default(one)) for one in parameters]
        self.parameters = str(inspect.Signature(plain))
        """As they stand behind the function's name."""
        self.arguments = ", ".join(_PASSED_ON[one.kind].format(one.name) for one in parameters)
        """The same, to call the other function with."""

    def name(self, word: str, value: Any) -> str:
        """What the source calls `value`."""
        name = self.local(word)
        self._values[name] = value
        return name

    def local(self, word: str) -> str:
        """What the source calls a variable of its own."""
        return self._prefix + word

    def function(self, source: str, *, title: str) -> Callable[..., Any]:
        """The function `cached` that the source defines."""
        filename = f"<{title}>"
        exec(compile(source, filename, "exec", dont_inherit=True), self._values)  # noqa: S102 - no text of others in it
        # Tracebacks and debuggers show the lines.
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        written: Callable[..., Any] = self._values["cached"]
        return written

    def _default(self, parameter: inspect.Parameter) -> Any:
        if parameter.default is parameter.empty:
            return parameter.empty
        return _Reference(self.name(f"default_{parameter.name}", parameter.default))


class _Reference:
    """A default that `str` of a signature shows as a name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


_PASSED_ON = {
    inspect.Parameter.POSITIONAL_ONLY: "{0}",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "{0}",
    inspect.Parameter.VAR_POSITIONAL: "*{0}",
    inspect.Parameter.KEYWORD_ONLY: "{0}={0}",
    inspect.Parameter.VAR_KEYWORD: "**{0}",
}


class KeyTemplate:
    """A template that was checked against a signature."""

    __slots__ = ("_parts", "_separators", "signature", "template")

    def __init__(self, template: str, function: Callable[..., Any]) -> None:
        self.template = template
        self.signature = inspect.signature(function)
        pieces = _parse(template)
        parameters = self.signature.parameters
        for _, field in pieces:
            if field is not None and (field not in parameters or parameters[field].kind in _STARRED):
                raise ConfigError(
                    f"The key template {template!r} names {field!r}, which is no parameter of"
                    f" {function.__qualname__}{self.signature}.",
                    fix=f"Use one of: {', '.join(parameters) or 'no parameters at all'}.",
                )
        self._separators = _separators(template, pieces)
        hints = _hints(function)
        self._parts = [(text, field, hints.get(field) if field else None) for text, field in pieces]

    def compiled(self) -> Callable[..., str]:
        """A function that is called like the decorated one and spells the key; it raises InvalidKey for a part that
        cannot be in one, TypeError as the function itself would."""
        draft = _Draft(self.signature)
        source = f"def cached{draft.parameters}:\n    return {self.expression(draft)}\n"
        return draft.function(source, title=f"key {self.template}")

    def expression(self, draft: _Draft) -> str:
        """The f-string that spells the key inside a function with these parameters."""
        written = []
        for number, (text, field, hint) in enumerate(self._parts):
            if text:
                written.append(f"{{{draft.name(f'text_{number}', text)}}}")
            if field is not None:
                written.append(f"{{({self._part(draft, field, hint)})}}")
        return f"f'{''.join(written)}'"

    def _part(self, draft: _Draft, field: str, hint: Any) -> str:
        """The spelling of one part, with what most parts are written out before the call of its speller."""
        speller = _speller(field, hint)
        spell_part = draft.name(
            f"spell_{field}", _escaping(speller, self._separators) if self._separators else speller
        )
        if hint is str:
            is_itself = f"{field}.isalnum()" if self._separators else f'"%" not in {field}'
            condition = f"{field}.__class__ is {draft.name('str', str)} and {is_itself}"
        elif (hint is int or not _is_exact(hint)) and "-" not in self._separators:
            condition = f"{field}.__class__ is {draft.name('int', int)}"
        else:
            return f"{spell_part}({field})"
        return f"{field} if {condition} else {spell_part}({field})"


_STARRED = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def _parse(template: str) -> list[tuple[str, str | None]]:
    """`user:{user_id}` as pairs of a text and the field that follows it."""
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"The key template {template!r} cannot be read: {error}.") from error
    if not template:
        raise ConfigError("A key template must not be empty.", fix='Write something like "user:{user_id}".')
    for _, field, spec, conversion in pieces:
        if field is not None and (spec or conversion or not field.isidentifier()):
            raise ConfigError(f"The key template {template!r} holds more than a name in braces: {field!r}.")
    return [(text, field) for text, field, _, _ in pieces]


def _separators(template: str, pieces: list[tuple[str, str | None]]) -> frozenset[str]:
    """The characters that stand between the parts of a template and must not be in one; none for a single part."""
    fields = [number for number, (_, field) in enumerate(pieces) if field is not None]
    between = [pieces[number][0] for number in fields[1:]]
    # Not a "%" alone: it stands in the parts, where others are escaped by it.
    if not all(any(not character.isalnum() and character != "%" for character in text) for text in between):
        raise ConfigError(
            f"The key template {template!r} has parts that nothing separates.", fix='Put a ":" between them.'
        )
    return frozenset(character for text in between for character in text if not character.isalnum())


def _escaping(spell_part: Callable[[Any], str], separators: frozenset[str]) -> Callable[[Any], str]:
    """The speller, with every separator percent-encoded inside the part. (Its own "%" are encoded already.)"""
    table = str.maketrans(
        {character: "".join(f"%{byte:02X}" for byte in character.encode()) for character in separators - {"%"}}
    )

    def spell_escaped(part: Any) -> str:
        text = spell_part(part)
        return text if text.isalnum() else text.translate(table)

    return spell_escaped


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError:  # a forward reference to what is not imported at run time: those parameters take any part
        return {}


def _is_exact(hint: Any) -> bool:
    """Whether the annotation is a type that parts are held to."""
    return isinstance(hint, type) and hint in PARTS


def _speller(name: str, hint: Any) -> Callable[[Any], str]:
    if not _is_exact(hint):
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
    labels = [KeyTemplate(tag, function).compiled() for tag in tags]
    if key is not None:
        draft = _Draft(_ANY_CALL)
        expression = f"{draft.name('make_key', key)}({draft.arguments})"
    else:
        assert template is not None
        checked = KeyTemplate(template, function)
        draft = _Draft(checked.signature)
        expression = checked.expression(draft)
    is_async = inspect.iscoroutinefunction(function)
    source = (_ASYNC if is_async else _PLAIN).format(
        parameters=draft.parameters,
        expression=expression,
        arguments=draft.arguments,
        tags="".join(
            f"{draft.name(f'tag_{number}', label)}({draft.arguments}), " for number, label in enumerate(labels)
        ),
        key=draft.local("key"),
        entry=draft.local("entry"),
        lookup=draft.name("lookup", cache.entry_lookup),
        now=draft.name("now", cache.now),
        load=draft.name("load", cache.load_async if is_async else cache.load_blocking),
        bound=draft.name("bound", functools.partial),
        function=draft.name("function", function),
        ttl=draft.name("ttl", ttl),
        type=draft.name("type", result_type(function)),
    )
    written = draft.function(source, title=f"cached {function.__module__}.{function.__qualname__}")
    return functools.wraps(function)(written)


_ANY_CALL = inspect.signature(lambda *args, **kwargs: None)
"""With `key=` the arguments go on as the caller wrote them."""

_ASYNC = """\
async def cached{parameters}:
    {key} = {expression}
    {entry} = {lookup}({key})
    if {entry} is not None and {entry}.attention_at > {now}():
        return {entry}.value
    return await {load}(
        {key}, {entry}, {bound}({function}, {arguments}), ttl={ttl}, tags=({tags}), type={type}
    )
"""
_PLAIN = _ASYNC.replace("async ", "").replace("await ", "")
