"""An agent that reads a CSV file and says what is in it: types, gaps, statistics, doubles, and what looks wrong.

    headrace agents run csv_profiler --file csv=examples/data/orders.csv

Intuition: a column is a bag of values. How often each distinct value occurs is counted while the rows go by, and
everything else is computed from those counts.

The mean and the standard deviation (of a sample) are exact: sums are kept in full and rounded once, at the end.
Quantiles are of type 7 of Hyndman and Fan [1], the default of numpy, R and spreadsheets. Outliers lie outside Tukey's
outer fences [2], more than three interquartile ranges beyond the quartiles.

The first row holds the names. Numbers have a decimal point and no grouping; dates are written 2024-05-14, with or
without a time, or 14.05.2024. 0012 and 12345678901234567890 are codes, and so text: adding them up means nothing.

[1] Hyndman and Fan, Sample Quantiles in Statistical Packages, 1996.
[2] Tukey, Exploratory Data Analysis, 1977.
"""

import asyncio
import csv
import decimal
import heapq
import io
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from fractions import Fraction
from itertools import chain, islice
from operator import attrgetter
from reprlib import repr as short
from typing import Any, NamedTuple, Protocol, TypeVar

Item = TypeVar("Item")

TURN_CHARACTERS = 4_096
TURN_ITEMS = 1_000
"""The event loop gets a turn after this much of the file, or this many values: one or two milliseconds."""

COLUMNS_MAX = 1_000

ROW_CHARACTERS_MAX = 262_144
"""A longer row is refused: nearly always a quotation mark is never closed."""

DELIMITERS = (",", ";", "\t", "|")

DETECTION_CHARACTERS = 16_384

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none"})
"""Cells that mean "no value", in any case."""

TYPE_SHARE_MIN = 0.9
"""A column has a type when this share of its values has it; the rest are reported as strays."""

MIXED_SHARE_MIN = 0.1
"""A column of text is reported as mixed when at least this share of its values is not text."""

KEY_ROWS_MIN = 10
"""In fewer rows than this, everything is different from everything by chance."""

QUANTILES = (5, 25, 50, 75, 95)
FREQUENT_MAX = 5
SAMPLES_MAX = 3
TEXT_CHARACTERS_MAX = 80


class Context(Protocol):
    """What this agent uses of the context that the host gives to every execution."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Tell whoever watches how far the work is."""


class Agent:
    """Reads a CSV file and profiles its columns."""

    def get_capabilities(self) -> dict[str, Any]:
        """What the agent does, what it takes (a JSON schema) and what it returns."""
        return {
            "name": "csv_profiler",
            "description": "Profiles a CSV file: types, gaps, exact statistics, frequent values and warnings.",
            "input": {
                "type": "object",
                "properties": {
                    "csv": {"type": "string", "description": "Names in the first row."},
                    "delimiter": {"type": "string", "description": "One character; detected when left out."},
                },
                "required": ["csv"],
                "additionalProperties": False,
            },
            "output": "title, summary and tables to show; delimiter, rows, duplicate_rows, ragged_rows, columns and "
            "warnings to compute with.",
        }

    async def execute(self, input: dict[str, Any], context: Context) -> dict[str, Any]:
        """Profile `input["csv"]`; raise ValueError when the input does not follow the schema or holds no table."""
        text, delimiter = read_input(input)
        table = await read_table(text, delimiter, context)
        columns = []
        for index, (name, counts) in enumerate(zip(table.names, table.columns, strict=True)):
            done = len(text) + len(text) * index // len(table.names)
            context.progress(done, 2 * len(text), f"profiling {clean(name)}")
            await asyncio.sleep(0)
            columns.append(await profile(clean(name), counts, distinct_rows=table.rows - table.duplicate_rows))
        warnings = [warning for column in columns for warning in column.pop("warnings")]
        facts = {
            "delimiter": delimiter,
            "rows": table.rows,
            "duplicate_rows": table.duplicate_rows,
            "ragged_rows": table.ragged_rows,
            "columns": columns,
            "warnings": table.warnings() + warnings,
        }
        return {"title": "CSV profile", "summary": summary(facts), "tables": tables(facts), **facts}


