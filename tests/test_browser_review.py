"""The page /review in a real browser on the real routes: lesions read by keyboard, without being led by the model."""

from __future__ import annotations

import pytest
import sqlalchemy as sql
from starlette.testclient import TestClient

from store.api_keys import create_api_key
from store.labels import NewLabel, add_label
from store.tables import labels
from tests.browser import chromium, needs_chromium
from tests.bundle_factory import LocalFusion, LocalScorer, lesion_image, served_bundle
from tests.http_server import http_server
from tests.local_service import LocalService

pytestmark = [pytest.mark.browser, needs_chromium]

SHOWN = "document.querySelector('[name=prediction_id]')?.value"
READY = "document.readyState === 'complete' && location.pathname === '/review'"
HOSTILE = "<script>window.hacked=1</script>"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("browser") / "bundle", version="3")


@pytest.fixture(scope="module")
def nodes(reference):
    return LocalScorer(reference), LocalFusion(reference)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as running:
        yield running


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

    def open(self, name: str = "Ada", width: int = 1280):
        tab = self.browser.new_tab()
        tab.resize(width, 900)
        tab.send("Network.clearBrowserCookies")
        tab.open(f"{self.url}/sign-in?next=/review")
        tab.type(self.keys[name], "#key")
        tab.press("Enter", 13, "\r")
        tab.wait_for(READY)
        return tab

    def labels(self) -> list[dict]:
        with self.store.reading() as connection:
            return [dict(row) for row in connection.execute(sql.select(labels).order_by(labels.c.id)).mappings()]


@pytest.fixture
def clinic(reference, nodes, browser, dermray_home, request):
    local = LocalService(reference, dermray_home, nodes=nodes)
    clinic = Clinic(local, browser, getattr(request, "param", 4))
    with http_server(local, require_keys=True) as clinic.url:
        yield clinic


def read(tab, key: str) -> str:
    """Says what the lesion is by two keys, and waits for the next one; returns the lesion's id."""
    now = tab.evaluate(SHOWN)
    tab.press(key, ord(key), key)
    tab.press("Enter", 13, "\r")
    tab.wait_for(f"{READY} && ({SHOWN} || 'none') !== '{now}'")
    return now


@pytest.mark.parametrize("clinic", [20], indirect=True)
def test_a_reviewer_reads_twenty_lesions_by_keyboard_alone(clinic):
    tab = clinic.open()
    said = {}
    for number in range(20):
        key = "12"[number % 2]
        said[read(tab, key)] = {"1": "benign", "2": "malignant"}[key]
    assert "Nothing left to read" in tab.text("#main") and tab.text("#counts").startswith("20 read")
    assert {label["prediction_id"]: label["label"] for label in clinic.labels()} == said
    assert {label["labeller"] for label in clinic.labels()} == {"Ada"} and tab.problems == []


def test_the_score_is_hidden_until_the_label_is_in(clinic):
    tab = clinic.open()
    rows = {row["id"]: row for row in clinic.local.rows()}
    html = tab.evaluate("document.documentElement.outerHTML")
    first = rows[tab.evaluate(SHOWN)]
    words = (f"{100 * first['risk']:.3g}", "The model said", "Should be seen", "Low priority")
    assert not any(word in html for word in words)
    # Nor is it to be had by asking for what is shown after the label.
    tab.open(f"{clinic.url}/review?before={first['id']}")
    assert "The model said" not in tab.text("#main")
    read(tab, "1")
    assert f"risk {100 * first['risk']:.3g}" in tab.text(".said").replace("\u00a0", " ")
    assert "<script>" in tab.text("#main") and tab.evaluate("window.hacked") is None and tab.problems == []


def test_undo_shows_the_lesion_again_and_what_is_said_then_supersedes(clinic):
    tab = clinic.open()
    first = read(tab, "1")
    tab.press("u", ord("U"), "u")
    tab.wait_for(f"{READY} && {SHOWN} === '{first}'")
    assert read(tab, "2") == first
    before, after = sorted(clinic.labels(), key=lambda label: label["id"])
    assert (before["label"], after["label"], after["supersedes"]) == ("benign", "malignant", before["id"])


def test_a_lesion_is_put_off_and_comes_last(clinic):
    tab = clinic.open()
    first = tab.evaluate(SHOWN)
    tab.press("s", ord("S"), "s")
    tab.wait_for(f"{READY} && {SHOWN} !== '{first}'")
    others = [read(tab, "1") for _ in range(3)]
    assert first not in others and tab.evaluate(SHOWN) == first and len(clinic.labels()) == 3


def test_a_comment_holds_the_keys_as_text_and_the_confidence_is_kept(clinic):
    tab = clinic.open(width=390)
    tab.click(".classes-choice label:nth-of-type(2)")
    tab.click("[name=confidence][value=probable]")
    tab.type("us1 <b>", "#comment")
    shown = tab.evaluate(SHOWN)
    tab.click("button[value=label]")
    tab.wait_for(f"{READY} && {SHOWN} !== '{shown}'")
    (label,) = clinic.labels()
    assert (label["label"], label["confidence"], label["comment"]) == ("malignant", 0.8, "us1 <b>")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_what_one_reader_calls_a_missed_cancer_a_second_reader_sees_first_and_unled(clinic):
    """The second reader is told that it is a second reading, and not what the first one or the model said."""
    missed = min((row for row in clinic.local.rows()), key=lambda row: row["risk"])
    with clinic.store.writing() as connection:
        connection.exec_driver_sql("UPDATE predictions SET threshold = 2.0")
    assert add_label(clinic.store, NewLabel(missed["id"], "malignant", True, "Ben"), "Ben").alarm is not None
    tab = clinic.open("Ada")
    text = tab.text("#main")
    assert tab.evaluate(SHOWN) == missed["id"] and "Second reading" in text
    assert "Ben" not in text and "missed" not in text
    read(tab, "1")
    assert "Another reader sees it differently" in tab.text(".said")
    clinic.keys["Cleo"] = create_api_key(clinic.store, "Cleo", "reviewer", "test")[1]
    third = clinic.open("Cleo")
    third.wait_for(f"{SHOWN} === '{missed['id']}'")
    assert "yours settles it" in third.text("#main")
    read(third, "2")
    assert [label["adjudication"] for label in clinic.labels()] == [False, False, True]


def test_a_zoomed_picture_and_the_patient_s_other_lesions_are_shown(clinic):
    tab = clinic.open()
    tab.wait_for("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert tab.evaluate("document.querySelectorAll('.thumbs img').length") == 1
    width = "document.querySelector('#zoom img').getBoundingClientRect().width"
    small = tab.evaluate(width)
    tab.press("z", ord("Z"), "z")
    assert tab.evaluate(width) == pytest.approx(2.5 * small, rel=0.05)
    tab.press("z", ord("Z"), "z")
    assert tab.evaluate(width) == pytest.approx(small)
