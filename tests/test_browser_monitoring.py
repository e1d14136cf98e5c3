"""The page /monitoring in a real browser on the real routes: what an operator sees and does there, while the page
renews itself."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from store.api_keys import create_api_key, revoke_api_key
from store.errors import StoreUnavailableError
from store.retraining import list_retrainings
from tests.browser import Tab, needs_chromium
from tests.busy_clinic import HOSTILE
from tests.http_server import http_server
from tests.monitored_month import a_day, a_drift_report, an_alarm

pytestmark = [pytest.mark.browser, needs_chromium]

PATH = "/monitoring"
HALF_A_MINUTE = 31_000


class Monitored:
    """A service that asks for keys, a key of each role, and a browser to look at it."""

    def __init__(self, local, browser):
        self.store, self.browser, self.url = local.log.store, browser, ""
        roles = {"Ada": "reviewer", "Grace": "approver"}
        self.keys = {name: create_api_key(self.store, name, role, "test") for name, role in roles.items()}

    def open(self, name: str = "Ada", width: int = 1280, path: str = PATH, **options) -> Tab:
        tab = self.browser.new_tab(self.url, width, **options)
        tab.page.clock.install()
        tab.sign_in(self.keys[name][1], PATH)
        if path != PATH:
            tab.open(path)
        return tab

    def stored(self, alarm_id: int) -> dict:
        return next(row for row in self.store.alarms() if row["id"] == alarm_id)


@pytest.fixture
def monitored(local, browser):
    service = Monitored(local, browser)
    with http_server(local, require_keys=True) as service.url:
        yield service


def renew(tab: Tab) -> None:
    """Half a minute passes: the page asks for its parts, and has them."""
    asked: list[str] = []
    tab.page.on("requestfinished", lambda request: asked.append(request.url.partition("?")[0].rpartition("/")[2]))
    tab.page.clock.run_for(HALF_A_MINUTE)
    parts = {"now", "alarms", "figures", "retraining"}
    while not parts <= set(asked):
        tab.page.wait_for_event("requestfinished")
    # Until what came has been put in and settled.
    tab.page.clock.run_for(1_000)


def test_an_alarm_is_acknowledged_by_keyboard_alone(monitored):
    alarm = an_alarm(monitored.store, 1, message=HOSTILE)
    tab = monitored.open()
    page = tab.page
    expect(page.locator(f"#alarm-{alarm} .message p").first).to_have_text(HOSTILE)
    field = page.get_by_label(f"Comment on alarm {alarm}")
    for _ in range(60):
        page.keyboard.press("Tab")
        if field.evaluate("field => field === document.activeElement"):
            break
    page.keyboard.type("seen, <b>calling</b> the clinic")
    with page.expect_navigation():
        page.keyboard.press("Enter")
    expect(page.locator(".said")).to_have_text(f"Alarm {alarm} is acknowledged.")
    expect(page.locator("#no-alarms")).to_be_visible()
    assert monitored.stored(alarm)["acknowledged_by"] == "Ada"
    assert monitored.stored(alarm)["detail"]["acknowledgement"] == "seen, <b>calling</b> the clinic"
    page.locator("#show-all").click()
    expect(page.locator(f"#alarm-{alarm} .seen")).to_contain_text("seen, <b>calling</b> the clinic")
    assert page.evaluate("window.hacked") is None and tab.problems == []


def test_the_page_renews_itself_and_leaves_what_a_person_is_doing(monitored):
    first = an_alarm(monitored.store, 1)
    a_day(monitored.store)
    tab = monitored.open()
    page = tab.page
    page.locator("#traffic-table summary").click()
    field = page.get_by_label(f"Comment on alarm {first}")
    field.fill("half a sen")
    second = an_alarm(monitored.store, 2, severity="critical")
    renew(tab)
    # What is wrong is told, in the title and to a screen reader too; the list waits for who is writing.
    expect(page.locator("#now-title")).to_have_text("Something is wrong, and needs someone now.")
    expect(page.locator("#announcer")).to_contain_text("1 critical alarm is open")
    expect(page).to_have_title("(2) Monitoring – dermray")
    expect(page.locator(f"#alarm-{second}")).to_have_count(0)
    expect(field).to_have_value("half a sen")
    expect(field).to_be_focused()
    expect(page.locator("#traffic-table table")).to_be_visible()
    field.fill("")
    page.locator("h1").click()
    renew(tab)
    expect(page.locator(f"#alarm-{second}")).to_have_count(1)
    expect(page.locator("#traffic-table table")).to_be_visible()
    assert tab.problems == []


def test_an_outage_is_told_with_its_begin_and_what_was_shown_stays(monitored, monkeypatch):
    alarm = an_alarm(monitored.store, 1)
    tab = monitored.open()
    page = tab.page

    def down(*_):
        raise StoreUnavailableError("the database is away")

    with monkeypatch.context() as patched:
        patched.setattr("serve.monitoring_data.alarms_page", down)
        renew(tab)
        expect(page.locator("#stale")).to_contain_text("What is below may be older than")
        expect(page.locator(f"#alarm-{alarm}")).to_have_count(1)
    renew(tab)
    expect(page.locator("#stale")).to_be_hidden()
    page.context.set_offline(True)
    page.clock.run_for(HALF_A_MINUTE)
    expect(page.locator("#stale")).to_contain_text("The service does not answer.")
    page.context.set_offline(False)
    renew(tab)
    expect(page.locator("#stale")).to_be_hidden()


def test_a_session_that_is_over_is_told_and_puts_no_sign_in_page_into_the_page(monitored):
    alarm = an_alarm(monitored.store, 1)
    tab = monitored.open()
    page = tab.page
    revoke_api_key(monitored.store, monitored.keys["Ada"][0].id, "test")
    # The service notices within the time in which it reads its keys again.
    while page.request.get(f"{monitored.url}{PATH}", max_redirects=0).status != 303:
        pass
    page.clock.run_for(HALF_A_MINUTE)
    expect(page.locator("#stale")).to_contain_text("The session is over: reload the page to sign in.")
    expect(page.locator(f"#alarm-{alarm}")).to_have_count(1)
    expect(page.get_by_label("API key")).to_have_count(0)


def test_without_scripts_everything_but_the_renewal_works(monitored):
    alarm = an_alarm(monitored.store, 1)
    a_day(monitored.store)
    tab = monitored.browser.new_tab(monitored.url, scripts=False)
    page = tab.sign_in(monitored.keys["Grace"][1], PATH)
    page.get_by_label(f"Comment on alarm {alarm}").fill("seen")
    page.get_by_role("button", name=f"Acknowledge alarm {alarm}").click()
    expect(page.locator(".said")).to_contain_text("is acknowledged")
    page.get_by_role("link", name="3 days").click()
    expect(page.locator("#hours-72")).to_have_attribute("aria-current", "true")
    page.get_by_label("Ask for a training: why?").fill("new camera")
    page.get_by_role("button", name="Ask for a training").click()
    expect(page.locator("#retraining .said")).to_contain_text("is requested")
    assert [row["reason"] for row in list_retrainings(monitored.store, None, 5)] == ["new camera"]
    page.get_by_role("link", name="Refresh").click()
    expect(page.locator("#hours-72")).to_have_attribute("aria-current", "true")


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_long_things_fit_the_screen(monitored, width, dark):
    a_day(monitored.store)
    for days_ago in range(30, 0, -1):
        a_drift_report(monitored.store, days_ago, ("z" * 200,), report="/srv/" + "y" * 300)
    an_alarm(monitored.store, 1, message="x" * 3000, topic="y" * 200, detail={"drifted": ["z" * 500]})
    tab = monitored.open("Grace", width, dark=dark)
    tab.page.evaluate("document.querySelectorAll('details').forEach((found) => { found.open = true; })")
    assert tab.fits() and tab.problems == []
    for name in ("#traffic svg", "#drift svg"):
        assert tab.width_of(f"{name} >> nth=0") <= width
