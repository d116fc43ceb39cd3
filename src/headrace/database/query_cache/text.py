"""The text of a query, read token by token: what two texts must have in common to be one query. Pure.

Intuition: Postgres itself ignores three things, and so does the key of a cached result: how much white space stands
between two tokens, comments, and the case of ASCII letters in words without quotes. Everything else is kept byte for
byte. A fingerprint that a parser makes of a query is no key: it takes `a = 1` for `a IN (1, 2)`, `s.t` for `t`,
and so hands one tenant the rows of another.

The lexical rules are those of Postgres' scan.l with `standard_conforming_strings` on: '...', E'...', B'', X'', N'',
U&'...', $tag$...$tag$, "...", U&"...", -- and nested /* */ comments.
"""

import re
from collections.abc import Iterator, Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Any, Final, NamedTuple

from headrace.errors import CallerError


class Kind(StrEnum):
    """What a token is."""

    WORD = "word"
    QUOTED = "quoted"
    STRING = "string"
    OTHER = "other"


class Token(NamedTuple):
    """A token and what stood before it."""

    kind: Kind
    text: str
    """As it was written, or in lower case where that is the same."""
    gap: str
    """Nothing, a space, or a line break: between two strings a line break joins them, a space is an error."""


_TOKEN: Final = re.compile(
    r"""
    (?P<space>[ \t\r\f\v]+) | (?P<line>\n) | (?P<comment>--[^\n\r]*) | (?P<block>/\*)
  | (?P<escape>[eE]'(?:[^'\\]|''|\\.)*')
  | (?P<string>(?:[uU]&|[bBxXnN])?'(?:[^']|'')*')
  | (?P<quoted>(?:[uU]&)?"(?:[^"]|"")*")
  | (?P<word>[A-Za-z_\x80-\U0010ffff][A-Za-z0-9_$\x80-\U0010ffff]*)
  | (?P<parameter>\$[0-9]+)
  | (?P<dollar>\$(?P<tag>[A-Za-z_\x80-\U0010ffff][A-Za-z0-9_\x80-\U0010ffff]*)?\$.*?\$(?(tag)(?P=tag))\$)
  | (?P<number>(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][+-]?[0-9]+)?)
  | (?P<operator>(?:(?!--|/\*)[-+*/<>=~!@\#%^&|`?])+)
  | (?P<mark>[()\[\],;:.])
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_EDGE: Final = re.compile(r"/\*|\*/")
_KINDS: Final = {
    "word": Kind.WORD,
    "quoted": Kind.QUOTED,
    "escape": Kind.STRING,
    "string": Kind.STRING,
    "dollar": Kind.STRING,
}
_LOWER: Final = {upper: upper + 32 for upper in range(65, 91)}


def tokens(sql: str) -> Iterator[Token]:
    """The tokens of a text. Raises CallerError where Postgres would not find any."""
    position, gap = 0, ""
    while position < len(sql):
        found = _TOKEN.match(sql, position)
        if found is None or found.lastgroup is None:
            raise CallerError(f"The query cannot be read at character {position}: {sql[position : position + 20]!r}.")
        group = "dollar" if found.group("dollar") is not None else found.lastgroup
        position = found.end()
        if group == "block":
            position, gap = _comment_end(sql, position), gap or " "
        elif group == "line":
            gap = "\n"
        elif group in {"space", "comment"}:
            gap = gap or " "
        else:
            text = found.group()
            yield Token(_KINDS.get(group, Kind.OTHER), text.translate(_LOWER) if group == "word" else text, gap)
            gap = ""


def _comment_end(sql: str, position: int) -> int:
    depth = 1
    for edge in _COMMENT_EDGE.finditer(sql, position):
        depth += 1 if edge.group() == "/*" else -1
        if depth == 0:
            return edge.end()
    raise CallerError("The query has a comment without an end.")


def normalised(found: Sequence[Token]) -> str:
    """The one text that stands for all that mean the same by the rules above."""
    kept = list(found)
    while kept and kept[-1].text == ";":
        kept.pop()
    parts: list[str] = []
    before: Token | None = None
    for token in kept:
        joins = before is not None and before.kind is Kind.STRING and token.kind is Kind.STRING
        parts.append(("" if before is None else token.gap if joins else token.gap and " ") + token.text)
        before = token
    return "".join(parts)


class QueryText(NamedTuple):
    """What the text alone says of a query."""

    text: str
    """Normalised."""
    reason: str | None
    """Why its result must not be cached; None: nothing in the text forbids it."""
    calls: tuple[str, ...]
    """Names before a parenthesis: functions, and words that are none."""
    names: tuple[str, ...]
    """Every identifier."""
    operators: tuple[str, ...]
    complexity: int
    """1, and one more for each join, grouping, sorting, window, set operation and subquery."""


_READS: Final = frozenset({"select", "with", "values", "table"})
_WRITES: Final = frozenset({"insert", "update", "delete", "merge", "truncate", "into", "copy", "call", "execute"})
_LOCKS: Final = frozenset({"update", "no", "share", "key"})
_MOMENTARY: Final = frozenset(
    [
        "current_date",
        "current_time",
        "current_timestamp",
        "localtime",
        "localtimestamp",
        "current_user",
        "current_role",
        "session_user",
        "user",
        "current_catalog",
        "current_schema",
        "system_user",
    ]
)
_PHYSICAL: Final = frozenset({"ctid", "xmin", "xmax", "cmin", "cmax"})
_CATALOGUED: Final = re.compile(
    r"_?reg(?:class|proc|procedure|oper|operator|type|role|namespace|config|dictionary|collation)"
)
_HEAVY: Final = frozenset(
    ["join", "group", "order", "distinct", "union", "intersect", "except", "having", "over", "select", "with"]
)
_DATE_WORD: Final = re.compile(r"(?<![A-Za-z])(?:now|today|tomorrow|yesterday)(?![A-Za-z])", re.IGNORECASE)
_CODE: Final = re.compile(r"\\[0-7xuU]")
"""In E'...': a character that is written as a number."""
READ_MAX: Final = 20_000
"""Characters of a text that is read, and remembered: reading ten times as many would hold the loop for 0.2 s."""


def read_text(sql: str) -> QueryText:
    """Read a text. One that cannot be read has a reason, and is its own text."""
    if len(sql) > READ_MAX:
        return QueryText("", f"its text is longer than {READ_MAX} characters", (), (), (), 1)
    try:
        found = list(tokens(sql))
    except CallerError as error:
        return QueryText(sql, error.message, (), (), (), 1)
    calls: list[str] = []
    names: list[str] = []
    operators: list[str] = []
    heavy = 0
    for index, token in enumerate(found):
        if token.kind in {Kind.WORD, Kind.QUOTED}:
            name = identifier(token)
            names.append(name)
            if index + 1 < len(found) and found[index + 1].text == "(":
                calls.append(name)
            heavy += token.kind is Kind.WORD and token.text in _HEAVY
        elif token.kind is Kind.OTHER and token.text[0] in "+-*/<>=~!@#%^&|`?":
            # Postgres ends `=-1` after the equals sign.
            operators += [token.text, token.text.rstrip("+-")]
    return QueryText(
        normalised(found),
        _forbidden(found),
        tuple(dict.fromkeys(calls)),
        tuple(dict.fromkeys(names)),
        tuple(dict.fromkeys(operators)),
        max(1, heavy),
    )


def identifier(token: Token) -> str:
    """The name that a word or a quoted identifier stands for."""
    if token.kind is Kind.QUOTED and token.text.startswith('"'):
        return token.text[1:-1].replace('""', '"')
    return token.text


def _forbidden(found: Sequence[Token]) -> str | None:
    words = [token.text if token.kind is Kind.WORD else "" for token in found]
    first = next((token for token in found if token.text != "("), None)
    if first is None or first.text not in _READS:
        return "it is not a SELECT"
    while found and found[-1].text == ";":
        found = found[:-1]
    if any(token.text == ";" for token in found):
        return "it is more than one statement"
    if locks := [b for a, b in pairwise(words) if a == "for" and b in _LOCKS]:
        return f"it locks rows: FOR {locks[0].upper()}"
    for rule, why in (
        (_WRITES, "it may write: {}"),
        (_MOMENTARY, "{} is another at every moment or for every user"),
        (frozenset({"tablesample"}), "{} picks rows by chance"),
    ):
        if hit := next((word for word in words if word in rule), None):
            return why.format(hit)
    names = [identifier(token) for token in found if token.kind in {Kind.WORD, Kind.QUOTED}]
    if hit := next((name for name in names if name in _PHYSICAL), None):
        return f"{hit} says where a row is stored, which changes without a write"
    if hit := next((name for name in names if _CATALOGUED.fullmatch(name)), None):
        return f"{hit} looks names up in a system catalog, which is not replicated"
    return _odd_token(found)


def _odd_token(found: Sequence[Token]) -> str | None:
    joined = ""
    for token in found:
        is_string = token.kind is Kind.STRING
        if is_string and (token.text[:2] in {"u&", "U&"} or (token.text[0] in "eE" and _CODE.search(token.text))):
            return f"{token.text} is a string that is spelt in escapes"
        # A line break between two strings makes one of them.
        joined = joined * (token.gap == "\n") + _content(token.text) if is_string else ""
        if is_momentary(joined):
            return f"{token.text} may be read as a moment that moves"
        if token.kind is Kind.QUOTED and not token.text.startswith('"'):
            return f"{token.text} is a name that is spelt in escapes"
    return None


def _content(literal: str) -> str:
    if literal[0] == "$":
        return literal[literal.index("$", 1) + 1 : literal.rindex("$", 0, -1)]
    return literal[literal.index("'") + 1 : -1]


def is_momentary(value: Any) -> bool:
    """Whether text, or one in a list, may have a word that Postgres reads as the present: now, 10:00 today ..."""
    if isinstance(value, list | tuple):
        return any(map(is_momentary, value))
    return isinstance(value, str) and _DATE_WORD.search(value) is not None


_INTO: Final = {"insert": ("into",), "merge": ("into",), "delete": ("from",), "update": (), "truncate": ()}
_SKIPPED: Final = frozenset({"table", "only"})
_HARMLESS: Final = frozenset(
    ["select", "values", "table", "show", "explain", "begin", "commit", "rollback", "savepoint", "release"]
)


def written_tables(sql: str) -> frozenset[str] | None:
    """The names, without their schemas, of the tables that a statement itself writes; None: it cannot be told."""
    if len(sql) > READ_MAX:
        return None
    try:
        found = list(tokens(sql))
    except CallerError:
        return None
    tables: set[str] = set()
    first = next((token.text for token in found if token.text != "("), "")
    if first == "truncate" and "cascade" in {token.text for token in found}:
        return None
    for index, token in enumerate(found):
        if token.kind is not Kind.WORD or token.text not in _INTO or _is_clause(found, index):
            continue
        named = _tables_at(found, index + 1, _INTO[token.text], several=token.text == "truncate")
        if named is None:
            return None
        tables |= named
    if not tables and first not in _HARMLESS and first != "with":
        return None
    return frozenset(tables)


def _is_clause(found: Sequence[Token], index: int) -> bool:
    """Whether INSERT, UPDATE or DELETE is not a statement there: FOR UPDATE, ON CONFLICT DO UPDATE, THEN DELETE ..."""
    before = found[index - 1].text if index else ""
    if before in {"for", "do", "then", ".", "key", "on"}:
        return True
    return found[index].text == "update" and index + 1 < len(found) and found[index + 1].text in {"set", "of", ","}


def _tables_at(found: Sequence[Token], index: int, into: Sequence[str], *, several: bool) -> set[str] | None:
    rest = list(found[index:])
    if into and (not rest or rest.pop(0).text not in into):
        return None
    tables: set[str] = set()
    while True:
        while rest and rest[0].kind is Kind.WORD and rest[0].text in _SKIPPED:
            rest.pop(0)
        if not rest or rest[0].kind not in {Kind.WORD, Kind.QUOTED} or "&" in rest[0].text[:2]:
            return None
        name = identifier(rest.pop(0))
        while len(rest) >= 2 and rest[0].text == "." and rest[1].kind in {Kind.WORD, Kind.QUOTED}:
            name = identifier(rest[1])
            del rest[:2]
        tables.add(name)
        while rest and rest[0].text == "*":
            rest.pop(0)
        if not several or not rest or rest.pop(0).text != ",":
            return tables
