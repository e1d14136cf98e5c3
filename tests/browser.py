"""Debian's Chromium without a window, driven by Playwright: pages as people see them, and what went wrong on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from local.chromium import find_chromium, launch_options

WAIT_MS = 30_000
expect.set_options(timeout=WAIT_MS)


needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="chromium is not installed")


class Tab:
    """A page with cookies and storage of its own.

    Attributes:
        page: Playwright's.
        problems: what the page threw, logged as an error or was refused by its policy, and requests to other hosts.
            Answers with an error status are no problem of the page.
    """

    def __init__(self, page: Page, url: str):
        self.page = page
        self.url = url
        self.problems: list[str] = []
        self._requests: list[Request] = []
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self._note)
        page.on("request", self._check)

    def _note(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.problems.append(message.text)

    def _check(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("data", "blob"):
            return
        self._requests.append(request)
        if parts.netloc != urlsplit(self.url).netloc:
            self.problems.append(f"{request.url} is not of this host")

    def bytes_by_url(self) -> dict[str, int]:
        """Bodies of all that was asked for, as they were sent, bytes; waits for what is still on its way."""
        sent = {}
        for request in list(self._requests):
            response = request.response()
            assert response is not None, f"{request.url}: {request.failure}"
            response.finished()
            sent[request.url] = request.sizes()["responseBodySize"]
        return sent

    def open(self, path: str = "/") -> Page:
        """Loads a page of the service, pictures included."""
        self.page.goto(self.url + path, wait_until="load")
        return self.page

    def sign_in(self, key: str, path: str = "/") -> Page:
        """Signs in by hand, and lands on a page."""
        self.open(f"/sign-in?next={path}")
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Sign in").click()
        self.page.wait_for_url(lambda found: urlsplit(found).path == path)
        return self.page

    def cookies(self) -> dict[str, str]:
        """The cookies of this tab by name."""
        return {cookie["name"]: cookie["value"] for cookie in self.page.context.cookies()}

    def load_pictures(self) -> None:
        """Waits until every picture of the page is there; one that cannot be shown is an error."""
        self.page.evaluate(
            "Promise.all([...document.images].map((image) => { image.loading = 'eager'; return image.decode(); }))"
        )

    def fits(self) -> bool:
        """Whether nothing is wider than the screen."""
        return self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    def width_of(self, selector: str) -> float:
        """Of an element, CSS pixels."""
        box = self.page.locator(selector).bounding_box()
        assert box is not None, f"{selector} is not shown"
        return box["width"]


class Chromium:
    """A running browser; see `chromium`."""

    def __init__(self, browser: Browser):
        self._browser = browser

    def new_tab(
        self,
        url: str,
        width: int = 1280,
        dark: bool = False,
        scripts: bool = True,
        cookies: Mapping[str, str] | None = None,
    ) -> Tab:
        """A tab for the service at `url` that has loaded nothing yet.

        Args:
            width: of the window, CSS pixels.
            scripts: False: JavaScript is switched off.
            cookies: of whoever is signed in; None: nobody is.
        """
        context = self._browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            java_script_enabled=scripts,
            locale="en-GB",
            timezone_id="UTC",
        )
        context.set_default_timeout(WAIT_MS)
        for name, value in (cookies or {}).items():
            context.add_cookies([{"name": name, "value": value, "url": url}])
        return Tab(context.new_page(), url)

    def close_tabs(self) -> None:
        """Ends every tab: their service may be gone."""
        for context in self._browser.contexts:
            context.close()


@contextmanager
def chromium() -> Iterator[Chromium]:
    """A browser until the block ends."""
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(**launch_options())
        try:
            yield Chromium(running)
        finally:
            running.close()
