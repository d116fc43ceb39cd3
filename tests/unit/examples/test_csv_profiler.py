"""What the CSV profiler reads, measures and warns about."""

import csv
import io
import math
import random
import statistics
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.examples.deployment import EXAMPLES, Context, check_report, load_agent, report_or_error

ORDERS = (EXAMPLES / "data" / "orders.csv").read_bytes().decode()
profiler = load_agent("csv_profiler")


async def profile(text: str, **options: Any) -> dict[str, Any]:
    report = await profiler.Agent().execute({"csv": text, **options}, Context())
    check_report(report)
    return dict(report)


async def profile_column(cells: list[str]) -> dict[str, Any]:
    """A column of these cells, with its warnings; beside it stands another, so that an empty cell is no blank line."""
    lines = io.StringIO()
    csv.writer(lines).writerows([["x", "beside"], *([cell, "-"] for cell in cells)])
    report = await profile(lines.getvalue(), delimiter=",")
    column, _ = report["columns"]
    return {**column, "warnings": [item["warning"] for item in report["warnings"] if item["column"] == "x"]}


def warnings_of(report: dict[str, Any], column: str) -> list[str]:
    return [item["warning"] for item in report["warnings"] if item["column"] == column]


# -- the sample ---------------------------------------------------------------------------------------------------


async def test_sample_types_are_those_of_an_order():
    """Each column of the sample gets the type that a person would give it."""
    report = await profile(ORDERS)
    assert report["delimiter"] == ";"
    assert {column["name"]: column["type"] for column in report["columns"]} == {
        "order_id": "integer",
        "placed_at": "date",
        "customer": "text",
        "postcode": "text",
        "product": "text",
        "quantity": "integer",
        "unit_price": "number",
        "express": "boolean",
        "currency": "text",
        "delivery": "text",
        "note": "text",
    }


async def test_sample_warts_are_found():
    """Doubles, a short row, a word among numbers, an absurd quantity, a constant, unclear dates and the key."""
    report = await profile(ORDERS)
    assert (report["rows"], report["duplicate_rows"], report["ragged_rows"]) == (503, 2, 1)
    assert warnings_of(report, "quantity") == [
        "mixed types: 1 of 502 values not integer, such as 'twelve'",
        "outliers: 1, such as 4000",
    ]
    assert warnings_of(report, "order_id") == ["probable key: no two different rows share a value"]
    assert warnings_of(report, "currency") == ["constant, where it is not missing"]
    assert "day/month or month/day" in warnings_of(report, "delivery")[0]
    assert "as in line 302" in warnings_of(report, "(rows)")[1]


async def test_sample_agrees_with_the_csv_module():
    """Counts of missing, distinct and frequent values are those of a plain reading."""
    header, *rows = csv.reader(io.StringIO(ORDERS, newline=""), delimiter=";")
    report = await profile(ORDERS)
    for index, column in enumerate(report["columns"]):
        cells = [row[index].strip() if index < len(row) else "" for row in rows]
        present = Counter(cell for cell in cells if cell.lower() not in {"", "n/a"})
        assert column["name"] == header[index]
        assert (column["missing"], column["values"]) == (len(cells) - present.total(), present.total())
        assert column["distinct"] == len(present)
        shown = {cell.replace("\n", " "): count for cell, count in present.items()}
        for item in column["frequent"]:
            assert shown[item["value"]] == item["count"]


# -- statistics ---------------------------------------------------------------------------------------------------


def exact_quantile(numbers: list[int] | list[float], percent: int) -> Fraction:
    """Type 7, in fractions: the definition, without a thought for speed."""
    ordered = sorted(numbers)
    position = Fraction((len(ordered) - 1) * percent, 100)
    lower = math.floor(position)
    upper = min(lower + 1, len(ordered) - 1)
    return Fraction(ordered[lower]) + (position - lower) * (Fraction(ordered[upper]) - Fraction(ordered[lower]))


integers = st.lists(st.integers(-(10**17), 10**17), min_size=2, max_size=60)
floats = st.lists(st.floats(-1e300, 1e300, allow_nan=False), min_size=2, max_size=60)
few_values = st.lists(st.sampled_from([0, 1, 2, 3, 1_000]), min_size=2, max_size=200)


