"""What holds for every page: nothing in the way of assistive technology, nothing from elsewhere, nothing too wide or
too heavy, in both schemes and on a telephone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from serve.access import PAGE_ROLES
from tests.browser import Tab, needs_chromium
from tests.busy_clinic import HOSTILE, BusyClinic
from tests.http_server import http_server
from tests.local_service import LocalService

pytestmark = [pytest.mark.browser, needs_chromium]

MAX_PAGE_BYTES = 300_000
# Ways to each page of `PAGE_ROLES`, for someone who has signed in; signing out shows none of its own.
PAGES: dict[str, dict[str, Callable[[BusyClinic, Tab], str]]] = {
    "": {"form": lambda clinic, tab: "/"},
    "results": {
        "one picture": lambda clinic, tab: clinic.upload(tab.cookies(), tab.url, 1),
        "twelve pictures": lambda clinic, tab: clinic.upload(tab.cookies(), tab.url, 12),
        "nothing there": lambda clinic, tab: "/results/page-none?n=1",
    },
    "review": {
        "queue": lambda clinic, tab: "/review",
        "label studio": lambda clinic, tab: "/review/label-studio",
    },
    "monitoring": {
        "a busy month": lambda clinic, tab: "/monitoring?hours=168",
        "all alarms": lambda clinic, tab: "/monitoring?show=all",
    },
    "models": {"candidate": lambda clinic, tab: "/models"},
    "about": {"about": lambda clinic, tab: "/about"},
    "sign-in": {"sign-in": lambda clinic, tab: "/sign-in"},
    "sign-out": {},
}
CASES = [(page, name) for page, ways in PAGES.items() for name in ways]


@pytest.fixture(scope="module")
def clinic(reference, nodes, tmp_path_factory):
    made = BusyClinic(LocalService(reference, tmp_path_factory.mktemp("busy"), nodes=nodes))
    yield made
    made.store.close()


@pytest.fixture(scope="module")
def url(clinic):
    with http_server(clinic.local, require_keys=True) as address:
        yield address


def serious_faults(tab: Tab) -> dict[str, list[str]]:
    """Elements that axe finds fault with by its rule's name: those of impact serious and critical."""
    return {
        violation["id"]: [node["html"] for node in violation["nodes"]]
        for violation in Axe().run(tab.page).response["violations"]
        if violation["impact"] in ("serious", "critical")
    }


def test_every_page_is_looked_at():
    assert set(PAGES) == set(PAGE_ROLES)


@pytest.mark.parametrize(("page", "name"), CASES)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_is_light_fits_and_is_usable_by_everyone(clinic, url, browser, page, name, width):
    tab = browser.new_tab(url, width)
    tab.sign_in(clinic.key)
    path = PAGES[page][name](clinic, tab)
    # A browser that has nothing of the service yet.
    fresh = browser.new_tab(url, width, cookies=tab.cookies())
    fresh.open(path)
    fresh.load_pictures()
    expect(fresh.page.locator("h1")).to_have_count(1)
    fresh.page.evaluate("document.querySelectorAll('details').forEach((found) => { found.open = true; })")
    sent = fresh.bytes_by_url()
    assert f"{url}/static/dermray.css" in {address.partition("?")[0] for address in sent}
    assert sum(sent.values()) < MAX_PAGE_BYTES, sent
    for scheme in ("light", "dark"):
        fresh.page.emulate_media(color_scheme=scheme)
        assert serious_faults(fresh) == {}, scheme
        assert fresh.fits(), scheme
    assert fresh.problems == []
    assert fresh.page.evaluate("window.hacked") is None
    # Every field and button is within the screen, but for what scrolls by itself, and the keyboard reaches them in the
    # order of the page.
    outside = (
        "[...document.querySelectorAll('main input:not([type=hidden]), main button, main select, "
        "main td:not(.scroll td)')].filter("
        "(field) => { const box = field.getBoundingClientRect(); return box.left < 0 || box.right > innerWidth; })"
        ".map((field) => field.outerHTML)"
    )
    assert fresh.page.evaluate(outside) == []
    assert fresh.page.evaluate("[...document.querySelectorAll('[tabindex]')].every((found) => found.tabIndex < 1)")


def test_the_check_itself_would_find_a_fault(clinic, url, browser):
    tab = browser.new_tab(url)
    page = tab.sign_in(clinic.key, "/about")
    page.evaluate("document.querySelector('main').insertAdjacentHTML('beforeend', '<input><p style=\"color:red\">x')")
    page.evaluate("fetch('http://127.0.0.2:9/').catch(() => null)")
    assert "label" in serious_faults(tab)
    # Seen in one scheme only.
    page.evaluate("document.querySelector('h1').style.color = '#222'")
    assert "color-contrast" not in serious_faults(tab)
    page.emulate_media(color_scheme="dark")
    assert "color-contrast" in serious_faults(tab)
    assert any("127.0.0.2" in problem for problem in tab.problems)
    assert any("style" in problem for problem in tab.problems)
    assert HOSTILE not in page.content()
