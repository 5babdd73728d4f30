"""Settings that every test runs under, which must be made before torch is imported; and the browser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

# Models here are so small that threads only get in each other's way; groups in distributed/ bring processes of their own.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest

from tests.browser import NoBrowserError, find_browser

if TYPE_CHECKING:
    import playwright.sync_api


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.sync_api.Browser]:
    try:
        found = find_browser()
    except NoBrowserError as error:
        pytest.skip(str(error))
    import playwright.sync_api  # here, since the other tests run on machines that do not have it

    with playwright.sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found.executable, args=found.options, env={**found.environment})
        yield browser
        browser.close()