@given(st.one_of(integers, floats, few_values))
@example([1e300, -1e300])
@example([1e16, 1.0, -1e16])
@example([5e-324, 0.0])
@example([10**17, 10**17 + 1])
@example([6.0, 6.0, 6.0, 1.00001])  # exactly between two floats
@example([0.1] * 10)
@settings(max_examples=300)
async def test_statistics_are_those_of_the_statistics_module(numbers):
    """Mean and standard deviation agree to the last bit, quantiles with their definition in fractions."""
    found = (await profile_column([repr(number) for number in numbers]))["statistics"]
    assert found["mean"] == float(statistics.mean(Fraction(number) for number in numbers))
    assert found["stdev"] == statistics.stdev(numbers)
    assert (found["min"], found["max"]) == (min(numbers), max(numbers))
    for percent in (5, 25, 50, 75, 95):
        assert float(found[f"p{percent}"]) == float(exact_quantile(numbers, percent))


@given(st.lists(st.integers(-1_000, 1_000), min_size=2, max_size=100))
@settings(max_examples=50)
async def test_quantiles_are_those_that_everybody_else_computes(numbers):
    """statistics.quantiles(method="inclusive"), numpy and spreadsheets give the same numbers."""
    found = (await profile_column([str(number) for number in numbers]))["statistics"]
    peers = statistics.quantiles(numbers, n=100, method="inclusive")
    for percent in (5, 25, 50, 75, 95):
        assert math.isclose(found[f"p{percent}"], peers[percent - 1], rel_tol=1e-12, abs_tol=1e-12)
    assert found["p50"] == statistics.median(numbers)


async def test_statistics_survive_a_long_column():
    """Sorting in parts and merging them gives the order of a plain sort."""
    rng = random.Random(5)
    numbers = [round(rng.gauss(0, 1_000), 2) for _ in range(12_345)]
    found = (await profile_column([str(number) for number in numbers]))["statistics"]
    assert found["p50"] == statistics.median(numbers)
    assert found["stdev"] == statistics.stdev(numbers)
    assert (found["min"], found["max"]) == (min(numbers), max(numbers))


async def test_one_number_has_no_deviation():
    """The standard deviation of a sample needs two numbers; with one it is unknown, not zero."""
    found = (await profile_column(["5"]))["statistics"]
    assert (found["mean"], found["p95"], found["stdev"]) == (5, 5, None)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["", "x", "y", "NULL"])), max_size=60))
@settings(max_examples=100)
async def test_counts_are_those_of_a_plain_count(rows):
    """Rows, doubles, missing, distinct and frequent values of any small table."""
    report = await profile("one,two\n" + "".join(f"{one},{two}\n" for one, two in rows), delimiter=",")
    assert report["rows"] == len(rows)
    assert report["duplicate_rows"] == len(rows) - len(set(rows))
    for column, cells in zip(report["columns"], [[row[0] for row in rows], [row[1] for row in rows]], strict=True):
        present = Counter(cell for cell in cells if cell not in {"", "NULL"})
        assert (column["values"], column["distinct"]) == (present.total(), len(present))
        assert column["missing"] == len(rows) - present.total()
        expected = [count for _, count in present.most_common() if count > 1][:5]
        assert [item["count"] for item in column["frequent"]] == expected


# -- types --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "type"),
    [
        (["1", "-2", "+3", "0"], "integer"),
        (["1", "2.5", ".5", "1e3", "-1.5E-7", "3."], "number"),
        (["2024-05-14", "2024-05-14 09:30", "2024-05-14T09:30:15Z", "2024-05-14T09:30:15.25+02:00"], "date"),
        (["14.05.2024", "1.5.2024"], "date"),
        (["2024/05/14"], "date"),
        (["true", "False", "YES", "n"], "boolean"),
        (["0", "1", "1"], "integer"),
        (["0123", "4567", "8901"], "text"),
        (["12345678901234567890", "1"], "text"),
        (["14/05/2024"], "text"),
        (["1,5", "2,5"], "text"),
        (["1e999"], "text"),
        (["2024-02-30"], "text"),
        (["٣", "٤"], "text"),
        (["-", "+", ".", "e5"], "text"),
        (["", "NA", "n/a", "NULL", "None", "nan"], "empty"),
        ([], "empty"),
        (["1"] * 9 + ["x"], "integer"),
        (["1"] * 8 + ["x"] * 2, "text"),
        (["1"] * 8 + ["2.5"] * 2, "number"),
    ],
)
async def test_type_is_that_of_nearly_all_values(cells, type):
    """Nine of ten values decide; codes, unclear dates and numbers out of range are text; gaps do not count."""
    assert (await profile_column(cells))["type"] == type


