"""Statements at random: joins of every kind, subqueries of every kind, groups, windows and set operations.

What they have in common is that Postgres gives one answer only: LIMIT stands behind an order by all columns, floats
are left out, and so are values that are equal and look different.
"""

import random
from dataclasses import dataclass, field

from tests.integration.database.differential import TENANTS, Case

TABLES = {
    "accounts": ("tenant", "id", "name", "kind", "word", "amount", "whole", "small", "born", "flag", "country_id"),
    "orders": ("tenant", "id", "account_id", "total", "placed", "status"),
    "countries": ("id", "name", "rate"),
}
NUMBERS = frozenset({"tenant", "id", "whole", "small", "country_id", "account_id"})
TEXTS = frozenset({"name", "kind", "word", "status"})
AMOUNTS = frozenset({"amount", "total", "rate"})
SHARDED = ("accounts", "orders")


@dataclass
class Grammar:
    """One statement, in the making."""

    rng: random.Random
    params: list = field(default_factory=list)
    depth: int = 0
    names: int = 0

    def name(self) -> str:
        self.names += 1
        return f"q{self.names}"

    def pick(self, *options):
        return self.rng.choice(options)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    # sources

    def source(self) -> tuple[str, str, tuple[str, ...]]:
        """Text of a FROM item, its alias, its columns."""
        alias = self.name()
        table = self.pick("accounts", "accounts", "accounts", "orders", "orders", "orders", "countries")
        columns = TABLES[table]
        roll = self.rng.random()
        if roll < 0.75 or self.depth > 1:
            return f"{table} AS {alias}", alias, columns
        self.depth += 1
        where = self.where([(alias, columns)])
        self.depth -= 1
        inner = f"FROM {table} AS {alias}{where}"
        if roll < 0.85:
            return f"(SELECT * {inner}) AS {alias}", alias, columns
        if roll < 0.9 and table != "countries":
            text = f"(SELECT tenant, max(id) AS id {inner} GROUP BY tenant) AS {alias}"
            return text, alias, ("tenant", "id")
        if roll < 0.95:
            return f"(SELECT * {inner} ORDER BY id LIMIT {self.rng.randrange(1, 9)}) AS {alias}", alias, columns
        return f"(SELECT DISTINCT id {inner}) AS {alias}", alias, ("id",)

    def from_(self, count: int) -> tuple[str, list]:
        text, alias, columns = self.source()
        seen = [(alias, columns)]
        for _ in range(count - 1):
            item, alias, columns = self.source()
            kind = self.pick(
                "JOIN",
                "JOIN",
                "LEFT JOIN",
                "LEFT JOIN",
                "RIGHT JOIN",
                "FULL JOIN",
                "CROSS JOIN",
                "CROSS JOIN",
                "LATERAL",
            )
            both = [*seen, (alias, columns)]
            if kind == "LATERAL":
                inner, inner_alias, inner_columns = self.source()
                on = self.link(seen, [(inner_alias, inner_columns)])
                text += f" {self.pick('CROSS JOIN', 'LEFT JOIN')} LATERAL (SELECT {inner_alias}.id FROM {inner}"
                text += f" WHERE {on} ORDER BY 1 LIMIT {self.pick(1, 2, 500)}) AS {alias}"
                text += " ON true" if text.rfind("LEFT JOIN LATERAL") > text.rfind("CROSS JOIN LATERAL") else ""
                both = [*seen, (alias, ("id",))]
            elif kind == "CROSS JOIN":
                text += f" CROSS JOIN {item}"
            elif self.chance(0.2) and len(seen) == 1 and "tenant" in columns and "tenant" in seen[0][1]:
                text += f" {kind} {item} USING (tenant)"
            elif kind == "FULL JOIN":
                text += f" {kind} {item} ON {self.equality(seen, [(alias, columns)])}"
            else:
                text += f" {kind} {item} ON {self.link(seen, [(alias, columns)])}"
            seen = both
        return text, seen

    def column(self, sources: list, wanted=None) -> str:
        found = [f"{alias}.{c}" for alias, columns in sources for c in columns if wanted is None or c in wanted]
        return self.rng.choice(found) if found else "NULL"

    def equality(self, left: list, right: list) -> str:
        one, other = self.column(left, {"tenant"}), self.column(right, {"tenant"})
        if "NULL" in (one, other) or self.chance(0.1):
            one, other = (
                self.column(left, {"id", "account_id", "whole"}),
                self.column(right, {"id", "small", "account_id"}),
            )
        return (
            f"{one} = {other}"
            if "NULL" not in (one, other)
            else f"{self.column(left, {'id'})} = {self.column(right, {'id'})}"
        )

    def link(self, left: list, right: list) -> str:
        parts = [self.equality(left, right)]
        found = [alias for alias, columns in right if "tenant" in columns]
        if found and self.chance(0.4):  # by the keys of several rows at once
            parts = [f"{alias}.tenant = {found[0]}.tenant" for alias, columns in left if "tenant" in columns] or parts
        while self.chance(0.5):
            roll = self.rng.random()
            sources = [*left, *right] if roll < 0.2 else right
            parts.append(self.condition(sources) if roll < 0.4 else self.equality(left, right))
        return " AND ".join(parts)

    # conditions

    def key(self) -> str:
        value = self.rng.choice(TENANTS)
        if self.chance(0.3):
            self.params.append(value)
            return f"${len(self.params)}"
        return str(value)

    def condition(self, sources: list) -> str:
        number, text = self.column(sources, NUMBERS), self.column(sources, TEXTS)
        tenant = self.column(sources, {"tenant"})
        options = [
            lambda: f"{number} > {self.rng.randrange(-2, 40)}",
            lambda: f"{number} IN (1, 2, NULL, {self.rng.randrange(60)})",
            lambda: f"{text} {self.pick('<', '>=', '<>')} 'b'",
            lambda: f"{text} IS {self.pick('', 'NOT ')}NULL",
            lambda: f"{tenant} = {self.key()}",
            lambda: f"{tenant} IN ({self.key()}, {self.key()})",
            lambda: f"{tenant} = {self.key()} OR {tenant} = {self.key()} AND {number} > 3",
            lambda: f"{number} = {self.column(sources, NUMBERS)}",
            *[lambda: f"{tenant} = {self.column(sources, {'tenant'})}"] * 3,
        ]
        if self.depth < 2:
            options += [lambda: self.exists(sources)] * 2 + [lambda: self.member(sources)] * 2
            options += [lambda: self.scalar(sources)]
        found = self.rng.choice(options)()
        return f"{self.pick('', '', '', 'NOT ')}({found})"

    def where(self, sources: list) -> str:
        parts = [self.condition(sources) for _ in range(self.rng.randrange(3))]
        return f" WHERE {' AND '.join(parts)}" if parts else ""

    def inside(self, sources: list) -> tuple[str, list]:
        self.depth += 1
        text, seen = self.from_(self.pick(1, 1, 2))
        parts = [self.link(sources, seen)] if self.chance(0.8) else []
        parts += [self.condition([*seen, *sources])] if self.chance(0.3) else []
        self.depth -= 1
        return f"FROM {text}{' WHERE ' if parts else ''}{' AND '.join(parts)}", seen

    def exists(self, sources: list) -> str:
        return f"{self.pick('', 'NOT ')}EXISTS (SELECT 1 {self.inside(sources)[0]})"

    def member(self, sources: list) -> str:
        inner, seen = self.inside(sources)
        wanted = {"tenant"} if self.chance(0.6) else NUMBERS
        return f"{self.column(sources, wanted)} {self.pick('', 'NOT ')}IN (SELECT {self.column(seen, wanted)} {inner})"

    def scalar(self, sources: list) -> str:
        return f"{self.column(sources, NUMBERS)} < {self.subquery(sources)}"

    def subquery(self, sources: list) -> str:
        inner, seen = self.inside(sources)
        return f"(SELECT {self.pick('count(*)', 'max({})', 'sum({})').format(self.column(seen, NUMBERS))} {inner})"

    # statements

    def aggregate(self, sources: list) -> str:
        number, text = self.column(sources, NUMBERS), self.column(sources, TEXTS)
        call = self.pick(
            "count(*)", f"count({text})", f"count(DISTINCT {text})", f"sum({number})", f"min({text})", f"max({text})",
            f"avg({number})", f"sum({self.column(sources, AMOUNTS)})", f"stddev({number})", f"sum(DISTINCT {number})",
            f"string_agg({text}, ',' ORDER BY {text})", f"bool_or({number} > 3)",
            f"percentile_disc(0.5) WITHIN GROUP (ORDER BY {number})",
        )  # fmt: skip
        return call + (f" FILTER (WHERE {number} > 2)" if self.chance(0.2) else "")

    def window(self, sources: list) -> str:
        by = self.column(sources, {"tenant"} if self.chance(0.5) else None)
        order = ", ".join(f"{alias}.{columns[0]}, {alias}.{columns[-1]}" for alias, columns in sources)
        return f"{self.pick('rank()', 'dense_rank()', 'count(*)')} OVER (PARTITION BY {by} ORDER BY {order})"

    def select(self) -> tuple[str, int]:
        """Text, and the number of its columns."""
        text, sources = self.from_(self.pick(1, 1, 2, 2, 3))
        where = self.where(sources)
        if self.chance(0.45):
            groups = [self.column(sources) for _ in range(self.rng.randrange(3))]
            calls = [self.aggregate(sources) for _ in range(self.rng.randrange(1, 4))]
            group = f" GROUP BY {', '.join(groups)}" if groups else ""
            if groups and self.chance(0.15):
                group = f" GROUP BY {self.pick('ROLLUP', 'CUBE')} ({', '.join(groups)})"
            having = f" HAVING {self.aggregate(sources)} IS NOT NULL" if self.chance(0.3) else ""
            return f"SELECT {', '.join([*groups, *calls])} FROM {text}{where}{group}{having}", len(groups) + len(calls)
        items = [self.column(sources) for _ in range(self.rng.randrange(1, 4))]
        if self.chance(0.2):
            items.append(self.window(sources))
        if self.chance(0.2):
            items.append(self.subquery(sources))
        return f"SELECT {self.pick('', '', '', 'DISTINCT ')}{', '.join(items)} FROM {text}{where}", len(items)

    def statement(self) -> Case:
        """A whole one."""
        roll = self.rng.random()
        if roll < 0.08:
            wanted = self.pick(NUMBERS, TEXTS)
            sides = []
            for _ in range(2):
                text, sources = self.from_(self.pick(1, 2))
                sides.append(f"SELECT {self.column(sources, wanted)} FROM {text}{self.where(sources)}")
            kind = self.pick("UNION", "UNION ALL", "INTERSECT", "EXCEPT", "EXCEPT ALL")
            sql, count = f" {kind} ".join(sides), 1
        elif roll < 0.16:
            table = self.pick(*SHARDED)
            self.depth += 1
            cte = f"WITH w AS (SELECT * FROM {table} AS q0{self.where([('q0', TABLES[table])])})"
            self.depth -= 1
            on = self.equality([("x", TABLES[table])], [("y", TABLES[table])])
            sql, count = f"{cte} SELECT x.id, y.id FROM w AS x {self.pick('', 'LEFT ')}JOIN w AS y ON {on}", 2
        else:
            sql, count = self.select()
        if self.chance(0.5):
            return Case(sql, tuple(self.params))
        order = ", ".join(f"{n}{self.pick('', ' DESC', ' NULLS FIRST')}" for n in range(1, count + 1))
        limit = f" LIMIT {self.rng.randrange(12)}" if self.chance(0.6) else ""
        limit += f" OFFSET {self.rng.randrange(6)}" if self.chance(0.3) else ""
        return Case(f"{sql} ORDER BY {order}{limit}", tuple(self.params), -1)


def statements(count: int, seed: int) -> list[Case]:
    """So many, always the same of one seed."""
    rng = random.Random(seed)
    return [Grammar(random.Random(rng.random())).statement() for _ in range(count)]
