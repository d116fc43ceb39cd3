"""What the differential suite runs: tables with all that is awkward, and statements, hand-picked and generated."""

import random
from decimal import Decimal
from typing import NamedTuple

SCHEMA = """
CREATE TYPE mood AS ENUM ('sour', 'flat', 'merry');
CREATE TABLE countries (id int PRIMARY KEY, name text NOT NULL, rate numeric(6,3));
CREATE TABLE accounts (
    tenant bigint NOT NULL, id bigint NOT NULL, name text, kind varchar(10), code char(5), word text COLLATE "C",
    amount numeric(12,3), free numeric, whole int, big bigint, small smallint, ratio float8, rough float4,
    born date, seen timestamptz, at timestamp, flag bool, tag uuid, note jsonb, tags text[], span interval,
    country_id int, feeling mood, PRIMARY KEY (tenant, id)
);
CREATE TABLE orders (
    tenant bigint NOT NULL, id bigint NOT NULL, account_id bigint, total numeric(14,2), placed date, status text,
    PRIMARY KEY (tenant, id)
);
"""
TENANTS = tuple(range(1, 13))
WORDS = (
    "a", "A", "ä", "Ä", "b", "B", "z", "Z", "é", "e", "a b", "ab", "a-b", "_x", "10", "9", "", " ", "straße",
    "STRASSE",
    "co-op", "coop", "COOP", "ñ", "n", "水", "\uff5a",
)  # fmt: skip


class Case(NamedTuple):
    """A statement, and how much of the order of its rows it decides."""

    sql: str
    params: tuple = ()
    sorted_by: int | None = None
    """Its first so many columns are what it sorts by; None: its order is nobody's business; -1: it decides all."""
    close: bool = False
    """Floats may differ in their last bits, as they do with the order of rows on a single Postgres."""


def rows(seed: int = 5, count: int = 240) -> dict[str, list[tuple]]:
    """The rows of all tables: text forms that Postgres reads, NULLs everywhere but in the keys, many ties."""
    rng = random.Random(seed)

    def maybe(value):
        return None if rng.random() < 0.15 else value

    countries = [(n, f"Land {n}", maybe(f"{rng.randrange(5000) / 1000:.3f}")) for n in range(1, 7)]
    accounts, orders = [], []
    for number in range(count):
        tenant = rng.choice(TENANTS)
        accounts.append((
            tenant, number, maybe(rng.choice(WORDS)), maybe(rng.choice(("new", "old", "odd"))),
            maybe(rng.choice("abc")),
            maybe(rng.choice(WORDS)), maybe(f"{rng.randrange(-10**6, 10**6) / 1000:.3f}"),
            maybe(rng.choice(("1.5", "1.50", "2", "-3.25", "1e3", "NaN", "0.000001", "1234567890123456789012345678"))),
            maybe(rng.randrange(-5, 6)), maybe(rng.choice((2**62, -(2**62), 7, 7, 0))), maybe(rng.randrange(-3, 4)),
            maybe(rng.choice(("0.1", "0.2", "1e10", "-2.5", "3.25"))), maybe(rng.choice(("0.5", "0.1", "7"))),
            maybe(f"20{rng.randrange(10, 30)}-0{rng.randrange(1, 10)}-1{rng.randrange(10)}"),
            maybe(f"2026-0{rng.randrange(1, 10)}-11 1{rng.randrange(10)}:00:00+0{rng.randrange(5)}"),
            maybe(f"2026-0{rng.randrange(1, 10)}-11 1{rng.randrange(10)}:00:00"), maybe(rng.choice(("t", "f"))),
            maybe(f"00000000-0000-4000-8000-{rng.randrange(40):012d}"),
            maybe(rng.choice(('{"a": 1}', '[1, 2]', '"x"', "3"))),
            maybe(rng.choice(("{}", "{a,b}", '{b,NULL,"c d"}'))),
            maybe(rng.choice(("1 mon", "30 days", "1 day 02:00", "-1 h"))),
            maybe(rng.randrange(1, 8)), maybe(rng.choice(("sour", "flat", "merry"))),
        ))  # fmt: skip
        for _ in range(rng.randrange(4)):
            orders.append((
                tenant, len(orders), number, maybe(f"{rng.randrange(10**5) / 100:.2f}"),
                maybe(f"2026-0{rng.randrange(1, 10)}-0{rng.randrange(1, 10)}"),
                maybe(rng.choice(("open", "paid", "Paid"))),
            ))  # fmt: skip
    return {"countries": countries, "accounts": accounts, "orders": orders}


def _cases(*sqls: str, sorted_by: int | None = None, close: bool = False) -> list[Case]:
    return [Case(sql, (), sorted_by, close) for sql in sqls]