async def test_dates_are_ordered_by_time_and_not_by_spelling():
    """The lowest and highest dates are told across formats and offsets."""
    cells = ["02.01.2024", "2024-01-01T23:30:00-05:00", "2024-01-02T05:00:00Z", "2023-12-31", "0001-01-01T00:00+14:00"]
    column = await profile_column(cells)
    assert (column["lowest"], column["highest"]) == ("0001-01-01T00:00+14:00", "2024-01-02T05:00:00Z")


# -- warnings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "warning"),
    [
        (["", "NA"], "empty: no row has a value"),
        (["", "", "a"], "mostly missing: 2 of 3"),
        (["a", "a", "a"], "constant"),
        (["a", "a", ""], "constant, where it is not missing"),
        ([str(n) for n in range(10)], "probable key: no two different rows share a value"),
        ([f"k{n}" for n in range(10)], "probable key: no two different rows share a value"),
        (["5"] * 20 + ["six"], "mixed types: 1 of 21 values not integer, such as 'six'"),
        (["5", "6", "x", "y"], "mixed types: 2 of 4 values not text, such as '5', '6'"),
        (["7", "8", "9", "10", "8", "9", "999", "-500"], "outliers: 2, such as -500 and 999"),
        (
            ["1,5"],
            "unclear number: 1 values such as '1,5' may have a decimal comma or grouped digits, "
            "and count as text: write 1234.5",
        ),
    ],
)
async def test_column_warns(cells, warning):
    """Each thing that is remarkable about a column is said in a sentence with figures and examples."""
    assert warning in (await profile_column(cells))["warnings"]


@pytest.mark.parametrize(
    "cells",
    [
        ["a", "b", "a", "c"],
        ["1", "2", "3", "2", "1", "4"],
        ["1.5", "2.5", "1.5", "3.5"],
        ["2024-01-01", "2024-01-02", "2024-01-02"],
        ["yes", "no", "no"],
        [str(n / 10) for n in range(1, 30)],
        ["5"] * 30 + ["6"],
        ["0123", "4567", "8901", "0123"],
        ["A", "B", "f", "t", "B"],
    ],
)
async def test_ordinary_column_is_quiet(cells):
    """No warning without a reason: measurements are no key, a rare neighbour no outlier, a code no number."""
    assert (await profile_column(cells))["warnings"] == []


async def test_key_is_found_behind_repeated_rows():
    """When whole rows occur twice, the column that tells the others apart is still the key."""
    rows = [f"{n},x{n % 3}" for n in range(20)]
    report = await profile("id,kind\n" + "\n".join([*rows, rows[4], rows[9]]))
    assert warnings_of(report, "id") == ["probable key: no two different rows share a value"]
    assert warnings_of(report, "(rows)") == ["repeated rows: 2 are the same as an earlier one"]


# -- reading ------------------------------------------------------------------------------------------------------

words = st.text("abcdefgh 0123456789.", min_size=1, max_size=8)


@given(
    delimiter=st.sampled_from(",;\t|"),
    rows=st.integers(2, 5).flatmap(
        lambda width: st.lists(st.lists(words, min_size=width, max_size=width), min_size=2)
    ),
)
@settings(max_examples=100)
def test_delimiter_is_detected(delimiter, rows):
    """Whichever of the four it is, a table with two columns or more tells it."""
    lines = io.StringIO()
    csv.writer(lines, delimiter=delimiter).writerows(rows)
    assert profiler.detect_delimiter(lines.getvalue()) == delimiter


