"""A stored record is what one of our keys signed for this very source, or marshal does not see it."""

import marshal
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headrace.agents.code.cache import CodeCache
from headrace.agents.code.compilation import CodePolicy, Compilation, Refusal, compile_source
from headrace.agents.code.fingerprint import Environment, Fingerprint, Interpreter

SECRET = "s" * 32
SOURCES = ["x = 1", "def f():\n    return 2"]
words = st.text(st.characters(codec="utf-8"), max_size=8)
names = st.text("abc-", min_size=1, max_size=4)


class Store:
    """Two agents' records in a directory, and caches that look at them without anything in memory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "code"
        self.seen: list[bytes] = []
        cache = self.cache()
        for source in SOURCES:
            cache.compile("a", source)
        cache.close()
        self.paths = {source: self.directory / f"{cache._request('a', source, None).slot}.code" for source in SOURCES}
        self.genuine = {source: path.read_bytes() for source, path in self.paths.items()}

    def cache(self) -> CodeCache:
        def loads(data: bytes) -> object:
            self.seen.append(bytes(data))
            return marshal.loads(data)

        return CodeCache(self.directory, signing_key=SECRET, environment=Environment([]), loads=loads)

    def offered(self, data: bytes, source: str = SOURCES[0]) -> object:
        """What a fresh process gets when this is the source's record, and what marshal saw on the way."""
        self.seen.clear()
        self.paths[source].write_bytes(data)
        return self.cache().get("a", source)


@pytest.fixture(scope="module")
def store():
    with tempfile.TemporaryDirectory() as directory:
        yield Store(Path(directory))


def test_the_genuine_records_are_taken(store):
    """Else none of what follows would say anything."""
    for source, data in store.genuine.items():
        assert store.offered(data, source) is not None
        assert len(store.seen) == 1


def test_no_bit_can_be_flipped(store):
    """Of a whole record, each byte in turn."""
    data = store.genuine[SOURCES[0]]
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8

        assert store.offered(bytes(changed)) is None, place
        assert store.seen == [], place


@given(st.data())
@settings(max_examples=150)
def test_no_splice_of_genuine_records_is_taken(store, data):
    """Cut, lengthened, mixed or moved: unless it is the genuine one again."""
    first, second = (data.draw(st.sampled_from(list(store.genuine.values()))) for _ in range(2))
    head = first[: data.draw(st.integers(0, len(first)))]
    tail = second[data.draw(st.integers(0, len(second))) :]
    spliced = head + data.draw(st.binary(max_size=20)) + tail
    assume(spliced != store.genuine[SOURCES[0]])

    assert store.offered(spliced) is None
    assert store.seen == []


@given(st.binary(max_size=2_000))
@settings(max_examples=100)
def test_no_bytes_make_the_cache_raise(store, data):
    """Whatever lies in the directory is a miss at worst."""
    assert store.offered(data) is None
    assert store.seen == []


ingredients = st.fixed_dictionaries(
    {
        "interpreter": st.builds(
            Interpreter, cache_tag=words, magic=words, hexversion=st.integers(0, 3), optimize=st.integers(0, 2)
        ),
        "policy": st.builds(CodePolicy, version=st.integers(0, 3), nodes_max=st.integers(1, 3)),
        "source": st.sampled_from(["0" * 64, "1" * 64]),
        "declared": st.frozensets(names, max_size=3),
        "dependencies": st.dictionaries(names, words, max_size=3),
    }
)


@given(ingredients, ingredients)
def test_keys_are_equal_only_where_all_ingredients_are(one, other):
    """No two ways to write them down run together, whatever is in the names and versions."""

    def key(of):
        slot = Fingerprint(of["interpreter"], of["policy"]).slot(of["source"], of["declared"])
        return Fingerprint.key(slot, of["dependencies"])

    assert (key(one) == key(other)) == (one == other)


@given(st.text(max_size=300) | st.text("([{x=:\n '\"\\#,-", max_size=300))
@settings(max_examples=300)
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_any_text_compiles_or_is_refused(text):
    """Nothing else comes out of it."""
    outcome = compile_source(text, policy=CodePolicy(), interpreter=Interpreter.current())

    assert isinstance(outcome, Compilation | Refusal)