FILTERS = [
    *_cases(
        "SELECT * FROM countries ORDER BY id",
        "SELECT tenant, id, name FROM accounts ORDER BY tenant, id",
        "SELECT * FROM accounts ORDER BY tenant, id",
        "SELECT id, * FROM accounts ORDER BY 1",
        "SELECT a.*, 1 AS one FROM accounts AS a ORDER BY a.id DESC",
        'SELECT id FROM accounts ORDER BY name COLLATE "C", id',
        "SELECT id, name FROM accounts ORDER BY name, id",
        "SELECT id, name FROM accounts ORDER BY name DESC, id",
        "SELECT id, name FROM accounts ORDER BY name NULLS FIRST, id DESC",
        "SELECT id, name FROM accounts ORDER BY name DESC NULLS LAST, id",
        "SELECT id FROM accounts ORDER BY lower(name), id",
        "SELECT id, word FROM accounts ORDER BY word, id",
        'SELECT id, word FROM accounts ORDER BY word COLLATE "POSIX" DESC, id',
        "SELECT id, kind FROM accounts ORDER BY kind, id",
        "SELECT id, code FROM accounts ORDER BY code DESC, id",
        "SELECT id, amount FROM accounts ORDER BY amount, id",
        "SELECT id, free FROM accounts ORDER BY free DESC, id",
        "SELECT id, free FROM accounts ORDER BY free, id LIMIT 100 OFFSET 20",
        "SELECT id, whole, small FROM accounts ORDER BY whole DESC, small NULLS FIRST, id",
        "SELECT id, big FROM accounts ORDER BY big, id",
        "SELECT id, ratio FROM accounts ORDER BY ratio DESC, id",
        "SELECT id, rough FROM accounts ORDER BY rough, id",
        "SELECT id, born FROM accounts ORDER BY born, id",
        "SELECT id, seen FROM accounts ORDER BY seen DESC, id",
        "SELECT id, at FROM accounts ORDER BY at, id",
        "SELECT id, flag FROM accounts ORDER BY flag, id",
        "SELECT id, tag FROM accounts ORDER BY tag, id",
        "SELECT id, note FROM accounts ORDER BY note, id",
        "SELECT id, tags FROM accounts ORDER BY tags DESC, id",
        "SELECT id, span FROM accounts ORDER BY span, id",
        "SELECT id, feeling FROM accounts ORDER BY feeling DESC, id",
        "SELECT id, feeling FROM accounts ORDER BY feeling NULLS FIRST, name, id LIMIT 17 OFFSET 5",
        "SELECT id FROM accounts ORDER BY whole + small, id LIMIT 10",
        "SELECT id AS x FROM accounts ORDER BY x DESC LIMIT 5 OFFSET 3",
        "SELECT id, whole * 2 AS twice FROM accounts ORDER BY twice, id LIMIT 12",
        "SELECT id, -whole FROM accounts ORDER BY 2, 1",
        "SELECT id FROM accounts ORDER BY id OFFSET 200",
        "SELECT id FROM accounts ORDER BY id LIMIT 0",
        "SELECT id FROM accounts ORDER BY id LIMIT 10 OFFSET 1000",
        "SELECT id FROM accounts ORDER BY id FETCH FIRST 3 ROWS ONLY",
        "SELECT id, CASE WHEN whole > 0 THEN 'up' ELSE 'down' END FROM accounts ORDER BY 2, 1",
        "SELECT id, coalesce(name, '?'), now() > seen FROM accounts ORDER BY 1",
        "SELECT id, date_trunc('month', seen), extract(year FROM born) FROM accounts ORDER BY 2, 3 DESC, 1",
        "SELECT id, seen::date, amount::int, whole::text FROM accounts ORDER BY amount::int DESC NULLS LAST, id",
        "SELECT id, name || '-' || kind FROM accounts ORDER BY name || '-' || kind, id",
        "SELECT lower(name), id FROM accounts ORDER BY lower, id",
        "SELECT note->>'a' AS a, id FROM accounts ORDER BY note->>'a', id",
        "SELECT id, tags[1] FROM accounts ORDER BY tags[1], id",
        "SELECT id, substring(name FROM 1 FOR 1), length(name) FROM accounts ORDER BY 3 DESC, 2, 1",
        "SELECT id, row_number() OVER (PARTITION BY tenant ORDER BY id) FROM accounts ORDER BY id",
        "SELECT id, sum(whole) OVER w, rank() OVER w FROM accounts WINDOW w AS (PARTITION BY tenant ORDER "
        "BY id) ORDER BY id",
        "WITH best AS (SELECT tenant, id, amount FROM accounts WHERE amount > 0) SELECT id FROM best ORDER "
        "BY amount, id",
        "SELECT id FROM (SELECT tenant, id, name FROM accounts WHERE whole > 0) AS sub ORDER BY name, id LIMIT 9",
        "SELECT DISTINCT ON (tenant) tenant, id, name FROM accounts ORDER BY tenant, id DESC",
        "SELECT DISTINCT ON (kind) kind, id FROM accounts ORDER BY kind, id DESC",
        "SELECT DISTINCT ON (name) name, whole, id FROM accounts ORDER BY name, whole DESC NULLS LAST, id",
        sorted_by=-1,
    ),
    *_cases(
        "SELECT id FROM accounts",
        "SELECT * FROM accounts WHERE tenant = 3",
        "SELECT * FROM accounts WHERE tenant = '4' AND whole > 0",
        "SELECT * FROM accounts WHERE tenant IN (1, 5, 9)",
        "SELECT count(*) FROM accounts WHERE tenant IN (2, 3, 4, NULL)",
        "SELECT id FROM accounts WHERE tenant = 1 OR tenant = 7",
        "SELECT id FROM accounts WHERE tenant = NULL",
        "SELECT count(*), sum(whole) FROM accounts WHERE tenant = NULL",
        "SELECT id FROM accounts WHERE tenant BETWEEN 2 AND 5 AND name IS NOT NULL",
        "SELECT id FROM accounts WHERE (tenant = 1 AND whole > 0) OR (tenant = 2 AND whole < 0)",
        "SELECT id FROM accounts WHERE NOT (tenant = 1)",
        "SELECT id FROM accounts WHERE name LIKE 'a%' OR name ILIKE 'STR%'",
        "SELECT id FROM accounts WHERE name ~* '^[a-c]'",
        "SELECT id FROM accounts WHERE tags && ARRAY['a']",
        "SELECT id FROM accounts WHERE note @> '{\"a\": 1}'",
        "SELECT id FROM accounts WHERE seen > timestamptz '2026-04-01' - interval '1 day'",
        "SELECT id FROM accounts WHERE feeling IS DISTINCT FROM 'flat'",
        "SELECT id FROM accounts WHERE span > interval '1 day'",
        "SELECT id, generate_series(1, 2) FROM accounts WHERE tenant < 4",
        "SELECT id, unnest(tags) FROM accounts",
        "SELECT 1 FROM accounts",
        "SELECT DISTINCT tenant FROM accounts",
        "SELECT DISTINCT tenant, kind FROM accounts",
        "SELECT DISTINCT kind FROM accounts",
        "SELECT DISTINCT name, kind FROM accounts",
        "SELECT DISTINCT note FROM accounts",
        "SELECT DISTINCT code, flag FROM accounts",
        "SELECT DISTINCT span FROM accounts WHERE span <> interval '30 days' AND span <> interval '1 mon'",
        "SELECT DISTINCT whole + 1 FROM accounts",
    ),
    *_cases(
        "SELECT DISTINCT name FROM accounts ORDER BY name",
        "SELECT DISTINCT name FROM accounts ORDER BY name DESC LIMIT 5 OFFSET 2",
        "SELECT DISTINCT kind, whole FROM accounts ORDER BY whole DESC, kind NULLS FIRST LIMIT 7",
        "SELECT DISTINCT feeling FROM accounts ORDER BY 1",
        "SELECT DISTINCT tenant % 3 AS third FROM accounts ORDER BY third",
        "SELECT DISTINCT date_trunc('year', born) AS year FROM accounts ORDER BY year DESC",
        "SELECT DISTINCT word FROM accounts ORDER BY word",
        sorted_by=-1,
    ),
    *_cases(
        "SELECT name, kind FROM accounts ORDER BY name",
        "SELECT whole, small FROM accounts ORDER BY whole DESC, small",
        "SELECT feeling FROM accounts ORDER BY feeling",
        sorted_by=1,
    ),
    Case("SELECT id FROM accounts WHERE tenant = $1", (3,)),
    Case("SELECT id FROM accounts WHERE tenant = $1", (99,)),
    Case("SELECT id FROM accounts WHERE tenant = $1", (None,)),
    Case("SELECT id FROM accounts WHERE tenant = $1", (Decimal("3.0"),)),
    Case("SELECT id FROM accounts WHERE $1 = tenant AND name = $2", (3, "a")),
    Case("SELECT id FROM accounts WHERE tenant = ANY($1)", ([1, 2, None],)),
    Case("SELECT id FROM accounts WHERE tenant = ANY($1::bigint[])", ([],)),
    Case("SELECT id FROM accounts WHERE tenant IN ($1,$2)", (1, 12)),
    Case("SELECT id, $1::text FROM accounts WHERE name = $2 ORDER BY id LIMIT $3 OFFSET $4", ("x", "a", 5, 1), -1),
    Case("SELECT id FROM accounts ORDER BY amount * $1, id LIMIT $2", (Decimal("-1"), 8), -1),
    Case("SELECT id FROM accounts ORDER BY id LIMIT $1 OFFSET $2", (None, 230), -1),
    Case("SELECT id FROM accounts ORDER BY id LIMIT $1 OFFSET $2", (4, None), -1),
    Case("SELECT id FROM accounts WHERE name = 'it''s $1' OR name = $$a$$ OR name = $x$b$x$", ()),
]

