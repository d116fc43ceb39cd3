"""The code cache: a source is compiled once, and again when anything that it is made of has changed."""

import asyncio
import hashlib
import marshal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from headrace.agents import CodeCache, CompiledAgent
from headrace.agents.code import cache as code_cache_module
from headrace.agents.code.cache import CodeStatistics
from headrace.agents.code.compilation import CodePolicy
from headrace.agents.code.fingerprint import Environment, Interpreter
from headrace.agents.code.keys import SigningKeys
from headrace.agents.code.store import MAGIC
from headrace.agents.definition import Source, load
from headrace.cache import Cache, CachePolicy, RemoteConfig, Strategy
from headrace.errors import AgentInvalid, CacheUnavailable, CallerError, ConfigError
from headrace.events import CodeRejected
from headrace.testing import FakeClock

SOURCE = """
import some_module

class Agent:
    async def execute(self, input, context):
        return input
"""
SECRET = "s" * 32
HERE = Interpreter.current()


class Events(list):
    """An observer that remembers."""

    def on(self, event):
        self.append(event)


class Loads(list):
    """`marshal.loads`, and what it was given."""

    def __call__(self, data):
        self.append(bytes(data))
        return marshal.loads(data)


@pytest.fixture
def site(tmp_path):
    """A place for packages, with one version of each of two."""
    for name in ("some-dist", "declared-dist"):
        install(tmp_path / "site", name, "1.0")
    return tmp_path / "site"


def install(site, name, version):
    for old in site.glob(f"{name.replace('-', '_')}-*"):
        (old / "top_level.txt").unlink()
        old.rmdir()
    place = site / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "top_level.txt").write_text("some_module\n" if name == "some-dist" else "other_module\n")


@pytest.fixture
def events():
    return Events()


@pytest.fixture
def loads():
    return Loads()


@pytest.fixture
def make(tmp_path, site, events, loads):
    """A cache on the directory, as a fresh process would have it."""
    caches = []

    def make(**options):
        given = {
            "directory": tmp_path / "code",
            "signing_key": SECRET,
            "environment": Environment([str(site)], recheck_s=0.0),
            "observer": events,
            "loads": loads,
        }
        cache = CodeCache(**(given | options))
        caches.append(cache)
        return cache

    yield make
    for cache in caches:
        cache.close()


def kept(cache, source=SOURCE, dependencies=("declared-dist>=1",)):
    """The compiled source, which is on disk as well."""
    compiled = cache.compile("a", source, dependencies)
    assert cache.flush(60)
    return compiled


def record(tmp_path):
    (path,) = (tmp_path / "code").glob("*.code")
    return path


def test_a_compiled_agent_says_what_it_was_made_of(make):
    """Code, metadata, time, dependencies, source and key."""
    clock = FakeClock(wall=5_000.0)

    compiled = kept(make(clock=clock))

    assert compiled.dependencies == {"declared-dist": "1.0", "some-dist": "1.0"}
    assert compiled.metadata["definitions"] == ["Agent"]
    assert compiled.metadata["imports"] == ["some_module"]
    assert compiled.compiled_at == 5_000.0
    assert compiled.compile_ms >= 0.0
    assert len(compiled.key) == len(compiled.source_sha256) == 64


def test_agents_with_one_source_share_one_code_object(make):
    """The code is nobody's; its modules are each definition's own."""
    cache = make(directory=None)
    sources = [
        Source(agent_id=agent_id, version="1", text="class Agent:\n    seen = []\n    def execute(self, i, c): ...")
        for agent_id in ("a", "b")
    ]

    one, other = (load(source, bytes_max=10_000, code_cache=cache) for source in sources)

    assert cache.statistics().compiles == 1
    assert cache.compile("a", sources[0].text).code is cache.compile("b", sources[1].text).code
    assert one.module != other.module
    first, second = sys.modules[one.module], sys.modules[other.module]
    assert first.Agent is not second.Agent
    assert first.Agent.seen is not second.Agent.seen
    assert first.Agent.execute.__code__ is second.Agent.execute.__code__
    one.unload()
    other.unload()


def test_memory_answers_first(make, loads):
    """Nothing is read from disk, let alone compiled."""
    cache = make()
    compiled = kept(cache)

    assert cache.get("b", SOURCE, {"declared-dist": ">=1"}) is compiled
    assert cache.compile("b", SOURCE, ["declared-dist"]) is compiled
    assert cache.statistics().memory_hits == 2
    assert loads == []


def test_another_process_reads_what_was_compiled(make, loads):
    """Equal in everything; marshal is given one record, once."""
    compiled = kept(make())
    other = make()

    read = other.get("a", SOURCE, ["declared-dist"])

    assert read == compiled
    assert other.get("b", SOURCE, ["declared-dist"]) is read
    assert len(loads) == 1
    assert other.statistics().disk_hits == other.statistics().memory_hits == 1