def read_input(input: Any) -> tuple[str, str]:
    """The text and its delimiter, checked."""
    if type(input) is not dict:
        raise ValueError(f"The input is {short(input)}, but must be an object: send {{'csv': '...'}}.")
    unknown = sorted(set(input) - {"csv", "delimiter"})
    if unknown:
        raise ValueError(f"The input has the key {short(unknown[0])}; only `csv` and `delimiter` exist: remove it.")
    text = input.get("csv")
    if type(text) is not str:
        raise ValueError(f"`csv` is {short(text)}, but must be text: send the content of the file.")
    text = text.removeprefix("\ufeff")
    delimiter = input.get("delimiter")
    if delimiter is None:
        return text, detect_delimiter(text)
    if type(delimiter) is not str or not re.fullmatch(r"[!#-~\t]", delimiter):
        raise ValueError(
            f"`delimiter` is {short(delimiter)}, but must be a tab or one visible ASCII character other than the "
            "quotation mark: send for example ';', or leave it out."
        )
    return text, delimiter


# -- from a text to counted columns -------------------------------------------------------------------------------


def detect_delimiter(text: str) -> str:
    """The delimiter under which most rows are as wide as the first, the wider table if two agree; else a comma."""
    sample = text[:DETECTION_CHARACTERS]

    def fit(delimiter: str) -> tuple[float, int]:
        try:
            rows = [row for row in csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter) if row]
        except csv.Error:
            return 0.0, 0
        if len(sample) < len(text) and len(rows) > 1:
            rows.pop()  # cut off by the end of the sample
        width = len(rows[0]) if rows else 0
        return (sum(len(row) == width for row in rows) / len(rows), width) if width > 1 else (0.0, 0)

    return max(DELIMITERS, key=fit)


class Lines:
    """Feeds csv.reader line by line and refuses a row without end.

    After the last line comes one more, an empty one. csv.reader answers it with an empty row, unless a quotation mark
    is still open: so that mistake cannot pass unnoticed.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._line_end = "\n" if "\n" in text else "\r"
        self._is_ended = False
        self.position = 0
        """Where the next line begins."""
        self.row_position = 0
        """Where the current row begins; the reader of the rows moves it."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.position == len(self._text):
            if self._is_ended:
                raise StopIteration
            self._is_ended = True
            return self._line_end
        start, end = self.position, self._text.find(self._line_end, self.position)
        self.position = end + 1 if end >= 0 else len(self._text)
        if self.position - self.row_position > ROW_CHARACTERS_MAX:
            raise ValueError(
                f"The row that begins with {short(self._text[self.row_position : self.row_position + 99])} is longer "
                f"than {ROW_CHARACTERS_MAX:,} characters: close its quotation mark, or send a CSV file."
            )
        return self._text[start : self.position]


class Table:
    """The columns as counted values, filled row by row."""

    def __init__(self, names: list[str]) -> None:
        if len(names) > COLUMNS_MAX:
            raise ValueError(f"The first row has {len(names):,} cells, but may have {COLUMNS_MAX:,}: split the file.")
        often = Counter(names)
        self.names = [
            name if name and often[name] == 1 else f"{name} (column {number})".strip()
            for number, name in enumerate(names, start=1)
        ]
        self.columns: list[Counter[str]] = [Counter() for _ in names]
        self.rows = 0
        self.duplicate_rows = 0
        self.ragged_rows = 0
        self._ragged_lines: list[int] = []
        self._header_kinds = {understand(name)[0] for name in names if name}
        self._seen: set[tuple[str, ...]] = set()

    def add(self, cells: list[str], line: int) -> None:
        """Count one row, which ends in `line`. Cells too few are missing, cells too many are ignored."""
        self.rows += 1
        width = len(self.columns)
        if len(cells) != width:
            self.ragged_rows += 1
            if len(self._ragged_lines) < SAMPLES_MAX:
                self._ragged_lines.append(line)
        row = tuple(cells[:width] + [""] * (width - len(cells)))
        for counts, cell in zip(self.columns, row, strict=True):
            counts[cell] += 1
        self.duplicate_rows += row in self._seen
        self._seen.add(row)

    def warnings(self) -> list[dict[str, str]]:
        """What is wrong with the rows as such."""
        found = []
        if self._header_kinds & {"integer", "number", "date"}:
            found.append("no names: the first row holds numbers or dates, but was taken for the names")
        if self.duplicate_rows:
            found.append(f"repeated rows: {self.duplicate_rows:,} are the same as an earlier one")
        if self.ragged_rows:
            lines = ", ".join(f"{line:,}" for line in self._ragged_lines)
            found.append(f"ragged rows: {self.ragged_rows:,} without {len(self.columns)} cells, as in line {lines}")
        return [{"column": "(rows)", "warning": text} for text in found]