AGGREGATES = [
    *_cases(
        "SELECT count(*) FROM accounts",
        "SELECT count(name), count(DISTINCT name), count(*) FROM accounts",
        "SELECT count(*), sum(whole), min(whole), max(whole), avg(whole) FROM accounts WHERE tenant > 100",
        "SELECT sum(small), sum(whole), sum(big), sum(amount), sum(free) FROM accounts WHERE free <> 'NaN'",
        "SELECT sum(free), avg(free), min(free), max(free) FROM accounts",
        "SELECT avg(small), avg(whole), avg(big), avg(amount) FROM accounts",
        "SELECT avg(free) FROM accounts WHERE free <> 'NaN'",
        "SELECT sum(span), avg(span), min(span) > interval '-2 h', max(span) >= interval '30 days' FROM accounts",
        "SELECT min(name), max(name), min(word), max(word), min(kind), max(code) FROM accounts",
        "SELECT min(born), max(born), min(seen), max(seen), min(at), max(at) FROM accounts",
        "SELECT min(feeling), max(feeling), min(tags), max(tags) FROM accounts",
        "SELECT bool_and(flag), bool_or(flag), every(flag) FROM accounts",
        "SELECT bit_and(whole), bit_or(whole), bit_and(small) FROM accounts",
        "SELECT stddev(whole), stddev_samp(amount), stddev_pop(big), variance(small) FROM accounts",
        "SELECT var_samp(whole), var_pop(amount), variance(big), stddev_pop(small) FROM accounts",
        "SELECT stddev(free), var_pop(free) FROM accounts WHERE free <> 'NaN'",
        "SELECT stddev(free) FROM accounts",
        "SELECT stddev(whole), var_pop(whole), stddev_pop(whole) FROM accounts WHERE id = 1",
        "SELECT stddev(whole), var_pop(whole) FROM accounts WHERE id < 0",
        "SELECT stddev(7), var_pop(7::numeric(5,2)), avg(7) FROM accounts",
        "SELECT kind, stddev(amount), stddev_pop(amount), avg(amount) FROM accounts GROUP BY kind",
        "SELECT kind, count(*), sum(amount), avg(amount), min(name) FROM accounts GROUP BY kind",
        "SELECT name, count(*) FROM accounts GROUP BY name",
        "SELECT code, count(*) FROM accounts GROUP BY code",
        "SELECT feeling, count(*), max(span) >= interval '1 day' FROM accounts GROUP BY feeling",
        "SELECT note, count(*) FROM accounts GROUP BY note",
        "SELECT tags, count(*) FROM accounts GROUP BY tags",
        "SELECT flag, whole > 0, count(*) FROM accounts GROUP BY 1, 2",
        "SELECT born, count(*) FROM accounts GROUP BY born",
        "SELECT tenant, count(*), sum(amount) FROM accounts GROUP BY tenant",
        "SELECT tenant, kind, string_agg(name, ',' ORDER BY id) FROM accounts GROUP BY tenant, kind",
        "SELECT kind, string_agg(name, ',' ORDER BY id) FROM accounts GROUP BY kind",
        "SELECT kind, array_agg(id ORDER BY id) FROM accounts GROUP BY kind",
        "SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY whole) FROM accounts",
        "SELECT mode() WITHIN GROUP (ORDER BY tenant) > 0 FROM accounts",
        "SELECT kind, count(*) FILTER (WHERE whole > 0), sum(amount) FILTER (WHERE flag) FROM accounts GROUP BY kind",
        "SELECT kind, count(DISTINCT name), count(DISTINCT whole), sum(amount), count(*) FROM accounts GROUP BY kind",
        "SELECT count(DISTINCT whole) FILTER (WHERE flag), sum(DISTINCT whole), avg(DISTINCT small) FROM accounts",
        "SELECT count(DISTINCT (kind, flag)) FROM accounts",
        "SELECT count(DISTINCT name) FROM accounts WHERE tenant > 100",
        "SELECT kind FROM accounts GROUP BY kind",
        "SELECT kind, whole FROM accounts GROUP BY kind, whole HAVING count(*) > 5",
        "SELECT kind, avg(amount) FROM accounts GROUP BY kind HAVING avg(amount) > 0 AND count(*) > 10",
        "SELECT kind, sum(whole) / count(*), round(avg(amount), 2) FROM accounts GROUP BY kind",
        "SELECT count(*) FROM accounts HAVING count(*) > 1000",
        "SELECT max(whole) - min(whole) AS spread, 100 * count(name) / count(*) FROM accounts",
        "SELECT coalesce(sum(whole), 0), coalesce(max(name), 'none') FROM accounts WHERE tenant = 77 OR tenant = 78",
        "SELECT CASE WHEN count(*) > 10 THEN 'many' ELSE 'few' END FROM accounts",
        "SELECT sum(CASE WHEN flag THEN amount ELSE 0 END) FROM accounts",
        "SELECT sum(amount * (1 - rate)) FROM accounts JOIN countries ON countries.id = country_id",
        "SELECT a.kind || '!', count(*) FROM accounts a GROUP BY a.kind || '!'",
        "SELECT upper(kind) AS u, count(*) FROM accounts GROUP BY u",
        "SELECT accounts.kind, count(*) FROM accounts GROUP BY kind",
        "SELECT tenant, id, max(total) FROM orders GROUP BY tenant, id",
        "SELECT date_trunc('month', placed), sum(total) FROM orders GROUP BY 1",
        "SELECT kind, rollup FROM (SELECT kind, 1 AS rollup FROM accounts) x",
        "SELECT kind, flag, count(*) FROM accounts GROUP BY ROLLUP (kind, flag)",
        "SELECT kind, flag, count(*) FROM accounts GROUP BY GROUPING SETS ((kind), (flag), ())",
        "SELECT DISTINCT count(*) > 3 FROM accounts GROUP BY name",
        "SELECT avg(n) FROM (SELECT name, count(*) AS n FROM accounts GROUP BY name) AS x",
        "SELECT avg(n), max(t) FROM (SELECT tenant AS t, count(*) AS n FROM accounts GROUP BY tenant) AS x",
        "SELECT sum(bit_length(name)), max(length(name)) FROM accounts",
        "SELECT (SELECT max(id) FROM accounts), (SELECT min(id) FROM orders)",
        "SELECT kind, (SELECT count(*) FROM countries) FROM accounts GROUP BY kind",
        "SELECT count(*) = 240 FROM accounts",
        "SELECT count(*)::text || ' rows' FROM accounts",
    ),
    *_cases(
        "SELECT name, count(*) FROM accounts GROUP BY name ORDER BY name",
        "SELECT name, count(*) AS n FROM accounts GROUP BY name ORDER BY n DESC, name DESC LIMIT 5",
        "SELECT kind, count(*) FROM accounts GROUP BY kind ORDER BY count(*) DESC, kind",
        "SELECT kind, sum(amount) FROM accounts GROUP BY kind ORDER BY avg(amount) LIMIT 2 OFFSET 1",
        "SELECT kind, whole, count(*) FROM accounts GROUP BY 1, 2 ORDER BY 3 DESC, 1 NULLS FIRST, 2",
        "SELECT feeling, count(*) FROM accounts GROUP BY feeling ORDER BY feeling DESC NULLS LAST",
        "SELECT tenant, count(*) FROM accounts GROUP BY tenant ORDER BY count(*) DESC, tenant LIMIT 4",
        "SELECT tenant, max(name) AS m FROM accounts GROUP BY tenant ORDER BY m, tenant",
        "SELECT kind, sum(count(*)) OVER (ORDER BY kind), rank() OVER (ORDER BY count(*) DESC, kind) FROM accounts "
        "GROUP BY kind ORDER BY kind",
        "SELECT word, max(name) FROM accounts GROUP BY word HAVING max(name) > 'b' ORDER BY word",
        "SELECT lower(name) AS l, count(*) FROM accounts GROUP BY lower(name) ORDER BY l DESC",
        sorted_by=-1,
    ),
    *_cases(
        "SELECT sum(ratio), avg(ratio), sum(rough), avg(rough) FROM accounts",
        "SELECT stddev(ratio), var_pop(ratio), variance(rough), stddev_pop(rough) FROM accounts",
        "SELECT kind, avg(ratio), stddev(ratio), var_samp(ratio) FROM accounts GROUP BY kind",
        "SELECT kind, stddev_samp(ratio), min(ratio), max(rough) FROM accounts WHERE whole > 3 GROUP BY kind",
        "SELECT var_pop(ratio + 1e9) FROM accounts WHERE ratio < 10",
        close=True,
    ),
    Case("SELECT kind, sum(amount * $2) FROM accounts WHERE whole > $1 GROUP BY kind HAVING count(*) > $3", (0, 2, 1)),
    Case("SELECT date_trunc($1, seen), count(*) FROM accounts GROUP BY date_trunc($1, seen)", ("month",)),
    Case("SELECT whole % 3, count(*) FROM accounts GROUP BY whole % 3 ORDER BY 2 DESC, 1 LIMIT $1", (2,), -1),
]

