"""The built site in a browser; `make docs` builds it, and CI does so before the tests."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest
from browser import Watch

if TYPE_CHECKING:
    from playwright.sync_api import Page

SITE = Path(__file__).parents[2] / "build" / "site"
PAGES = ["index", "troubleshooting", "models/wan", "reference/cli", "reference/config/index"]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    if not SITE.exists() and "CI" not in os.environ:
        pytest.skip("not built: make docs")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=SITE)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def overflow(page: Page) -> int:
    """Pixels that the page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@pytest.mark.pipeline
def test_no_page_asks_another_host_or_is_wider_than_a_phone(site: str, watched: Watch) -> None:
    with watched(site) as page:
        for name in PAGES:
            page.set_viewport_size({"width": 1280, "height": 900})
            page.goto(f"{site}{name}.html")
            assert overflow(page) == 0, name
            page.set_viewport_size({"width": 390, "height": 844})
            assert overflow(page) == 0, name
            broken = (
                "[...document.images].filter(image => image.complete && !image.naturalWidth).map(image => image.src)"
            )
            assert page.evaluate(broken) == [], name


@pytest.mark.pipeline
def test_formulas_are_drawn_and_search_finds_a_key(site: str, watched: Watch) -> None:
    with watched(site) as page:
        page.goto(f"{site}methods/rats.html")
        assert page.locator('math[display="block"]').count() == 2
        assert page.locator("text=/\\\\mathcal|\\$\\$/").count() == 0
        page.goto(f"{site}index.html")
        page.locator("input.md-search__input").fill("reward_margin")
        page.locator("a.md-search-result__link", has_text=re.compile("method", re.IGNORECASE)).first.wait_for()