async def read_table(text: str, delimiter: str, context: Context) -> Table:
    """Count the values of every column."""
    lines = Lines(text)
    rows = csv.reader(lines, delimiter=delimiter)
    table: Table | None = None
    cells: list[str] = []
    next_turn = TURN_CHARACTERS
    try:
        for row in rows:
            lines.row_position = lines.position
            cells = [cell.strip() for cell in row]
            if table is None and any(cells):
                table = Table(cells)
            elif table is not None and (len(cells) > 1 or any(cells)):
                table.add(cells, rows.line_num)
            if lines.position >= next_turn:
                next_turn = lines.position + TURN_CHARACTERS
                context.progress(lines.position, 2 * len(text), "reading the rows")
                await asyncio.sleep(0)
    except csv.Error as error:
        raise ValueError(
            f"The row that ends in line {rows.line_num:,} cannot be read ({error}): close its quotation marks, "
            "and end all lines in the same way."
        ) from error
    if cells:
        raise ValueError(f"The last row, {short(cells)}, opens a quotation mark and never closes it: close it.")
    if table is None:
        raise ValueError("`csv` is empty, but must begin with a row of names: send the content of the file.")
    return table


# -- what a cell is -----------------------------------------------------------------------------------------------

INTEGER = re.compile(r"[+-]?(?:0|[1-9]\d{0,17})", re.ASCII)
CODE = re.compile(r"\d+", re.ASCII)
NUMBER = re.compile(r"[+-]?(?:\d{1,40}\.?\d{0,40}|\.\d{1,40})(?:[eE][+-]?\d{1,3})?", re.ASCII)
NUMBER_MAX = 1e300
"""Beyond this, sums and differences of numbers would leave the range of a float."""

DATE = re.compile(r"\d{4}[-/]\d\d[-/]\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?(?:Z|[+-]\d\d:\d\d)?)?", re.ASCII)
DOTTED_DATE = re.compile(r"(\d{1,2})\.(\d{1,2})\.(\d{4})", re.ASCII)
BOOLEANS = frozenset({"true", "false", "yes", "no", "t", "f", "y", "n"})

UNCLEAR = {
    "unclear date": re.compile(r"\d{1,2}[/-]\d{1,2}[/-](?:\d{4}|\d\d)", re.ASCII),
    "unclear number": re.compile(r"[+-]?\d+(?:,\d+)+(?:\.\d+)?", re.ASCII),
}
ADVICE = {
    "unclear date": "may be day/month or month/day, and count as text: write 2024-05-14",
    "unclear number": "may have a decimal comma or grouped digits, and count as text: write 1234.5",
}
TEXT_KINDS = frozenset({"boolean", "code", *UNCLEAR})


def understand(cell: str) -> tuple[str, Any]:
    """The kind of a cell, and its value if it is an integer, a number or a date."""
    if cell[0] not in "+-.0123456789":
        return ("boolean" if cell.lower() in BOOLEANS else "text"), None
    if INTEGER.fullmatch(cell):
        return "integer", int(cell)
    if CODE.fullmatch(cell):
        return "code", None
    if NUMBER.fullmatch(cell):
        number = float(cell)
        return ("number", number) if abs(number) <= NUMBER_MAX else ("text", None)
    moment = understand_date(cell)
    if moment is not None:
        return "date", moment
    return next((kind for kind, pattern in UNCLEAR.items() if pattern.fullmatch(cell)), "text"), None