JOINS = [
    *_cases(
        "SELECT a.id, o.id FROM accounts a JOIN orders o ON o.tenant = a.tenant AND o.account_id = a.id",
        "SELECT a.id, o.id FROM accounts a JOIN orders o USING (tenant) WHERE o.account_id = a.id",
        "SELECT a.id, o.id FROM accounts a, orders o WHERE o.tenant = a.tenant AND o.account_id = a.id AND "
        "a.tenant = 3",
        "SELECT a.id, o.id FROM accounts a LEFT JOIN orders o ON o.tenant = a.tenant AND o.account_id = a.id",
        "SELECT a.id FROM accounts a LEFT JOIN orders o ON o.tenant = a.tenant AND o.account_id = a.id "
        "WHERE o.id IS NULL",
        "SELECT a.id, o.id FROM accounts a LEFT JOIN orders o ON o.tenant = a.tenant AND o.account_id = "
        "a.id AND a.tenant = 2",
        "SELECT a.id, o.id FROM accounts a LEFT JOIN orders o ON o.account_id = a.id AND o.tenant = 2",
        "SELECT o.id, a.id FROM accounts a RIGHT JOIN orders o ON o.tenant = a.tenant AND o.id = a.id",
        "SELECT o.id, a.id FROM accounts a FULL JOIN orders o ON o.tenant = a.tenant AND o.id = a.id",
        "SELECT a.id, o.id FROM accounts a JOIN orders o ON o.id = a.id",
        "SELECT a.id, o.id FROM accounts a LEFT JOIN orders o ON o.id = a.id AND o.status = 'open' WHERE o.id IS NULL",
        "SELECT a.id, c.name FROM accounts a JOIN countries c ON c.id = a.country_id",
        "SELECT a.id, c.name FROM accounts a LEFT JOIN countries c ON c.id = a.country_id",
        "SELECT c.name, a.id FROM countries c LEFT JOIN accounts a ON c.id = a.country_id AND a.whole = 3",
        "SELECT c.name, a.id FROM accounts a RIGHT JOIN countries c ON c.id = a.country_id AND a.whole = 3",
        "SELECT c.name, a.id FROM accounts a FULL JOIN countries c ON c.id = a.country_id AND a.whole = 3",
        "SELECT c.name, count(a.id), sum(a.amount) FROM countries c JOIN accounts a ON a.country_id = c.id "
        "GROUP BY c.name",
        "SELECT c.name, count(a.id) FROM countries c LEFT JOIN accounts a ON a.country_id = c.id GROUP BY c.name",
        "SELECT c.*, d.id FROM countries c CROSS JOIN countries d",
        "SELECT o.tenant, count(*) FROM accounts a LEFT JOIN orders o ON o.tenant = a.tenant AND o.account_id = a.id "
        "GROUP BY o.tenant",
        "SELECT DISTINCT o.tenant FROM accounts a LEFT JOIN orders o ON o.tenant = a.tenant AND o.account_id = a.id",
        "SELECT a.kind, sum(o.total), count(DISTINCT o.status) FROM accounts a JOIN orders o ON o.tenant = a.tenant "
        "AND o.account_id = a.id GROUP BY a.kind",
        "SELECT id FROM accounts a WHERE EXISTS (SELECT 1 FROM orders o WHERE o.tenant = a.tenant AND "
        "o.account_id = a.id)",
        "SELECT id FROM accounts a WHERE NOT EXISTS (SELECT 1 FROM orders o WHERE o.tenant = a.tenant AND "
        "o.account_id = a.id)",
        "SELECT id FROM accounts a WHERE EXISTS (SELECT 1 FROM orders o WHERE o.account_id = a.id AND o.total > 500)",
        "SELECT id FROM accounts WHERE tenant IN (SELECT tenant FROM orders WHERE total > 900)",
        "SELECT id FROM accounts WHERE id IN (SELECT account_id FROM orders WHERE total > 900)",
        "SELECT id FROM accounts WHERE tenant NOT IN (SELECT tenant FROM orders WHERE total > 990)",
        "SELECT id FROM accounts WHERE tenant IN (SELECT tenant FROM orders ORDER BY id LIMIT 3)",
        "SELECT id FROM accounts WHERE amount = (SELECT max(amount) FROM accounts)",
        "SELECT id FROM accounts a WHERE amount = (SELECT max(amount) FROM accounts b WHERE b.tenant = a.tenant)",
        "SELECT id, (SELECT count(*) FROM orders o WHERE o.tenant = a.tenant AND o.account_id = a.id) FROM accounts a",
        "SELECT id, (SELECT count(*) FROM orders o WHERE o.account_id = a.id) FROM accounts a",
        "SELECT id, (SELECT name FROM countries c WHERE c.id = a.country_id) FROM accounts a",
        "SELECT a.id, x.id FROM accounts a, LATERAL (SELECT id FROM orders o WHERE o.tenant = a.tenant "
        "AND o.account_id = a.id ORDER BY id LIMIT 1) AS x",
        "SELECT a.id, x.n FROM accounts a JOIN (SELECT tenant, account_id, count(*) AS n FROM orders "
        "GROUP BY tenant, account_id) AS x ON x.tenant = a.tenant AND x.account_id = a.id",
        "SELECT a.id, x.n FROM accounts a JOIN (SELECT account_id, count(*) AS n FROM orders GROUP BY account_id) x "
        "ON x.account_id = a.id",
        "SELECT count(*) FROM accounts a JOIN accounts b ON a.tenant = b.tenant AND a.kind = b.kind",
        "SELECT count(*) FROM accounts a JOIN accounts b ON a.kind = b.kind",
        "WITH t AS (SELECT tenant, sum(total) AS s FROM orders GROUP BY tenant) SELECT a.id, t.s FROM accounts a "
        "JOIN t ON t.tenant = a.tenant",
        "WITH t AS (SELECT * FROM accounts) SELECT count(*) FROM t AS x JOIN t AS y ON x.whole = y.small",
        "WITH t AS (SELECT * FROM accounts) SELECT count(*) FROM t AS x JOIN t AS y ON x.tenant = y.tenant "
        "WHERE x.tenant = 3",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5) SELECT a.id FROM accounts a "
        "JOIN n "
        "ON n.i = a.whole",
        "SELECT id FROM accounts WHERE tenant = 1 UNION SELECT id FROM accounts WHERE tenant = 2",
        "SELECT kind FROM accounts UNION SELECT status FROM orders",
        "SELECT id FROM accounts EXCEPT SELECT account_id FROM orders",
        "SELECT tenant FROM accounts INTERSECT ALL SELECT tenant FROM orders WHERE total > 500",
        "SELECT name FROM countries UNION ALL SELECT name FROM countries",
        "SELECT id, rank() OVER (ORDER BY amount DESC NULLS LAST, id) FROM accounts",
        "SELECT id, lag(name) OVER (ORDER BY id), sum(whole) OVER (ORDER BY id) FROM accounts",
        "SELECT id, count(*) OVER () FROM accounts WHERE whole = 3",
        "SELECT * FROM (SELECT id, row_number() OVER (ORDER BY name, id) AS n FROM accounts) AS x WHERE n < 10",
        "SELECT a.id FROM accounts a JOIN (SELECT tenant FROM orders GROUP BY tenant HAVING sum(total) > 5000) b "
        "ON a.tenant = b.tenant",
        "SELECT a.id, v.w FROM accounts a JOIN (VALUES (1, 'one'), (2, 'two')) AS v(n, w) ON v.n = a.whole",
        "SELECT a.id, g FROM accounts a JOIN generate_series(1, 3) AS g ON g = a.whole",
        "SELECT accounts FROM accounts WHERE id = 5 AND false",
        "SELECT count(*) FROM accounts a JOIN orders o ON a.tenant = o.tenant JOIN countries c ON c.id = a.country_id "
        "WHERE o.total > c.rate * 100",
        "SELECT count(*) FROM orders o WHERE o.total > (SELECT avg(total) FROM orders p WHERE p.tenant = o.tenant)",
        "SELECT count(*) FROM orders o WHERE o.total > (SELECT avg(total) FROM orders)",
        "SELECT x.k, count(*) FROM (SELECT a.kind AS k, o.total FROM accounts a JOIN orders o "
        "ON o.tenant = a.tenant) x "
        "GROUP BY x.k",
    ),
    *_cases(
        "SELECT a.id, o.id FROM accounts a JOIN orders o ON o.tenant = a.tenant AND o.account_id = a.id "
        "ORDER BY a.name, o.total DESC, o.id LIMIT 20",
        "SELECT a.name, c.name FROM accounts a JOIN countries c ON c.id = a.country_id ORDER BY c.name, a.name, a.id",
        "SELECT name FROM countries UNION SELECT name FROM accounts ORDER BY name LIMIT 12",
        "SELECT id, sum(amount) OVER (ORDER BY id) FROM accounts ORDER BY id LIMIT 30",
        sorted_by=-1,
    ),
    Case(
        "SELECT a.id, o.id FROM accounts a JOIN orders o ON a.tenant = o.tenant WHERE o.tenant = $1 AND "
        "a.id = o.account_id",
        (5,),
    ),
    Case("SELECT count(*) FROM accounts a JOIN orders o ON a.id = o.account_id WHERE a.whole > $1 AND o.status = $2",
         (0, "open")),
    Case("SELECT id FROM accounts WHERE tenant = $1 AND id IN (SELECT account_id FROM orders WHERE tenant=$1)", (4,)),
    Case("SELECT id FROM accounts WHERE tenant = $1 AND id IN (SELECT account_id FROM orders WHERE tenant=$2)", (4,5)),
]  # fmt: skip


