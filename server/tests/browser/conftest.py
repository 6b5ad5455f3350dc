import os
import shutil
from pathlib import Path

import pytest

_SYSTEM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium: playwright's own, or the system's. `POLYDRAFT_CHROMIUM` names another."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: `nox -s browser`")
    with api.sync_playwright() as playwright:
        named = os.environ.get("POLYDRAFT_CHROMIUM")
        own = playwright.chromium.executable_path
        found = named or (own if Path(own).exists() else next(filter(None, map(shutil.which, _SYSTEM)), None))
        if found is None:
            pytest.skip("there is no Chromium: `playwright install chromium`, or set POLYDRAFT_CHROMIUM to its path")
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Opens the page of a server; fails if the page has an error, breaks its own policy, or asks another host."""
    contexts, wrong = [], []

    def open_(server, **options):
        origin = server.url.removesuffix("/v1")
        context = chromium.new_context(**options)
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
        page.on(
            "request",
            lambda request: None if request.url.startswith((f"{origin}/", "data:")) else wrong.append(request.url),
        )
        page.goto(f"{origin}/")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not wrong, wrong
