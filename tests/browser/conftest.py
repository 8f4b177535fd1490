from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.frontend import CHROMIUM_FLAGS, FrontEnd, find_chromium
from tests.comfyui.fixtures import installation, model_files, native_server, server, start_server  # noqa: F401
from tests.comfyui.server import ComfyServer


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = find_chromium()
    if executable is None:
        pytest.skip("no chromium found (install it or set CHROMIUM)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=list(CHROMIUM_FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def native_front_end(browser: Any, native_server: ComfyServer) -> Iterator[FrontEnd]:  # noqa: F811
    """A page on the shared server."""
    front_end = FrontEnd(browser, native_server)
    yield front_end
    front_end.close()


@pytest.fixture
def front_end(server: ComfyServer, native_front_end: FrontEnd) -> FrontEnd:  # noqa: F811
    """The same, when this pack is there."""
    return native_front_end
