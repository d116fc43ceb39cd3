"""The name of a cached result: equal only where Postgres could not give two answers."""

import datetime
import decimal
import uuid
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from headrace.database.query_cache.key import SETTINGS, Context, Namer, parameters
from headrace.database.query_cache.text import Kind, normalised, read_text, tokens

letters = st.characters(codec="utf-8", exclude_characters="\0")
strings = st.text(letters, max_size=8).map(lambda text: "'" + text.replace("'", "''") + "'")
quoted = st.text(letters, min_size=1, max_size=8).map(lambda text: '"' + text.replace('"', '""') + '"')
dollars = st.text(letters.filter(lambda letter: letter != "$"), max_size=8).map(lambda text: f"$x${text}$x$")
escapes = st.sampled_from(["e'\\''", "E'a\\\\'", "e'it''s'", "E'\\x41'"])
words = st.sampled_from(["select", "from", "where", "orders", "tenant_id", "a", "and", "or"])
others = st.sampled_from(["=", "<>", "(", ")", ",", "$1", "$2", "1", "1.5e-3", "::", "->>"])
pieces = st.lists(st.one_of(words, strings, quoted, dollars, escapes, others), min_size=1, max_size=12)
gaps = st.sampled_from([" ", "  ", "\t", " \n ", " -- it's a comment\n", " /* a /* nested */ one */ "])
plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(letters), st.binary(), st.decimals(),
    st.dates(), st.datetimes(), st.datetimes(timezones=st.timezones()), st.times(), st.timedeltas(), st.uuids(),
)  # fmt: skip
values = st.one_of(plain, st.lists(plain, max_size=3))
texts = st.text(letters, max_size=10)
contexts = st.builds(
    Context, texts, texts, st.tuples(*[st.sampled_from(["", "a", "b"])] * 3).map(lambda few: few + ("",) * 10)
)


def typed(value):
    """A value with its types, so that 1, 1.0 and True are three; floats by their bits."""
    if isinstance(value, list):
        return ("list", *map(typed, value))
    if isinstance(value, float):
        return ("float", value.hex())
    return (type(value).__name__, repr(value))


def swapped(text):
    """The text with every ASCII letter in the other case."""
    return "".join(letter.swapcase() if letter.isascii() else letter for letter in text)


@given(pieces, st.data())
def test_white_space_comments_and_the_case_of_words_are_no_difference(given_pieces, data):
    """However a query is laid out, and however its words are written, it has one normalised text."""
    plainly = " ".join(given_pieces)
    other = ""
    for piece in given_pieces:
        is_word = piece[0].isalpha() and "'" not in piece
        other += (swapped(piece) if is_word and data.draw(st.booleans()) else piece) + data.draw(gaps)
    # Two strings with a line break between them are one string to Postgres, and with a space an error.
    assume(not any(one[-1] in "'$" and two[0] in "'$eE" for one, two in pairwise(given_pieces)))

    assert normalised(list(tokens(plainly))) == normalised(list(tokens(other)))


@given(pieces)
def test_what_is_quoted_is_kept_byte_for_byte(given_pieces):
    """Strings of all kinds, quoted identifiers and parameters stand in the normalised text as they were written."""
    text = normalised(list(tokens(" ".join(given_pieces))))

    for piece in given_pieces:
        if piece[0] in "'\"$" or piece[:2] in {"e'", "E'"}:
            assert piece in text


@given(pieces)
def test_the_normalised_text_means_the_same(given_pieces):
    """Read again, it has the same tokens, and is its own normalised text."""
    first = list(tokens(" ".join(given_pieces)))

    text = normalised(first)

    again = list(tokens(text))
    assert [token[:2] for token in again] == [token[:2] for token in first]
    assert normalised(again) == text


@given(st.text(letters, min_size=1).filter(lambda text: swapped(text) != text))
def test_literals_that_differ_in_case_alone_are_two_queries(text):
    """'a' is not 'A', in quotes of any kind."""
    for pattern in ("select '{}'", 'select "{}"', "select $x${}$x$", "select e'{}'"):
        one, two = (pattern.format(each.replace("'", "''").replace('"', '""')) for each in (text, swapped(text)))

        assert read_text(one).text != read_text(two).text


@given(st.lists(values, max_size=3), st.lists(values, max_size=3))
def test_parameters_are_equal_only_with_their_types(one, two):
    """1, 1.0, True, '1' and Decimal(1) have five names, and equal values of equal types have one."""
    is_same = [typed(each) for each in one] == [typed(each) for each in two]

    assert (parameters(tuple(one)) == parameters(tuple(two))) == is_same
    assert parameters(tuple(one)) == parameters(list(one))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (1, True), (1, 1.0), (1, "1"), (1, decimal.Decimal(1)), ("1", b"1"), (0.0, -0.0), (None, "None"),
        (decimal.Decimal("1.0"), decimal.Decimal("1.00")), ([1, 2], [[1], 2]), ([1], [True]), (2**70, str(2**70)),
        (uuid.UUID(int=1), str(uuid.UUID(int=1))), (datetime.date(2026, 1, 1), "2026-01-01"),
    ],
)  # fmt: skip
def test_values_that_python_or_msgpack_confuse_are_told_apart(one, two):
    """What compares equal, or is encoded alike, is sent to Postgres as another type."""
    assert parameters((one,)) != parameters((two,))


def test_a_type_that_nobody_knows_has_no_name():
    """How Postgres is sent a value of the user's own type cannot be seen from here."""

    class Money(int):
        pass

    assert parameters((Money(1),)) is None
    assert Namer("s", Context("d", "r", ()), "select $1", b"").name([object()]) is None


@given(contexts, contexts, texts, st.lists(plain, max_size=2))
def test_two_contexts_never_share_a_name(one, two, text, params):
    """Another database, role, search_path or setting is another query, whatever the text."""
    names = [Namer("shard", context, text, b"").name(params) for context in (one, two)]

    assert (names[0] == names[1]) == (one == two)


@given(texts, texts, st.lists(plain, max_size=2), st.lists(plain, max_size=2))
def test_text_and_parameters_do_not_run_into_each_other(one, two, first, second):
    """No text with its parameters has the name of another text with others."""
    context = Context("d", "r", ("",) * len(SETTINGS))
    is_same = one == two and [typed(each) for each in first] == [typed(each) for each in second]

    assert (Namer("s", context, one, b"").name(first) == Namer("s", context, two, b"").name(second)) == is_same


@given(st.text(letters))
def test_any_text_can_be_read(text):
    """What Postgres would not read either has a reason, and never an exception."""
    found = read_text(text)

    assert found.reason is not None or found.text


@given(pieces)
def test_tokens_lose_nothing(given_pieces):
    """Words apart, every character outside white space and comments is in some token."""
    sql = " ".join(given_pieces)

    joined = "".join(token.text for token in tokens(sql) if token.kind is not Kind.WORD)

    for piece in given_pieces:
        if not piece[0].isalpha():
            assert piece in joined