def generated(count: int, seed: int) -> list[Case]:
    """Statements put together at random, always ordered by all that they show, or not at all."""
    rng = random.Random(seed)
    return [_grouped(rng) if rng.random() < 0.5 else _plain(rng) for _ in range(count)]


COLUMNS = ("name", "kind", "code", "word", "amount", "whole", "small", "big", "born", "seen", "flag", "tag", "feeling")
CONDITIONS = (
    "whole > {n}", "name IS NOT NULL", "kind = 'new'", "amount < {n} * 100", "tenant > {t}", "tenant = {t}",
    "tenant IN ({t}, {u})", "flag", "NOT flag", "born < date '2020-05-05'", "name < 'm'", "small IN (1, 2, {n})",
    "feeling > 'sour'", "(whole = {n} OR tenant = {t})", "coalesce(small, {n}) = {n}",
)  # fmt: skip
CALLS = (
    "count(*)", "count({c})", "count(DISTINCT {c})", "min({c})", "max({c})", "sum(whole)", "sum(amount)",
    "avg(amount)",
    "avg(whole)", "stddev(amount)", "var_pop(whole)", "sum(big)", "bool_or(flag)", "sum(amount) FILTER (WHERE flag)",
    "count(*) FILTER (WHERE whole > 0)", "sum(DISTINCT small)",
)  # fmt: skip
_UNORDERED = frozenset({"flag", "tag"})


