"""A headless Chromium, and pages of a report for it to open."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sstoken.stages.report.page import write_page
from tests.stages.report.small_folders import tokens_table, write_masked, write_signals, write_tokens

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

EVIL = '<script>window.ran = 1</script><img src="http://127.0.0.1:9/x" onerror="window.ran = 2"> {{ 7*7 }}'
FAMILY = "👩‍👩‍👧"
CONVERSATIONS = [
    [("Say hello. ", f"Hello {FAMILY} and e\u0301 to you!")],
    [("In Hebrew? ", "שלום לכולם, מה שלומכם?")],
    [(f"What is {EVIL}", f"Text, and no more: {EVIL}")],
    *[[(f"How many is {n} and {n}? ", f"It is {2 * n}.\nSo {n} + {n} = {2 * n}.")] for n in range(9)],
]
SIZES = {"desktop": (1320, 900), "tablet": (900, 1000), "phone": (390, 844)}


@dataclass
class Opened:
    """A page in the browser, with what went wrong and what it asked for."""

    page: "Page"
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def program() -> str | None:
    """A Chromium of the system, if there is one; else Playwright looks for its own."""
    named = os.environ.get("SSTOKEN_BROWSER")
    names = ("chromium", "chromium-browser", "google-chrome")
    return named or next((found for name in names if (found := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs Playwright: run `make test-browser`"
    )
    with playwright.sync_playwright() as started:
        try:
            opened = started.chromium.launch(executable_path=program(), args=["--no-sandbox"])
        except playwright.Error as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"no Chromium that starts: {str(error).splitlines()[0]}; run `make test-browser`")
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages by name: of one masked folder, of two, and of tokens alone."""
    place = tmp_path_factory.mktemp("pages")
    tokens = write_tokens(place / "tokens", [tokens_table(CONVERSATIONS)])
    for seed, name in enumerate(("base", "step-2")):
        write_signals(place / "scores" / name, tokens, seed, "loss", "entropy", "rank")
    masked = write_masked(place / "masked", tokens, weight=True)
    other = write_masked(place / "other", tokens, seed=5, drop=("e1",))
    write_page({"masked": masked}, place / "one.html")
    write_page({"ours": masked, "theirs": other}, place / "two.html")
    write_page({"tokens": tokens}, place / "tokens.html")
    return {path.stem: path for path in place.glob("*.html")}


@pytest.fixture
def visit(browser: "Browser", files: dict[str, Path]) -> Iterator[Any]:
    """`visit(page, size, scheme)` opens a page; afterwards nothing may have gone wrong, or left the page."""
    opened: list[Opened] = []

    def start(name: str = "one", size: str = "desktop", scheme: Any = "light", more: str = "") -> "Page":
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        found = Opened(context.new_page())
        opened.append(found)
        found.page.on("console", lambda message: found.errors.append(message.text))
        found.page.on("pageerror", lambda error: found.errors.append(str(error)))
        found.page.on("dialog", lambda dialog: found.errors.append(f"dialog: {dialog.message}"))
        found.page.on("request", lambda request: found.requests.append(request.url))
        found.page.goto(files[name].as_uri() + more)
        return found.page

    yield start
    for each in opened:
        assert each.errors == []
        assert [url for url in each.requests if not url.startswith(("file://", "data:image/png"))] == []
        assert len([url for url in each.requests if url.startswith("file://")]) == 1
        assert each.page.evaluate("window.ran") is None
        each.page.context.close()