@pytest.mark.parametrize(
    ("text", "delimiter"),
    [
        ("a;b\n1,5;2,5\n3,5;4,5\n", ";"),
        ("name;note\nAda;one, two, three\nBob;none\n", ";"),
        ('a,b\n"x;y;z",1\n"p;q",2\n', ","),
        ("time\tline\n1\ta, b; c | d\n2\te, f\n", "\t"),
        ("a|b|c\n1|2|3\n", "|"),
        ("just\none\ncolumn\n", ","),
        ("", ","),
        ("a;b;c\n" + "1;2;3\n" * 9 + "1;2\n", ";"),
        ("a;b\n" + "1;2\n" * 10_000, ";"),
    ],
)
def test_delimiter_is_not_mistaken(text, delimiter):
    """Decimal commas, commas in notes, quoted cells, ragged rows and a cut sample do not mislead."""
    assert profiler.detect_delimiter(text) == delimiter


async def test_given_delimiter_is_used():
    """What the caller names is not second-guessed."""
    assert [column["name"] for column in (await profile("a;b,c\n1;2,3\n", delimiter=","))["columns"]] == ["a;b", "c"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("\n \n\r\n", "is empty"),
        ('a,b\n1,"2\n3,4\n', "opens a quotation mark and never closes it"),
        ('a,"b', "opens a quotation mark and never closes it"),
        ('a,b\n1,"' + "x\n" * 100_000, "cannot be read (field larger than field limit"),
        ('a,b\n1,"' + "x" * 300_000, "is longer than 262,144 characters"),
        ("a,b\n1,2\n3\r4,5\n", "cannot be read (new-line character seen in unquoted field"),
        (",".join(f"c{n}" for n in range(1_001)), "has 1,001 cells"),
    ],
)
async def test_what_is_no_table_is_refused(text, problem):
    """Nothing is profiled that was not understood: the error names the row and the way out."""
    with pytest.raises(ValueError, match=r": (send|close|split)") as caught:
        await profile(text, delimiter=",")
    assert problem in str(caught.value)


async def test_line_ends_of_all_kinds_are_read():
    """Unix, Windows and old Macintosh files give the same profile."""
    profiles = [await profile(f"a,b{end}1,x{end}2,y{end}") for end in ("\n", "\r\n", "\r")]
    assert profiles[0] == profiles[1] == profiles[2]
    assert profiles[0]["rows"] == 2


async def test_ragged_rows_are_counted_and_padded():
    """A short row lacks its last cells, a long one loses its last; both are reported with their line."""
    report = await profile("a,b,c\n1,2\n1,2,3,4\n1,2,3\n")
    assert (report["rows"], report["ragged_rows"]) == (3, 2)
    assert [column["missing"] for column in report["columns"]] == [0, 0, 1]
    assert "ragged rows: 2 without 3 cells, as in line 2, 3" in warnings_of(report, "(rows)")


async def test_names_are_told_apart():
    """Columns without a name, or with the name of another, are named by their position too."""
    report = await profile("a,,a, b \n1,2,3,4\n")
    assert [column["name"] for column in report["columns"]] == ["a (column 1)", "(column 2)", "a (column 3)", "b"]


async def test_missing_header_is_suspected():
    """When the first row holds numbers, it was probably no header, and the report says so."""
    report = await profile("1,2024-01-01\n2,2024-01-02\n")
    assert "no names" in warnings_of(report, "(rows)")[0]


async def test_header_alone_is_a_table_without_rows():
    """Names without rows are a valid, empty table."""
    report = await profile("a,b,c\n")
    assert report["rows"] == 0
    assert [column["type"] for column in report["columns"]] == ["empty"] * 3


async def test_quoted_cells_may_hold_anything():
    """Delimiters, quotation marks and line ends within quotation marks belong to the cell."""
    report = await profile('a,b\n"x, ""y""\nz",1\n"x, ""y""\nz",1\n')
    assert report["columns"][0]["frequent"] == [{"value": 'x, "y" z', "count": 2}]
    assert report["ragged_rows"] == 0


@given(st.text(max_size=500))
@settings(max_examples=200)
async def test_any_text_is_a_table_or_an_error(text):
    """Whatever the text, there is a report that can be shown, or a ValueError."""
    result = await report_or_error(profiler, {"csv": text})
    if isinstance(result, str):
        assert result.endswith(".")
    else:
        check_report(result)