def understand_date(cell: str) -> datetime | None:
    """The time that a cell names; UTC unless it says otherwise."""
    if dotted := DOTTED_DATE.fullmatch(cell):
        cell = f"{dotted[3]}-{dotted[2]:0>2}-{dotted[1]:0>2}"
    if not DATE.fullmatch(cell):
        return None
    try:
        moment = datetime.fromisoformat(cell.replace("/", "-"))
    except ValueError:
        return None  # the 31st of February
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


# -- what a column is ---------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """A distinct cell whose value was understood. Sorts by value."""

    value: Any
    """int, float or datetime."""
    cell: str
    rows: int
    """How many rows have it."""


class Column:
    """The distinct cells of a column, sorted by kind."""

    def __init__(self) -> None:
        self.missing = 0
        self.distinct = 0
        self.kinds: Counter[str] = Counter()
        """Cells of each kind."""
        self.repeated: list[tuple[str, int]] = []
        """The cells that occur more than once, and how often."""
        self.samples: dict[str, list[str]] = {}
        self.readings: dict[str, list[Reading]] = {}

    def add(self, cell: str, count: int) -> None:
        """Take in a cell that occurs `count` times."""
        if cell.lower() in MISSING:
            self.missing += count
            return
        kind, value = understand(cell)
        self.distinct += 1
        self.kinds[kind] += count
        if count > 1:
            self.repeated.append((cell, count))
        samples = self.samples.setdefault(kind, [])
        if len(samples) < SAMPLES_MAX:
            samples.append(repr(clean(cell)))
        if value is not None:
            self.readings.setdefault(kind, []).append(Reading(value, cell, count))

    @property
    def values(self) -> int:
        """Cells that are not missing."""
        return self.kinds.total()

    @property
    def type(self) -> str:
        """What nearly all values are: integer, number, date or boolean; else text, or empty."""
        if not self.values:
            return "empty"
        best = max(("integer", "number", "date", "boolean"), key=self.covered)
        return best if self.covered(best) >= TYPE_SHARE_MIN * self.values else "text"

    def covered(self, type: str) -> int:
        """How many values fit into a type."""
        return sum(count for kind, count in self.kinds.items() if self._fits(kind, type))

    def samples_except(self, type: str) -> list[str]:
        """A few values that do not fit into a type."""
        others = (texts for kind, texts in self.samples.items() if not self._fits(kind, type))
        return list(chain.from_iterable(others))[:SAMPLES_MAX]

    def readings_of_type(self) -> list[Reading]:
        """The readings that fit into the column's type."""
        fitting = (readings for kind, readings in self.readings.items() if self._fits(kind, self.type))
        return list(chain.from_iterable(fitting))

    def _fits(self, kind: str, type: str) -> bool:
        # Among codes such as 0012, an integer is one more code: that it begins with another digit is chance.
        if kind == "integer" and self.kinds["code"]:
            return type == "text"
        if kind == "integer":
            return type in {"integer", "number"}
        return kind == type or (type == "text" and kind in TEXT_KINDS)


async def profile(name: str, counts: Counter[str], *, distinct_rows: int) -> dict[str, Any]:
    """Everything about one column."""
    column = Column()
    for index, (cell, count) in enumerate(counts.items(), start=1):
        column.add(cell, count)
        if index % TURN_ITEMS == 0:
            await asyncio.sleep(0)
    frequent = await largest(column.repeated, FREQUENT_MAX, key=lambda item: item[1])
    ordered = await in_order(column.readings_of_type())
    numbers = await measure(ordered) if column.type in {"integer", "number"} else None
    warnings = [*value_warnings(column, distinct_rows), *type_warnings(column)]
    if numbers and numbers.outliers:
        warnings.append(f"outliers: {numbers.outliers:,}, such as {' and '.join(numbers.extremes)}")
    return {
        "name": name,
        "type": column.type,
        "values": column.values,
        "missing": column.missing,
        "distinct": column.distinct,
        "frequent": [{"value": clean(cell), "count": count} for cell, count in frequent],
        "lowest": ordered[0].cell if ordered else None,
        "highest": ordered[-1].cell if ordered else None,
        "statistics": numbers.statistics if numbers else None,
        "outliers": numbers.outliers if numbers else None,
        "warnings": [{"column": name, "warning": text} for text in warnings],
    }


