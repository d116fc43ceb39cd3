"""What the suites of other projects expect of ours."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "time_intensive: what dogpile calls its slow tests")
