"""Writes access.log and orders.csv beside this file, the same bytes on every machine.

    python examples/data/generate.py

Only `Random.random` is used: of all its methods, it alone promises the same sequence in every version of Python.
watermills.txt is not generated; people wrote it.
"""

from bisect import bisect
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import TypeVar

T = TypeVar("T")

SEED = 1_827
"""The year in which Fourneyron's first turbine ran."""

FIRST_DAY = datetime(2024, 5, 13, tzinfo=UTC)

REQUESTS_PER_DAY = (480, 600, 780)
"""A service that is slowly becoming known."""

HOUR_WEIGHTS = (3, 2, 2, 2, 2, 3, 5, 8, 11, 13, 14, 13, 11, 12, 13, 13, 12, 11, 10, 9, 8, 7, 6, 4)

PAGES: tuple[tuple[str, str, int, int], ...] = (
    # method, path, weight, usual size
    ("GET", "/", 16, 5_120),
    ("GET", "/api/v1/mills", 20, 18_400),
    ("GET", "/api/v1/mills?river=Derwent", 6, 6_200),
    ("GET", "/api/v1/mills/17", 8, 1_240),
    ("GET", "/api/v1/mills/42", 5, 1_310),
    ("GET", "/api/v1/levels", 14, 2_750),
    ("POST", "/api/v1/readings", 12, 64),
    ("GET", "/static/app.js", 9, 88_210),
    ("GET", "/static/site.css", 8, 12_044),
    ("GET", "/favicon.ico", 3, 1_150),
    ("GET", "/about", 2, 3_300),
)
CLIENTS = (
    "203.0.113.9",
    "203.0.113.27",
    "203.0.113.140",
    "198.51.100.4",
    "198.51.100.77",
    "192.0.2.61",
    "2001:db8::5",
)
BROWSERS = (
    "Mozilla/5.0 (X11; Linux x86_64; rv:126.0) Gecko/20100101 Firefox/126.0",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_4 like Mac OS X) AppleWebKit/605.1.15",
    "gauge-station/2.3 (+https://mills.example/stations)",
)
WARTS = (
    (400, '198.51.100.200 - - [13/May/2024:10:15:02 +0000] "\\x16\\x03\\x01\\x02\\x00\\x01" 400 157 "-" "-"'),
    (901, "2024/05/14 09:12:44 [error] 71#71: *881 upstream timed out (110: Connection timed out)"),
    (1_340, "203.0.113.27 - - [14/May/2024:23:59"),
    (1_777, '192.0.2.61 - - [31/Feb/2024:08:00:00 +0000] "GET / HTTP/1.1" 200 5120 "-" "-"'),
)


class Dice(Random):
    """Choices made of nothing but `random()`."""

    def below(self, limit: int) -> int:
        """A whole number from 0 up to, but not including, `limit`."""
        return int(self.random() * limit)

    def one_of(self, options: Sequence[T]) -> T:
        """Any of the options."""
        return options[self.below(len(options))]

    def weighted(self, weights: Sequence[int]) -> int:
        """An index, as often as its weight says."""
        sums = list(accumulate(weights))
        return bisect(sums, self.below(sums[-1]))


def access_log(dice: Dice) -> str:
    """Three days of a small site: growing traffic, one morning of failures, one evening of guessed passwords."""
    lines: list[tuple[datetime, str]] = []
    for day, requests in enumerate(REQUESTS_PER_DAY):
        for _ in range(requests):
            hour = dice.weighted(HOUR_WEIGHTS)
            at = FIRST_DAY + timedelta(days=day, hours=hour, seconds=dice.below(3_600))
            lines.append((at, page_line(dice, at)))
    for _ in range(140):
        at = FIRST_DAY + timedelta(days=2, hours=20, minutes=5, seconds=dice.below(900))
        line = log_line("203.0.113.250", at, "POST /login HTTP/1.1", 401, 212, "python-requests/2.31")
        lines.append((at, line))
    log = [line for _, line in sorted(lines)]
    for position, wart in WARTS:
        log.insert(position, wart)
    return "\n".join(log) + "\n"