def _where(rng: random.Random) -> str:
    chosen = rng.sample(CONDITIONS, rng.randrange(3))
    numbers = {"n": rng.randrange(-3, 4), "t": rng.choice(TENANTS), "u": rng.choice(TENANTS)}
    return " WHERE " + " AND ".join(chosen).format(**numbers) if chosen else ""


def _direction(rng: random.Random) -> str:
    return rng.choice(("", " DESC", " NULLS FIRST", " DESC NULLS LAST"))


def _limit(rng: random.Random) -> str:
    limit = f" LIMIT {rng.randrange(1, 30)}" if rng.random() < 0.5 else ""
    return limit + (f" OFFSET {rng.randrange(20)}" if rng.random() < 0.4 else "")


def _plain(rng: random.Random) -> Case:
    columns = rng.sample(COLUMNS, rng.randrange(1, 4))
    order = [f"{column}{_direction(rng)}" for column in rng.sample(COLUMNS, rng.randrange(1, 3))]
    distinct = rng.random() < 0.2
    if distinct:
        keys = ", ".join(f"{column}{_direction(rng)}" for column in columns)
        return Case(
            f"SELECT DISTINCT {', '.join(columns)} FROM accounts{_where(rng)} ORDER BY {keys}{_limit(rng)}", (), -1
        )
    sql = f"SELECT {', '.join(columns)}, id FROM accounts{_where(rng)}"
    return Case(f"{sql} ORDER BY {', '.join(order)}, id{_limit(rng)}", (), -1)


def _grouped(rng: random.Random) -> Case:
    groups = rng.sample((*COLUMNS, "tenant", "whole % 2", "lower(name)"), rng.randrange(3))
    calls = []
    for call in rng.sample(CALLS, rng.randrange(1, 5)):
        names = COLUMNS if "count" in call else [name for name in COLUMNS if name not in _UNORDERED]
        calls.append(call.format(c=rng.choice(names)))
    sql = f"SELECT {', '.join((*groups, *calls))} FROM accounts{_where(rng)}"
    if not groups:
        return Case(sql)
    having = rng.choice(("", " HAVING count(*) > 1", " HAVING max(whole) > 0", " HAVING sum(amount) > 0"))
    keys = ", ".join(f"{number}{_direction(rng)}" for number in range(1, len(groups) + 1))
    return Case(f"{sql} GROUP BY {', '.join(groups)}{having} ORDER BY {keys}{_limit(rng)}", (), -1)


GENERATED = generated(220, seed=20261123)