def test_what_was_read_does_what_the_source_says(make):
    """It is the code, not only something equal to it."""
    kept(make(), "x = sum(range(10))", ())
    namespace = {}

    exec(make().get("a", "x = sum(range(10))").code, namespace)

    assert namespace["x"] == 45


def test_get_does_not_compile(make):
    """It has it or not; also a source that nobody can compile is merely not there."""
    cache = make()

    assert cache.get("a", SOURCE) is None
    assert cache.get("a", "x =") is None
    assert cache.get("a", "x = '\ud800'") is None
    assert cache.statistics().compiles == 0
    assert cache.statistics().misses == 2


CHANGES = {
    "a byte of the source": {"source": SOURCE.replace("return input", "return inpuT")},
    "a declaration": {"dependencies": ("declared-dist", "missing-dist")},
    "the tag": {"interpreter": replace(HERE, cache_tag="cpython-399")},
    "the magic number": {"interpreter": replace(HERE, magic="00000000")},
    "the version": {"interpreter": replace(HERE, hexversion=HERE.hexversion + 1)},
    "the optimize flag": {"interpreter": replace(HERE, optimize=2 - HERE.optimize)},
    "a compile flag": {"interpreter": replace(HERE, flags=0x1000000)},
    "the policy's version": {"policy": CodePolicy(version=2)},
    "a limit of the policy": {"policy": CodePolicy(nodes_max=40_000)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_each_changed_ingredient_is_a_miss(make, loads, change):
    """In memory and on disk; and the old bytecode is not even looked at."""
    kept(make())
    request = {"source": SOURCE, "dependencies": ("declared-dist",)} | change
    source, dependencies = request.pop("source"), request.pop("dependencies")

    cache = make(**request)

    assert cache.get("a", source, dependencies) is None
    cache.compile("a", source, dependencies)
    assert cache.statistics().compiles == 1
    assert loads == []


@pytest.mark.parametrize("name", ["some-dist", "declared-dist"])
def test_another_version_of_a_dependency_is_a_miss(make, site, loads, name):
    """Of an imported or a declared one; here, where it is in memory, and in a fresh process."""
    here = make()
    first = kept(here)
    install(site, name, "1.1")

    assert here.get("a", SOURCE, ["declared-dist"]) is None
    assert make().get("a", SOURCE, ["declared-dist"]) is None
    second = kept(here)
    assert second.key != first.key
    assert second.dependencies[name] == "1.1"
    assert make().get("a", SOURCE, ["declared-dist"]) == second
    assert len(loads) == 1


def test_a_dependency_that_is_installed_later_is_a_miss(make, site):
    """It was declared, or imported in a `try`, while it was not there."""
    cache = make()
    compiled = kept(cache, "import late_module", ["late-dist"])
    assert compiled.dependencies == {"late-dist": ""}

    install(site, "late-dist", "1.0")

    assert cache.get("a", "import late_module", ["late-dist"]) is None


def test_a_dependency_of_others_does_not_matter(make, site):
    """Only the agents that declare or import it are compiled anew."""
    cache = make()
    compiled = kept(cache, "x = 1", ())

    install(site, "some-dist", "2.0")

    assert cache.get("a", "x = 1") is compiled


def rejected(make, events, loads, source=SOURCE):
    """What becomes of a record that cannot be trusted: a miss, a count, an event, and it is out of the way."""
    cache = make()
    assert cache.get("a", source, ["declared-dist"]) is None
    assert cache.statistics().rejected == 1
    (event,) = events
    assert isinstance(event, CodeRejected)
    assert event.agent_id == "a"
    assert loads == []
    assert cache.get("a", source, ["declared-dist"]) is None
    assert cache.statistics().rejected == 1
    assert kept(cache, source).code
    return event.reason


@pytest.mark.parametrize("place", ["magic", "key id", "lengths", "meta", "body", "signature"])
def test_a_flipped_bit_never_reaches_marshal(make, events, loads, tmp_path, place):
    """Wherever it is."""
    kept(make())
    path = record(tmp_path)
    data = bytearray(path.read_bytes())
    at = {"magic": 0, "key id": 9, "lengths": 17, "meta": 40, "body": len(data) - 100, "signature": len(data) - 1}
    data[at[place]] ^= 0x10
    path.write_bytes(data)

    rejected(make, events, loads)

    assert len(list((tmp_path / "code" / "quarantine").iterdir())) == 1


@pytest.mark.parametrize("keep", [0, 1, 30, 60, -33, -1])
def test_a_truncated_record_never_reaches_marshal(make, events, loads, tmp_path, keep):
    """At its beginning, in the middle and before its end."""
    kept(make())
    path = record(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])

    rejected(make, events, loads)


def test_a_foreign_key_never_reaches_marshal(make, events, loads):
    """What another installation signed is not ours, however well it is signed."""
    kept(make(signing_key="t" * 32))

    assert "key that is not here" in rejected(make, events, loads)


def test_a_forged_key_id_never_reaches_marshal(make, events, loads, tmp_path):
    """The id is no secret; the signature needs the key."""
    kept(make(signing_key="t" * 32))
    path = record(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: len(MAGIC)] + SigningKeys.given(SECRET).current + data[len(MAGIC) + 8 :])

    assert "signature" in rejected(make, events, loads)