def value_warnings(column: Column, distinct_rows: int) -> Iterator[str]:
    """What is remarkable about which values there are."""
    if not column.values:
        yield "empty: no row has a value"
    elif column.missing > column.values:
        yield f"mostly missing: {column.missing:,} of {column.missing + column.values:,}"
    if column.distinct == 1 and column.values > 1:
        yield "constant" + (", where it is not missing" if column.missing else "")
    # Comparing with the distinct rows finds the key even where whole rows occur twice.
    if column.distinct == distinct_rows >= KEY_ROWS_MIN and not column.missing and column.type in {"integer", "text"}:
        yield "probable key: no two different rows share a value"


def type_warnings(column: Column) -> Iterator[str]:
    """What is remarkable about how the values are written."""
    strays = column.values - column.covered(column.type)
    if strays >= (MIXED_SHARE_MIN * column.values if column.type == "text" else 1):
        shown = ", ".join(column.samples_except(column.type))
        yield f"mixed types: {strays:,} of {column.values:,} values not {column.type}, such as {shown}"
    for kind, advice in ADVICE.items():
        if column.type == "text" and column.kinds[kind]:
            yield f"{kind}: {column.kinds[kind]:,} values such as {column.samples[kind][0]} {advice}"


# -- statistics of counted numbers --------------------------------------------------------------------------------

FLOAT_UNIT = 2**1_074
"""Every float is a whole multiple of 1 / FLOAT_UNIT: sums of such multiples are sums of integers, and exact."""

PRECISE = decimal.Context(prec=2_200, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX)
"""All digits of the square of what lies half-way between two floats, so that it is rounded to the even one of them."""


class Numbers(NamedTuple):
    """What is to say about the numbers of a column."""

    statistics: dict[str, float | None]
    outliers: int
    extremes: list[str]
    """The outermost outlier on either side."""


