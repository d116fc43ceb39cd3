"""The dashboard as its reader sees it: every method is something that one does or looks at."""

from collections.abc import Callable
from typing import Any

from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

MISSING = "\N{EN DASH}"
WAIT_S = 40.0
"""Well over the longest pause of the page between two attempts, and what a slow machine takes for one."""
POLL_S = 0.1

# Alpha tells a series from the thin, half transparent lines of the limits.
COUNT_COLOURS = """
const canvas = document.querySelector(`[data-chart="${arguments[0]}"] canvas`);
if (canvas === null) return 0;
const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
let coloured = 0;
for (let i = 0; i < pixels.length; i += 4) {
  const [red, green, blue, alpha] = pixels.slice(i, i + 4);
  if (alpha > 150 && Math.max(red, green, blue) - Math.min(red, green, blue) > 60) coloured += 1;
}
return coloured;
"""


# What the page waits for by the clock does not come any more: the numbers of its timers only rise.
STOP_TIMERS_IF = """
if (document.querySelector(arguments[0]).innerText !== arguments[1]) return false;
for (let timer = setTimeout(() => {}); timer > 0; timer -= 1) clearTimeout(timer);
return true;
"""

# Before the page's own scripts: it never gives up waiting for an answer, and notes each answer that it gets.
PATIENCE = """
AbortSignal.timeout = () => new AbortController().signal;
const ask = window.fetch;
window.answers = [];
window.fetch = async (...question) => {
  const answer = await ask(...question);
  answers.push(`${new URL(answer.url).pathname} ${answer.status}`);
  return answer;
};
"""

# In one turn of the page: between two of them a row may go, or the charts may move on.
ROWS = "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)].map((row) => row.innerText)"
NOTES = "return [...document.querySelectorAll('[data-chart] .card-note')].map((note) => note.innerText)"


class Page:
    """A tab that shows, or will show, the dashboard."""

    def __init__(self, driver: WebDriver) -> None:
        self.driver = driver
        self.size(1280, 900)
        self.scheme("light")

    def open(self, url: str) -> None:
        """Load the dashboard."""
        self.driver.get(url)

    def size(self, width: int, height: int) -> None:
        """Give the page this many CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def scheme(self, name: str) -> None:
        """Prefer `light` or `dark`."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def find(self, selector: str) -> WebElement:
        """The one element that a CSS selector names."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """What an element says, with every kind of space as a plain one."""
        return " ".join(self.find(selector).text.split())

    def shows(self, selector: str) -> bool:
        """Whether the element can be seen."""
        return self.find(selector).is_displayed()

    def tile(self, name: str) -> str:
        """The figure of a tile, with its unit."""
        return self.text(f'[data-tile="{name}"] .tile-figure')

    def tile_note(self, name: str) -> str:
        """What stands below the figure."""
        return self.text(f'[data-tile="{name}"] .tile-note')

    def rows(self, table: str) -> list[str]:
        """The lines of a table."""
        return [" ".join(row.split()) for row in self.run(ROWS, table)]

    def chart_notes(self) -> list[str]:
        """What stands beside the title of each chart, all of them at one moment."""
        notes: list[str] = self.run(NOTES)
        return notes

    def coloured_pixels(self, chart: str) -> int:
        """How many pixels of a chart's canvas have a colour, which axes, grid and labels do not."""
        return int(self.run(COUNT_COLOURS, chart))

    def stop_timers_when(self, selector: str, text: str) -> None:
        """Wait until an element says this, and let nothing more happen by the clock from that very moment on."""
        self.wait_until(lambda: self.run(STOP_TIMERS_IF, selector, text), f"{selector} says {text!r}")

    def be_patient(self) -> None:
        """The pages that are opened from now on wait for each answer for as long as it takes, and note it."""
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": PATIENCE})

    def answers(self) -> list[str]:
        """Path and status of each answer, oldest first, to a page that is patient."""
        answers: list[str] = self.run("return window.answers")
        return answers

    def run(self, script: str, *arguments: object) -> Any:
        """The value of a script in the page."""
        return self.driver.execute_script(script, *arguments)

    def wait_until(self, holds: Callable[[], bool], what: str, *, wait_s: float = WAIT_S) -> None:
        """Wait until the page is as described, or fail with the description."""
        WebDriverWait(self.driver, wait_s, POLL_S).until(lambda _: holds(), message=f"never: {what}")

    def wait_until_live(self) -> None:
        """Wait until numbers arrive."""
        self.wait_until(lambda: self.text("#connection-text") == "Live", "the connection is live")
        self.wait_until(lambda: self.tile("requests") != MISSING, "a first figure is shown")

    def complaints(self) -> list[str]:
        """What the browser's console holds against the page: violations of its policy, errors, failed requests."""
        return [
            entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
        ]
