"""Statements that look as if every shard could answer them for itself, or that are easily read wrong."""

from tests.integration.database.differential import Case

CASES = [
    *map(
        Case,
        (
            # Two kept rows are not brought together by a third that both would look up.
            "SELECT id, (SELECT count(*) FROM orders p LEFT JOIN orders o ON o.tenant = a.tenant"
            " AND o.tenant = p.tenant) FROM accounts a WHERE id < 20",
            "SELECT count(*), count(o.id) FROM accounts a CROSS JOIN orders p LEFT JOIN orders o"
            " ON o.tenant = a.tenant AND o.tenant = p.tenant AND o.id < 5 WHERE a.id < 40",
            "SELECT count(*) FROM accounts a, orders b WHERE a.id < 40 AND NOT EXISTS"
            " (SELECT 1 FROM orders o WHERE o.tenant = a.tenant AND o.tenant = b.tenant AND o.total > 900)",
            "SELECT id FROM accounts a WHERE NOT EXISTS (SELECT 1 FROM countries c WHERE c.id = a.whole"
            " AND a.tenant IN (SELECT o.tenant FROM orders o WHERE o.tenant = 3))",
            # Columns under other names.
            "WITH t(id, tenant) AS (SELECT tenant, id FROM accounts) SELECT * FROM t WHERE tenant = 3",
            "WITH t(tenant, x) AS (SELECT id, tenant FROM accounts) SELECT tenant, count(*) FROM t GROUP BY tenant",
            "SELECT * FROM (SELECT id, tenant FROM accounts) AS s(tenant, id) WHERE tenant = 3",
            "SELECT tenant FROM accounts AS a(x, tenant) WHERE tenant = 3",
            "SELECT public.accounts.id FROM public.accounts JOIN orders ON orders.account_id = public.accounts.whole",
            # Groups of nothing, semicolons, functions that have another name or type in other dialects.
            "SELECT 1 FROM accounts HAVING true",
            "SELECT count(*) FROM accounts GROUP BY ()",
            "SELECT count(*) FROM accounts ;",
            "SELECT count(*) FROM accounts; -- and a word",
            "SELECT date_part('year', born), count(*) FROM accounts GROUP BY 1",
            "SELECT to_hex(id), log10(id + 1) FROM accounts WHERE id < 0 OR id = 9 ORDER BY id",
            "SELECT tenant, count(*) FROM accounts a FULL JOIN orders o USING (tenant, id) GROUP BY tenant",
        ),
    ),
    Case("SELECT id, name FROM accounts ORDER BY name, id;", (), -1),
    Case("SELECT kind AS c1, count(*) AS c0 FROM accounts GROUP BY kind ORDER BY kind", (), -1),
    Case("SELECT DISTINCT kind AS c1, whole AS c0 FROM accounts ORDER BY c1, c0", (), -1),
    Case("SELECT * FROM accounts ORDER BY 2", (), -1),
    Case("SELECT *, id, kind FROM accounts ORDER BY 9, 2", (), -1),
    Case("SELECT id FROM accounts ORDER BY id LIMIT 9223372036854775807 OFFSET 1", (), -1),
    # One text, parameters of other types: a type that was learnt at the first call is not that of the next.
    Case("SELECT max(whole + $1) FROM accounts", (1,)),
    Case("SELECT max(whole + $1) FROM accounts", (2**40,)),
    Case("SELECT kind, sum(whole * $1) FROM accounts GROUP BY kind", (2,)),
    Case("SELECT kind, sum(whole * $1) FROM accounts GROUP BY kind", (2**33,)),
    Case("SELECT kind, sum(whole * $1) FROM accounts GROUP BY kind", (0.5,)),
]