async def measure(ordered: list[Reading]) -> Numbers:
    """The statistics of numbers in ascending order."""
    count = total = total_square = 0
    cumulative: list[int] = []
    for index, reading in enumerate(ordered, start=1):
        numerator, denominator = reading.value.as_integer_ratio()
        multiple = numerator * (FLOAT_UNIT // denominator)
        count += reading.rows
        total += multiple * reading.rows
        total_square += multiple * multiple * reading.rows
        cumulative.append(count)
        if index % TURN_ITEMS == 0:
            await asyncio.sleep(0)
    quantiles = {percent: quantile(ordered, cumulative, percent) for percent in QUANTILES}
    reach = 3 * (quantiles[75] - quantiles[25])
    below = bisect_left(ordered, quantiles[25] - reach, key=attrgetter("value")) if reach else 0
    above = bisect_right(ordered, quantiles[75] + reach, key=attrgetter("value")) if reach else len(ordered)
    return Numbers(
        statistics={
            "min": ordered[0].value,
            **{f"p{percent}": value for percent, value in quantiles.items()},
            "max": ordered[-1].value,
            "mean": total / (count * FLOAT_UNIT),
            "stdev": standard_deviation(count, total, total_square),
        },
        outliers=(cumulative[below - 1] if below else 0) + count - cumulative[above - 1],
        extremes=[reading.cell for reading in [*ordered[: min(below, 1)], *ordered[above:][-1:]]],
    )


def standard_deviation(count: int, total: int, total_square: int) -> float | None:
    """That of a sample, from the sums of the multiples of 1 / FLOAT_UNIT and of their squares; None for one number."""
    if count == 1:
        return None
    above = decimal.Decimal(count * total_square - total**2)
    below = decimal.Decimal(count * (count - 1) * FLOAT_UNIT**2)
    return float(PRECISE.sqrt(PRECISE.divide(above, below)))


def quantile(ordered: list[Reading], cumulative: list[int], percent: int) -> float:
    """The value below which `percent` of the numbers lie, by linear interpolation between neighbours (type 7)."""
    index, remainder = divmod((cumulative[-1] - 1) * percent, 100)
    lower: float = ordered[bisect_right(cumulative, index)].value
    upper: float = ordered[bisect_right(cumulative, index + 1)].value if remainder else lower
    if lower == upper:
        return lower
    return float((Fraction(lower) * (100 - remainder) + Fraction(upper) * remainder) / 100)


async def in_order(readings: list[Reading]) -> list[Reading]:
    """The readings in ascending order: sorted in parts and merged, so that the event loop gets its turns."""
    parts: list[list[Reading]] = []
    for start in range(0, len(readings), TURN_ITEMS):
        parts.append(sorted(readings[start : start + TURN_ITEMS]))
        await asyncio.sleep(0)
    ordered: list[Reading] = []
    merged = heapq.merge(*parts)
    while batch := list(islice(merged, TURN_ITEMS)):
        ordered += batch
        await asyncio.sleep(0)
    return ordered


async def largest(items: Iterable[Item], count: int, key: Callable[[Item], Any]) -> list[Item]:
    """The `count` largest items, largest first and the earlier first among equals; the event loop gets its turns."""
    best: list[Item] = []
    rest = iter(items)
    while batch := list(islice(rest, TURN_ITEMS)):
        best = heapq.nlargest(count, best + batch, key=key)
        await asyncio.sleep(0)
    return best


# -- the report ---------------------------------------------------------------------------------------------------


def summary(facts: dict[str, Any]) -> list[list[Any]]:
    """The figures that one wants to see first."""
    types = Counter(column["type"] for column in facts["columns"])
    cells = facts["rows"] * len(facts["columns"])
    missing = sum(column["missing"] for column in facts["columns"])
    return [
        ["Rows", facts["rows"]],
        ["Columns", f"{len(facts['columns']):,} ({', '.join(f'{n} {type}' for type, n in types.items())})"],
        ["Delimiter", {"\t": "tab"}.get(facts["delimiter"], facts["delimiter"])],
        ["Missing cells", f"{missing:,} ({missing / cells:.1%})" if cells else 0],
        ["Repeated rows", facts["duplicate_rows"]],
        ["Ragged rows", facts["ragged_rows"]],
        ["Warnings", len(facts["warnings"])],
    ]


def tables(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The columns, the numbers, the dates and the warnings; empty tables are left out."""
    lists = {
        "Columns": [
            {name: column[name] for name in ("name", "type", "missing", "distinct")}
            | {"frequent": ", ".join(f"{item['value']} ({item['count']:,})" for item in column["frequent"][:3])}
            for column in facts["columns"]
        ],
        "Numbers": [
            {"name": column["name"]} | {name: six_digits(value) for name, value in column["statistics"].items()}
            for column in facts["columns"]
            if column["statistics"]
        ],
        "Dates": [
            {name: column[name] for name in ("name", "lowest", "highest")}
            for column in facts["columns"]
            if column["type"] == "date"
        ],
        "Warnings": facts["warnings"],
    }
    return [
        {"title": title, "columns": list(rows[0]), "rows": [list(row.values()) for row in rows]}
        for title, rows in lists.items()
        if rows
    ]


def six_digits(value: float | None) -> float | None:
    """Enough to look at."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def clean(text: str) -> str:
    """The text, short and fit to be shown: strangers write into files, and can put terminal commands into a cell."""
    shown = text if len(text) <= TEXT_CHARACTERS_MAX else text[: TEXT_CHARACTERS_MAX - 1] + "…"
    return "".join(c if c.isprintable() else " " if c in "\r\n\t" else "\ufffd" for c in shown)
