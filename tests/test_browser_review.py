"""The page /review in a real browser on the real routes: lesions read by keyboard, without being led by the model."""

from __future__ import annotations

import pytest
import sqlalchemy as sql
from playwright.sync_api import Page, expect
from starlette.testclient import TestClient

from store.api_keys import create_api_key
from store.labels import NewLabel, add_label
from store.tables import labels
from tests.browser import Tab, needs_chromium
from tests.bundle_factory import lesion_image
from tests.http_server import http_server
from tests.local_service import LocalService

pytestmark = [pytest.mark.browser, needs_chromium]

HOSTILE = "<script>window.hacked=1</script>"


class Clinic:
    """A service with lesions of a patient or two, a reviewer's key, and a browser signed in with it."""

    def __init__(self, local: LocalService, browser, number: int):
        self.local = local
        self.store = local.log.store
        self.browser = browser
        self.url = ""
        self.keys = {name: create_api_key(self.store, name, "reviewer", "test")[1] for name in ("Ada", "Ben")}
        for seed in range(number):
            files = {"image": (f"{seed}.jpg", lesion_image(seed), "image/jpeg")}
            data = {"patient_id": f"patient {seed % 2}", "institution": HOSTILE}
            assert TestClient(local.api).post("/v1/predict", files=files, data=data).status_code == 200

    def open(self, name: str = "Ada", width: int = 1280) -> Tab:
        tab = self.browser.new_tab(self.url, width)
        tab.sign_in(self.keys[name], "/review")
        return tab

    def labels(self) -> list[dict]:
        with self.store.reading() as connection:
            return [dict(row) for row in connection.execute(sql.select(labels).order_by(labels.c.id)).mappings()]


@pytest.fixture
def clinic(local, browser, request):
    clinic = Clinic(local, browser, getattr(request, "param", 4))
    with http_server(local, require_keys=True) as clinic.url:
        yield clinic


def shown(page: Page) -> str:
    """Id of the lesion to be read."""
    return page.locator("[name=prediction_id]").input_value()


def press(page: Page, key: str) -> None:
    """Presses a key that leads to another page, and waits for that."""
    with page.expect_navigation():
        page.keyboard.press(key)


def read(page: Page, key: str) -> str:
    """Says what the lesion is by two keys, and waits for the next one; returns the lesion's id."""
    lesion = shown(page)
    page.keyboard.press(key)
    press(page, "Enter")
    return lesion


@pytest.mark.parametrize("clinic", [20], indirect=True)
def test_a_reviewer_reads_twenty_lesions_by_keyboard_alone(clinic):
    tab = clinic.open()
    said = {}
    for number in range(20):
        key = "12"[number % 2]
        said[read(tab.page, key)] = {"1": "benign", "2": "malignant"}[key]
    expect(tab.page.locator("#main")).to_contain_text("Nothing left to read")
    expect(tab.page.locator("#counts")).to_contain_text("20 read")
    assert {label["prediction_id"]: label["label"] for label in clinic.labels()} == said
    assert {label["labeller"] for label in clinic.labels()} == {"Ada"} and tab.problems == []


def test_the_score_is_hidden_until_the_label_is_in(clinic):
    tab = clinic.open()
    page, rows = tab.page, {row["id"]: row for row in clinic.local.rows()}
    first = rows[shown(page)]
    words = (f"{100 * first['risk']:.3g}", "The model said", "Should be seen", "Low priority")
    assert not any(word in page.content() for word in words)
    # Nor is it to be had by asking for what is shown after the label.
    tab.open(f"/review?before={first['id']}")
    expect(page.locator("#main")).not_to_contain_text("The model said")
    read(page, "1")
    expect(page.locator(".said")).to_contain_text(f"risk {100 * first['risk']:.3g}")
    expect(page.locator("#main")).to_contain_text("<script>")
    assert page.evaluate("window.hacked") is None and tab.problems == []


def test_undo_shows_the_lesion_again_and_what_is_said_then_supersedes(clinic):
    page = clinic.open().page
    first = read(page, "1")
    press(page, "u")
    assert read(page, "2") == first
    before, after = sorted(clinic.labels(), key=lambda label: label["id"])
    assert (before["label"], after["label"], after["supersedes"]) == ("benign", "malignant", before["id"])


def test_a_lesion_is_put_off_and_comes_last(clinic):
    page = clinic.open().page
    first = shown(page)
    press(page, "s")
    others = [read(page, "1") for _ in range(3)]
    assert first not in others and shown(page) == first and len(clinic.labels()) == 3


def test_a_comment_holds_the_keys_as_text_and_the_confidence_is_kept(clinic):
    tab = clinic.open(width=390)
    tab.page.get_by_role("radio", name="malignant").check()
    tab.page.get_by_role("radio", name="probable").check()
    tab.page.get_by_label("Comment").press_sequentially("us1 <b>")
    with tab.page.expect_navigation():
        tab.page.get_by_role("button", name="Save").click()
    (label,) = clinic.labels()
    assert (label["label"], label["confidence"], label["comment"]) == ("malignant", 0.8, "us1 <b>")
    assert tab.fits()


def test_what_one_reader_calls_a_missed_cancer_a_second_reader_sees_first_and_unled(clinic):
    """The second reader is told that it is a second reading, and not what the first one or the model said."""
    missed = min((row for row in clinic.local.rows()), key=lambda row: row["risk"])
    with clinic.store.writing() as connection:
        connection.exec_driver_sql("UPDATE predictions SET threshold = 2.0")
    assert add_label(clinic.store, NewLabel(missed["id"], "malignant", True, "Ben"), "Ben").alarm is not None
    page = clinic.open("Ada").page
    text = page.locator("#main").inner_text()
    assert shown(page) == missed["id"] and "Second reading" in text
    assert "Ben" not in text and "missed" not in text
    read(page, "1")
    expect(page.locator(".said")).to_contain_text("Another reader sees it differently")
    clinic.keys["Cleo"] = create_api_key(clinic.store, "Cleo", "reviewer", "test")[1]
    third = _until_known(clinic, "Cleo")
    assert shown(third) == missed["id"]
    expect(third.locator("#main")).to_contain_text("yours settles it")
    read(third, "2")
    assert [label["adjudication"] for label in clinic.labels()] == [False, False, True]


def _until_known(clinic: Clinic, name: str) -> Page:
    """Signs in with a key that was made just now, which the service reads within a moment."""
    page = clinic.browser.new_tab(clinic.url).open("/sign-in?next=/review")
    while page.url != f"{clinic.url}/review":
        page.get_by_label("API key").fill(clinic.keys[name])
        with page.expect_navigation():
            page.get_by_role("button", name="Sign in").click()
    return page


def test_a_zoomed_picture_and_the_patient_s_other_lesions_are_shown(clinic):
    tab = clinic.open()
    tab.load_pictures()
    expect(tab.page.locator(".thumbs img")).to_have_count(1)
    small = tab.width_of("#zoom img")
    tab.page.keyboard.press("z")
    assert tab.width_of("#zoom img") == pytest.approx(2.5 * small, rel=0.05)
    tab.page.keyboard.press("z")
    assert tab.width_of("#zoom img") == pytest.approx(small)