def test_swapped_records_never_reach_marshal(make, events, loads, tmp_path):
    """Each is genuine, and would be the wrong agent's code."""
    cache = make()
    kept(cache, "x = 1", ["declared-dist"])
    path = record(tmp_path)
    data = path.read_bytes()
    path.unlink()
    kept(cache, SOURCE, ["declared-dist"])
    record(tmp_path).write_bytes(data)

    assert "another source" in rejected(make, events, loads)


def test_what_cannot_be_unmarshalled_is_a_miss(make, events):
    """Signed by us and yet broken is our own mistake, and no reason to fail an agent."""
    kept(make())

    for loads in (lambda data: 1, lambda data: marshal.loads(data[:10])):
        cache = make(loads=loads)
        assert cache.compile("a", SOURCE, ["declared-dist"]).code
        assert cache.statistics().rejected == 1
        assert cache.flush(60)
    assert [event.reason for event in events] == ["a int, not code", "not readable: EOFError"]


def test_a_description_that_cannot_be_read_is_a_miss(make, events, loads):
    """As a later version of headrace with the same keys may write it."""
    cache = make()
    request = cache._request("a", SOURCE, ["declared-dist"])
    cache._store.write(request.slot, b'{"slot": 1}', b"body", cache._store.lock(request.slot))
    cache.flush(60)

    assert "description" in rejected(make, events, loads)


def test_threads_that_read_one_record_share_what_they_read(make, loads):
    """Else agents of one source would have several code objects after a restart."""
    kept(make())
    cache, start, found = make(), threading.Barrier(8), []

    def read():
        start.wait()
        found.append(cache.get("a", SOURCE, ["declared-dist"]))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 8
    assert len({id(each) for each in found}) == 1
    assert len(loads) == 1


def test_a_source_that_does_not_compile_is_remembered(make, monkeypatch):
    """Each caller gets the error with his own agent's name; the compiler worked once."""
    cache, calls = make(), []
    real = code_cache_module.compile_source
    monkeypatch.setattr(code_cache_module, "compile_source", lambda *of, **by: calls.append(1) or real(*of, **by))

    for agent_id in ("a", "b", "b"):
        with pytest.raises(AgentInvalid, match=f"'{agent_id}' does not compile at line 1"):
            cache.compile(agent_id, "x =")

    assert calls == [1]
    assert cache.statistics().refusals == 3


def test_what_may_be_the_moments_fault_is_not_remembered(make, monkeypatch):
    """Nested too deeply for this thread's stack need not be for another's."""
    cache, calls = make(), []
    real = code_cache_module.compile_source
    monkeypatch.setattr(code_cache_module, "compile_source", lambda *of, **by: calls.append(1) or real(*of, **by))

    for _ in range(2):
        with pytest.raises(AgentInvalid, match="nested"):
            cache.compile("a", "-" * 40_000 + "1")

    assert calls == [1, 1]


async def test_tasks_and_threads_compile_one_source_once(make, monkeypatch):
    """Twenty ask at once, in threads of a loop: one compiles, and all have the same object."""
    cache, gate = make(), threading.Event()
    real = code_cache_module.compile_source

    def slow(*of, **by):
        gate.wait(60)
        return real(*of, **by)

    monkeypatch.setattr(code_cache_module, "compile_source", slow)
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(20) as threads:  # the loop's own are fewer on a small machine
        asked = [loop.run_in_executor(threads, cache.compile, f"a{n}", SOURCE) for n in range(20)]
        while sum(turn.threads for turn in list(cache._turns._turns.values())) < 20:
            await asyncio.sleep(0.001)
        gate.set()
        compiled = await asyncio.gather(*asked)

    assert len({id(one) for one in compiled}) == 1
    assert cache.statistics().compiles == 1
    assert not cache._turns._turns


def test_different_sources_do_not_wait_for_each_other(make, monkeypatch):
    """One that takes long holds up nobody else."""
    cache, gate, opened = make(), threading.Event(), []
    real = code_cache_module.compile_source

    def slow(text, **by):
        if text == SOURCE:
            opened.append(gate.wait(60))
        return real(text, **by)

    monkeypatch.setattr(code_cache_module, "compile_source", slow)
    long = threading.Thread(target=cache.compile, args=("a", SOURCE))
    long.start()

    assert cache.compile("b", "x = 1")

    gate.set()
    long.join()
    assert opened == [True], "it was not waited for until it gave up"


