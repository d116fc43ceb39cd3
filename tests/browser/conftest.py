"""A real Chromium for every test below, and a server for it to look at.

Without Chromium the tests skip and say so; with CI=true they fail, because there it must be installed.
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.chrome.webdriver import WebDriver

from tests.browser.page import Page
from tests.browser.scene import Scene

CHROMIUM = "/usr/bin/chromium"
CHROMEDRIVER = "/usr/bin/chromedriver"
START_S_MAX = 60.0
END_S_MAX = 30.0
"""How long its many processes may take to end, before they count as left behind."""

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


class Chromedriver(Service):
    """Chromedriver on a port that it takes itself: one that was found free before may be another's by then."""

    def __init__(self, log: Path) -> None:
        self._log = log
        super().__init__(CHROMEDRIVER)

    def command_line_args(self) -> list[str]:
        """Any port that is free."""
        return ["--port=0"]

    def _start_process(self, path: str) -> None:
        with self._log.open("wb") as self.log_output:
            super()._start_process(path)
        deadline = time.monotonic() + START_S_MAX
        while (said := re.search(r"started successfully on port (\d+)", self._log.read_text())) is None:
            self.assert_process_still_running()
            assert time.monotonic() < deadline, f"chromedriver does not say its port:\n{self._log.read_text()}"
            time.sleep(0.01)
        self.port = int(said[1])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what drives a browser."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("browser")


@pytest.fixture(scope="session")
def chromium() -> Iterator[WebDriver]:
    """One headless Chromium with a fresh profile for the whole run."""
    missing = [path for path in (CHROMIUM, CHROMEDRIVER) if shutil.which(path) is None]
    if missing:
        reason = f"not installed: {', '.join(missing)}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    options = Options()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(prefix="headrace-chromium-", ignore_cleanup_errors=True) as directory:
        for flag in [*FLAGS, f"--user-data-dir={Path(directory) / 'profile'}"]:
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Chromedriver(Path(directory) / "driver.log"))
        try:
            yield driver
        finally:
            family = psutil.Process(driver.service.process.pid).children(recursive=True)
            driver.quit()
            psutil.wait_procs(family, timeout=END_S_MAX)


@pytest.fixture
def driver(chromium: WebDriver) -> Iterator[WebDriver]:
    """A fresh tab, with nothing stored for any site, 1280 pixels wide and light; closed afterwards."""
    home = chromium.current_window_handle
    chromium.switch_to.new_window("tab")
    chromium.execute_cdp_cmd("Network.enable", {})
    chromium.execute_cdp_cmd("Network.clearBrowserCache", {})
    chromium.get_log("browser")
    try:
        yield chromium
    finally:
        for handle in set(chromium.window_handles) - {home}:
            chromium.switch_to.window(handle)
            chromium.close()
        chromium.switch_to.window(home)


@pytest.fixture
def page(driver: WebDriver) -> Page:
    """The fresh tab, with words for what a reader of the dashboard does and sees."""
    return Page(driver)


@pytest.fixture
def scene() -> Iterator[Scene]:
    """A running server with a scripted monitor, under healthy load until the test says otherwise."""
    scene = Scene()
    try:
        yield scene
    finally:
        scene.close()
