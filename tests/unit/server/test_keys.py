"""API keys: what they are made of, whom they let in, and for how long."""

import pytest

from headrace.cache import Cache
from headrace.errors import InvalidRequest, KeyNotFound, Overloaded, Unauthorized
from headrace.server.key_store import PostgresKeyStore
from headrace.server.keys import LOOKS_BURST, POLICY, STALE_S_MAX, Keys
from headrace.testing import FakeClock


@pytest.fixture
def clock():
    """A clock that stands still until it is told otherwise."""
    return FakeClock()


@pytest.fixture
async def keys(clock):
    """Keys in memory."""
    async with Cache(policies=(POLICY,), clock=clock) as cache:
        yield Keys(cache=cache, database=None, clock=clock, tiers=("developer", "professional"))


async def test_a_key_lets_its_tenant_in_with_what_it_permits(keys):
    """And nothing else."""
    made, text = await keys.create("acme", ["agent:execute", "agent:monitor"], tier="developer")
    caller = await keys.caller(text)
    assert (caller.tenant, caller.permissions) == ("acme", {"agent:execute", "agent:monitor"})
    assert (caller.key_id, keys.tier_of("acme"), keys.tier_of("other")) == (made.key_id, "developer", None)


async def test_the_text_of_a_key_is_kept_nowhere(keys):
    """What is kept cannot be turned back into it; its id is visible in both."""
    made, text = await keys.create("acme", ["agent:execute"])
    (kept,) = await keys.list(tenant="acme", after="", limit=10)
    assert kept == made
    secret = text.split("_", 2)[2]
    assert len(secret) == 43
    assert secret not in repr(kept)
    assert text.startswith(f"hr_{kept.key_id}_")


async def test_no_two_keys_are_the_same(keys):
    """They are random."""
    texts = {(await keys.create("acme", ["agent:execute"]))[1] for _ in range(20)}
    assert len(texts) == 20


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-1],
        lambda text: text + "A",
        lambda text: text[:-1] + ("A" if text[-1] != "A" else "B"),
        lambda text: text.replace("hr_", "hr_0", 1),
        lambda text: "hr_" + "0" * 16 + "_" + text.split("_", 2)[2],
        lambda text: "hr_",
        lambda text: text + "\n",
        lambda text: text.upper(),
    ],
)
async def test_what_is_not_exactly_a_key_lets_nobody_in(keys, spoil):
    """In one sentence, whatever is wrong with it."""
    _, text = await keys.create("acme", ["agent:execute"])
    with pytest.raises(Unauthorized, match="not valid"):
        await keys.caller(spoil(text))


async def test_a_key_ends_when_it_expires(keys, clock):
    """To the second, although it is cached."""
    _, text = await keys.create("acme", ["agent:execute"], expires_in_s=3.0)
    assert (await keys.caller(text)).tenant == "acme"
    clock.advance(3.0)
    with pytest.raises(Unauthorized):
        await keys.caller(text)


async def test_a_revoked_key_lets_nobody_in_at_once(keys, clock):
    """Where the word arrives; revoking it again changes nothing."""
    made, text = await keys.create("acme", ["agent:execute"])
    await keys.caller(text)
    ended = await keys.revoke(made.key_id)
    with pytest.raises(Unauthorized):
        await keys.caller(text)
    clock.advance(60.0)
    assert await keys.revoke(made.key_id) == ended


async def test_a_revocation_that_nobody_heard_of_holds_within_the_bound(clock):
    """Two processes without a common cache, one store: the other one's copy grows old."""
    async with Cache(policies=(POLICY,), clock=clock) as here, Cache(policies=(POLICY,), clock=clock) as there:
        mine = Keys(cache=here, database=None, clock=clock)
        theirs = Keys(cache=there, database=None, clock=clock)
        theirs._store = mine._store
        made, text = await mine.create("acme", ["agent:execute"])
        await theirs.caller(text)
        await mine.revoke(made.key_id)
        assert (await theirs.caller(text)).tenant == "acme"
        clock.advance(STALE_S_MAX + 0.001)
        with pytest.raises(Unauthorized):
            await theirs.caller(text)


async def test_a_key_is_looked_up_where_it_is_revoked():
    """A replica may be behind by more than the bound allows."""
    asked = []

    class Primary:
        async def fetch_one(self, statement, *values, **options):
            asked.append((values, options))

    assert await PostgresKeyStore(Primary()).find("0123456789abcdef") is None
    assert asked == [(("0123456789abcdef",), {"key": "0123456789abcdef"})]


async def test_a_tier_and_a_key_must_be_known(keys):
    """A wrong name is refused rather than left without a limit."""
    with pytest.raises(InvalidRequest, match="developer, professional"):
        await keys.create("acme", ["agent:execute"], tier="gold")
    with pytest.raises(KeyNotFound):
        await keys.revoke("0" * 16)


async def test_keys_are_listed_by_id_in_parts(keys):
    """Of one tenant or of all."""
    made = [(await keys.create(tenant, ["agent:execute"]))[0] for tenant in ("a", "b", "a")]
    ids = sorted(key.key_id for key in made)
    first = await keys.list(tenant=None, after="", limit=2)
    assert [key.key_id for key in first] == ids[:2]
    assert [key.key_id for key in await keys.list(tenant=None, after=ids[1], limit=2)] == ids[2:]
    assert {key.tenant for key in await keys.list(tenant="a", after="", limit=9)} == {"a"}


async def test_made_up_keys_cost_a_bounded_number_of_looks(keys, clock):
    """Whoever is known is let in meanwhile, and so is a new key when some time has passed."""
    looks = []
    find = keys._store.find

    async def counted(key_id):
        looks.append(key_id)
        return await find(key_id)

    keys._store.find = counted
    _, known = await keys.create("acme", ["agent:execute"])
    _, new = await keys.create("acme", ["agent:execute"])
    await keys.caller(known)
    refused = []
    for n in range(2 * LOOKS_BURST):
        with pytest.raises((Unauthorized, Overloaded)) as caught:
            await keys.caller(f"hr_{n:016x}_{'A' * 43}")
        refused.append(type(caught.value))
    assert refused.count(Unauthorized) == len(looks) - 1 == LOOKS_BURST
    clock.advance(STALE_S_MAX + 1)
    assert (await keys.caller(known)).tenant == (await keys.caller(new)).tenant == "acme"


async def test_keys_that_are_good_use_nothing_up(keys):
    """However many are seen for the first time at once, and however often a wrong one is sent again."""
    texts = [(await keys.create("acme", ["agent:execute"]))[1] for _ in range(LOOKS_BURST + 10)]
    wrong = f"hr_{'0' * 16}_{'A' * 43}"
    for text in texts:
        assert (await keys.caller(text)).tenant == "acme"
        with pytest.raises(Unauthorized):
            await keys.caller(wrong)