def page_line(dice: Dice, at: datetime) -> str:
    """One visit."""
    method, path, _, size = PAGES[dice.weighted([weight for _, _, weight, _ in PAGES])]
    status = 201 if method == "POST" else 200
    chance = dice.random()
    outage = at.day == 14 and at.hour in {9, 10} and path.startswith("/api/")
    if outage:
        status, size = 502, 157
    elif chance < 0.02:
        path, status, size = dice.one_of(("/wp-login.php", "/.env", "/mills/old")), 404, 153
    elif chance < 0.025:
        status, size = 500, 98
    elif chance < 0.12 and method == "GET":
        status, size = 304, 0
    else:
        size += dice.below(size // 8 + 1)
    return log_line(dice.one_of(CLIENTS), at, f"{method} {path} HTTP/1.1", status, size, dice.one_of(BROWSERS))


def log_line(client: str, at: datetime, request: str, status: int, size: int, browser: str) -> str:
    """A line in the combined format; %b would speak the language of the machine."""
    month = ("Jan", "Feb", "Mar", "Apr", "May", "Jun")[at.month - 1]
    stamp = f"{at.day:02}/{month}/{at:%Y:%H:%M:%S} +0000"
    return f'{client} - - [{stamp}] "{request}" {status} {size or "-"} "-" "{browser}"'


CUSTOMERS = (
    "Ada Byron",
    "Grace Hopper",
    "Søren Ødegård",
    "Zoë Müller",
    "Li Wei",
    "José García",
    "O'Neill & Sons",
    "Ōta Miki",
)
PRODUCTS = (("bearing block", 4_850), ("sluice board", 2_200), ("oak cog", 640), ("millstone dresser", 12_900))
NOTES = ("", "", "", "", "leave at the gate", 'marked "urgent"', "call first; dog", "two parcels,\none pallet")


def orders_csv(dice: Dice) -> str:
    """Five hundred orders with the warts that exports have: gaps, doubles, a word among numbers, a typing error."""
    rows = ["order_id;placed_at;customer;postcode;product;quantity;unit_price;express;currency;delivery;note"]
    at = datetime(2024, 1, 2, 8, tzinfo=UTC)
    for number in range(500):
        at += timedelta(minutes=30 + dice.below(700))
        rows.append(";".join(order(dice, number, at)))
    rows.insert(120, rows[119])
    rows.insert(344, rows[343])
    rows.insert(260, "10999;2024-04-01")
    return "\r\n".join(rows) + "\r\n"


def order(dice: Dice, number: int, at: datetime) -> list[str]:
    """The cells of one order."""
    product, cents = dice.one_of(PRODUCTS)
    quantity = {77: "twelve", 203: "4000", 391: "-2"}.get(number, str(1 + dice.below(12)))
    price = "" if dice.random() < 0.06 else f"{cents * (90 + dice.below(21)) // 100 / 100:.2f}"
    delivery = at + timedelta(days=2 + dice.below(5))
    note = dice.one_of(NOTES).replace('"', '""')
    return [
        str(10_000 + number),
        f"{at:%Y-%m-%d %H:%M}",
        dice.one_of(CUSTOMERS),
        f"{dice.below(9_000) + 500:05}",
        product,
        quantity,
        price,
        "n/a" if dice.random() < 0.03 else dice.one_of(("yes", "no", "no")),
        "EUR",
        f"{delivery.day:02}/{delivery.month:02}/{delivery.year}",
        f'"{note}"' if set(note) & set('";\n') else note,
    ]


def files() -> dict[str, bytes]:
    """The generated files: name to content."""
    return {
        "access.log": access_log(Dice(SEED)).encode(),
        "orders.csv": orders_csv(Dice(SEED)).encode(),
    }


if __name__ == "__main__":
    for name, content in files().items():
        Path(__file__).with_name(name).write_bytes(content)