def test_memory_is_bounded_in_bytes(make):
    """The least recently used goes first, and is read from disk again."""
    cache = make(bytes_max=20_000)
    for number in range(40):
        kept(cache, f"x = {number}", ())

    assert 0 < cache.statistics().memory_bytes <= 20_000
    assert cache.get("a", "x = 0") is not None
    assert cache.statistics().disk_hits == 1


def test_put_keeps_what_another_cache_compiled(make):
    """In memory and on disk."""
    compiled = kept(make(directory=None))
    cache = make()

    cache.put("a", SOURCE, compiled, ["declared-dist"])
    cache.flush(60)

    assert cache.get("b", SOURCE, ["declared-dist"]) is compiled
    assert make().get("b", SOURCE, ["declared-dist"]) == compiled


def test_put_refuses_what_was_made_of_something_else(make, site):
    """Another source, other dependencies, another interpreter."""
    cache = make()
    compiled = kept(make(directory=None))
    foreign = make(directory=None, interpreter=replace(HERE, optimize=2)).compile("a", SOURCE, ["declared-dist"])

    for source, code, dependencies in [
        (SOURCE + "\n", compiled, ["declared-dist"]),
        (SOURCE, compiled, []),
        (SOURCE, foreign, ["declared-dist"]),
        (SOURCE, replace(compiled, key="0" * 64), ["declared-dist"]),
    ]:
        with pytest.raises(CallerError, match="not compiled from this source"):
            cache.put("a", source, code, dependencies)
    with pytest.raises(AgentInvalid):
        cache.put("a", "\ud800", compiled)


async def test_sources_are_shared_by_hash(make):
    """Whoever knows the hash gets the text, from any process on the same shared cache."""
    async with Cache() as shared:
        sha256 = await make(cache=shared).share("a", SOURCE)

        assert sha256 == hashlib.sha256(SOURCE.encode()).hexdigest()
        assert await make(cache=shared).fetch("a", sha256) == SOURCE
        assert await make(cache=shared).fetch("a", "0" * 64) is None
    assert await make().fetch("a", sha256) is None
    assert await make().share("a", SOURCE) == sha256


async def test_a_source_under_anothers_hash_is_refused(make, events):
    """Whoever can write to the shared cache cannot choose the code that runs here."""
    async with Cache() as shared:
        sha256 = await make(cache=shared).share("a", SOURCE)
        for forged in ("import os", "\ud800", "#" * (2 << 20)):
            await shared.set(f"agent-source:{sha256}", forged)
            cache = make(cache=shared)

            assert await cache.fetch("a", sha256) is None

            assert cache.statistics().rejected == 1
            assert await shared.get(f"agent-source:{sha256}") is None
    assert [event.reason for event in events] == ["not the source of this hash"] * 3


async def test_a_shared_cache_that_is_away_shares_nothing(make):
    """Sources are durable elsewhere; no deployment fails for it."""
    policy = CachePolicy(match="*", strategy=Strategy.WRITE_THROUGH, stale_max=0)
    async with Cache(remote=RemoteConfig(url="redis://127.0.0.1:1"), policies=[policy]) as shared:
        with pytest.raises(CacheUnavailable):
            await shared.set("anything", "text")
        cache = make(cache=shared)

        sha256 = await cache.share("a", SOURCE)

        assert await cache.fetch("a", sha256) in {None, SOURCE}


async def test_what_is_no_source_is_not_shared(make):
    """It could not be fetched either."""
    with pytest.raises(AgentInvalid, match="surrogate"):
        await make().share("a", "\ud800")


def test_bounds_and_keys_are_checked_when_the_cache_is_made(make):
    """Not when the first agent is deployed."""
    with pytest.raises(ConfigError, match="above 0"):
        make(bytes_max=0)
    with pytest.raises(ConfigError, match="16 bytes"):
        make(signing_key="short")


def test_no_secret_is_in_what_is_shown(make, events):
    """Neither in errors and events nor in a repr."""
    cache = make(signing_key=["one" + SECRET, "two" + SECRET])
    kept(cache)

    assert SECRET not in repr(vars(cache)) + repr(vars(cache._store)) + repr(events)


def test_a_cache_without_a_directory_touches_no_file(make, tmp_path):
    """It is what tests and small uses need."""
    cache = make(directory=None)

    assert isinstance(cache.compile("a", "x = 1"), CompiledAgent)

    assert cache.flush(60)
    cache.close()
    assert not (tmp_path / "code").exists()
    assert cache.statistics() == CodeStatistics(misses=1, compiles=1, memory_bytes=cache.statistics().memory_bytes)
