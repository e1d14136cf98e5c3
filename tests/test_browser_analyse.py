"""The page / in a real browser on the real routes: from a picture to an explained answer."""

from __future__ import annotations

import dataclasses
import re

import pytest
from playwright.sync_api import Page, expect

from modeling.schema import ColumnSpec
from store.api_keys import create_api_key
from tests.browser import needs_chromium
from tests.bundle_factory import lesion_image
from tests.http_server import http_server

pytestmark = [pytest.mark.browser, needs_chromium]

HOSTILE = "<img src=x onerror=window.hacked=1>.jpg"


@pytest.fixture
def pictures(tmp_path):
    """Files of seven lesions, one of them with a name that would like to be HTML."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = [HOSTILE, *(f"lesion_{number}.jpg" for number in range(6))]
    for seed, name in enumerate(names):
        (folder / name).write_bytes(lesion_image(seed))
    return [str(folder / name) for name in names]


def send(page: Page) -> None:
    """Sends the form, and waits for the result."""
    page.locator("#send").click()
    expect(page.locator("#result-title")).to_be_visible()


@pytest.mark.parametrize("width", [1280, 390])
def test_three_actions_lead_from_a_picture_to_an_explained_answer(local, browser, pictures, width):
    with http_server(local) as url:
        tab = browser.new_tab(url, width)
        # 1: open the page, 2: choose a picture, 3: send it.
        page = tab.open("/")
        page.locator("#images").set_input_files(pictures[:1])
        expect(page.locator("#chosen img")).to_have_count(1)
        send(page)
        (row,) = local.rows()
        for words in ("× the average risk", "Next step", "What this means, and what it does not", row["id"]):
            expect(page.locator("#main")).to_contain_text(words)
        tab.load_pictures()
        # The address is the result's own: it can be kept, and loaded again.
        expect(page).to_have_url(re.compile(r"/results/page-"))
        page.goto(page.url)
        expect(page.locator("#main")).to_contain_text(row["id"])
        assert len(local.rows()) == 1 and tab.fits() and tab.problems == []


def test_the_slider_moves_the_evidence_over_the_picture(local, browser, pictures):
    with http_server(local) as url:
        tab = browser.new_tab(url)
        page = tab.open("/")
        page.locator("#images").set_input_files(pictures[1:2])
        send(page)
        slider, evidence = page.get_by_label("Evidence over the picture"), page.locator(".layers .over")
        expect(evidence).to_have_css("opacity", "0.6")
        for key, opacity in (("Home", "0"), ("End", "1")):
            slider.press(key)
            expect(evidence).to_have_css("opacity", opacity)
        assert tab.problems == []


def test_several_pictures_are_ranked_and_a_hostile_file_name_is_text(local, browser, pictures):
    with http_server(local) as url:
        tab = browser.new_tab(url)
        page = tab.open("/")
        page.locator("#images").set_input_files(pictures)
        send(page)
        shown = page.locator(".lesions tbody tr").all_inner_texts()
        rows = local.rows()
        assert len(shown) == len(rows) == 7 and len({row["patient_hmac"] for row in rows}) == 1
        # The name is shown as it is, and nothing in it ran.
        assert any(HOSTILE in line for line in shown)
        assert page.evaluate("window.hacked") is None
        with page.expect_download() as download:
            page.get_by_role("link", name="As CSV").click()
        lines = download.value.path().read_text(encoding="utf-8").splitlines()
        risks = [line.split(",")[3] for line in lines[1:]]
        assert len(risks) == 7 and [float(risk) for risk in risks if risk] == sorted(
            (row["risk"] for row in rows if row["risk"] is not None), reverse=True
        )
        assert tab.problems == []


def test_a_sample_is_analysed_with_what_is_known_of_it(local, browser):
    with http_server(local) as url:
        tab = browser.new_tab(url)
        page = tab.open("/")
        page.locator(".sample").first.click()
        send(page)
        (row,) = local.rows()
        assert row["metadata"]["age_approx"] is not None and tab.problems == []


def test_a_click_on_the_figure_chooses_the_body_site_and_the_choice_marks_the_figure(local, browser):
    model = local.service.model
    columns = model.task.columns | {"anatom_site_general": ColumnSpec(kind="categorical")}
    task = model.task.model_copy(update={"columns": columns, "site_column": "anatom_site_general"})
    local.service.use_model(dataclasses.replace(model, task=task))
    with http_server(local) as url:
        tab = browser.new_tab(url)
        page = tab.open("/")
        site = page.locator("[data-body-site]")
        page.locator(".body-figure [data-site='anterior torso']").first.click()
        expect(site).to_have_value("anterior torso")
        site.select_option("head/neck")
        marked = "[...new Set([...document.querySelectorAll('.chosen')].map((region) => region.dataset.site))]"
        assert page.evaluate(marked) == ["head/neck"] and tab.problems == []


def test_what_is_wrong_with_a_form_is_said_in_it_and_everything_that_was_entered_stays(local, browser, pictures):
    with http_server(local) as url:
        page = browser.new_tab(url).open("/")
        page.locator("#images").set_input_files(pictures[1:2])
        page.locator("[name=age_approx]").fill("500")
        page.locator("[name=patient_id]").fill("P-77")
        # Past the browser's own check, which scripts and other clients do not have.
        page.evaluate("document.getElementById('analyse').noValidate = true")
        page.locator("#send").click()
        expect(page.locator("#form-problem")).to_contain_text("age_approx")
        assert local.rows() == [] and page.evaluate("document.getElementById('images').files.length") == 1
        page.locator("[name=age_approx]").fill("50")
        send(page)
        (row,) = local.rows()
        assert row["patient_hmac"] is not None and row["metadata"]["age_approx"] == 50


def test_a_form_whose_session_is_over_says_so_and_keeps_its_pictures(local, browser, pictures):
    with http_server(local) as url:
        page = browser.new_tab(url).open("/")
        page.locator("#images").set_input_files(pictures[1:2])
        page.context.clear_cookies()
        page.locator("#send").click()
        expect(page.locator("#form-problem")).to_contain_text("load the page again")
        assert page.evaluate("document.getElementById('images').files.length") == 1 and local.rows() == []


def test_the_skip_link_moves_the_focus_and_nothing_else(local, browser, pictures):
    with http_server(local) as url:
        page = browser.new_tab(url).open("/")
        page.locator("#images").set_input_files(pictures[:1])
        page.evaluate("window.same = true")
        page.get_by_role("link", name="Skip to the content").press("Enter")
        expect(page.locator("#main")).to_be_focused()
        assert page.evaluate("window.same && document.getElementById('images').files.length") == 1
        send(page)
        page.go_back()
        expect(page.locator("#send")).to_be_visible()


def test_an_upload_works_without_javascript(local, browser, pictures):
    with http_server(local) as url:
        page = browser.new_tab(url, scripts=False).open("/")
        expect(page.locator("#drop-hint")).to_be_hidden()
        page.locator("#images").set_input_files(pictures[:1])
        send(page)
        assert len(local.rows()) == 1


def test_a_caller_signs_in_with_a_key_and_sees_no_one_else_s_results(local, browser, pictures):
    keys = {name: create_api_key(local.log.store, name, "caller", "test")[1] for name in ("Ada", "Eve")}
    with http_server(local, require_keys=True) as url:
        page = browser.new_tab(url).sign_in(keys["Ada"])
        expect(page.locator("header")).to_contain_text("Ada")
        page.locator("#images").set_input_files(pictures[:1])
        send(page)
        address, picture = page.url, page.locator(".layers img").first.evaluate("(image) => image.src")
        other = browser.new_tab(url).sign_in(keys["Eve"])
        expect(other.locator("header")).to_contain_text("Eve")
        other.goto(address)
        expect(other.locator("#main")).to_contain_text("there are none at this address")
        assert other.request.get(picture).status == 404
        assert other.evaluate("document.cookie") == ""
