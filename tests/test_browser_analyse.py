"""The page / in a real browser on the real routes: from a picture to an explained answer."""

from __future__ import annotations

import dataclasses
import json

import pytest

from modeling.schema import ColumnSpec
from store.api_keys import create_api_key
from tests.browser import chromium, needs_chromium
from tests.bundle_factory import LocalFusion, LocalScorer, lesion_image, served_bundle
from tests.http_server import http_server
from tests.local_service import LocalService

pytestmark = [pytest.mark.browser, needs_chromium]

RESULT = "!!document.getElementById('result-title')"
HOSTILE = "<img src=x onerror=window.hacked=1>.jpg"


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


@pytest.fixture
def local(reference, nodes, dermray_home):
    return LocalService(reference, dermray_home, nodes=nodes)


@pytest.fixture
def pictures(tmp_path):
    """Files of seven lesions, one of them with a name that would like to be HTML."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = [HOSTILE, *(f"lesion_{number}.jpg" for number in range(6))]
    for seed, name in enumerate(names):
        (folder / name).write_bytes(lesion_image(seed))
    return [str(folder / name) for name in names]


def choose(tab, files: list[str]) -> None:
    """Puts files into the page's file field, as its dialog does."""
    root = tab.send("DOM.getDocument")["root"]["nodeId"]
    field = tab.send("DOM.querySelector", nodeId=root, selector="#images")["nodeId"]
    tab.send("DOM.setFileInputFiles", nodeId=field, files=files)


def loaded(tab) -> list[str]:
    """Addresses of all that the page has loaded."""
    return tab.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")


@pytest.mark.parametrize("width", [1280, 390])
def test_three_actions_lead_from_a_picture_to_an_explained_answer(local, browser, pictures, width):
    with http_server(local) as url:
        tab = browser.new_tab()
        tab.resize(width, 900)
        # 1: open the page, 2: choose a picture, 3: send it.
        tab.open(f"{url}/")
        choose(tab, pictures[:1])
        tab.wait_for("document.querySelectorAll('#chosen img').length === 1")
        tab.click("#send")
        tab.wait_for(RESULT)
        (row,) = local.rows()
        text = tab.text("#main")
        for words in ("× the average risk", "Next step", "What this means, and what it does not", row["id"]):
            assert words in text
        tab.wait_for("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
        # The address is the result's own: it can be kept, and loaded again.
        address = tab.evaluate("location.href")
        assert address.startswith(f"{url}/results/page-")
        tab.open(address)
        assert row["id"] in tab.text("#main") and len(local.rows()) == 1
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert all(name.startswith((url, "blob:")) for name in loaded(tab)) and tab.problems == []


def test_the_slider_moves_the_evidence_over_the_picture(local, browser, pictures):
    with http_server(local) as url:
        tab = browser.new_tab()
        tab.open(f"{url}/")
        choose(tab, pictures[1:2])
        tab.click("#send")
        tab.wait_for(RESULT)
        opacity = "getComputedStyle(document.querySelector('.layers .over')).opacity"
        assert float(tab.evaluate(opacity)) == pytest.approx(0.6)
        tab.evaluate("document.getElementById('opacity').focus()")
        tab.press("Home", 36)
        assert float(tab.evaluate(opacity)) == 0
        tab.press("End", 35)
        assert float(tab.evaluate(opacity)) == 1
        assert tab.problems == []


def test_several_pictures_are_ranked_and_a_hostile_file_name_is_text(local, browser, pictures):
    with http_server(local) as url:
        tab = browser.new_tab()
        tab.open(f"{url}/")
        choose(tab, pictures)
        tab.click("#send")
        tab.wait_for(RESULT)
        shown = tab.evaluate("[...document.querySelectorAll('.lesions tbody tr')].map((row) => row.innerText)")
        rows = local.rows()
        assert len(shown) == len(rows) == 7 and len({row["patient_hmac"] for row in rows}) == 1
        # The name is shown as it is, and nothing in it ran.
        assert any(HOSTILE in line for line in shown)
        assert tab.evaluate("window.hacked") is None
        table = tab.evaluate("fetch(document.querySelector('a[download]').href).then((answer) => answer.text())")
        risks = [line.split(",")[3] for line in table.splitlines()[1:]]
        assert len(risks) == 7 and [float(risk) for risk in risks if risk] == sorted(
            (row["risk"] for row in rows if row["risk"] is not None), reverse=True
        )
        assert tab.problems == []


def test_a_sample_is_analysed_with_what_is_known_of_it(local, browser):
    with http_server(local) as url:
        tab = browser.new_tab()
        tab.open(f"{url}/")
        tab.click(".sample:nth-of-type(1)")
        tab.click("#send")
        tab.wait_for(RESULT)
        (row,) = local.rows()
        assert row["metadata"]["age_approx"] is not None and tab.problems == []


def test_a_click_on_the_figure_chooses_the_body_site_and_the_choice_marks_the_figure(local, browser):
    model = local.service.model
    columns = model.task.columns | {"anatom_site_general": ColumnSpec(kind="categorical")}
    task = model.task.model_copy(update={"columns": columns, "site_column": "anatom_site_general"})
    local.service.use_model(dataclasses.replace(model, task=task))
    with http_server(local) as url:
        tab = browser.new_tab()
        tab.resize(1280, 900)
        tab.open(f"{url}/")
        site = "document.querySelector('[data-body-site]')"
        tab.click(".body-figure [data-site='anterior torso']")
        assert tab.evaluate(f"{site}.value") == "anterior torso"
        tab.evaluate(f"({site}.value = 'head/neck', {site}.dispatchEvent(new Event('change')))")
        marked = "[...new Set([...document.querySelectorAll('.chosen')].map((region) => region.dataset.site))]"
        assert tab.evaluate(marked) == ["head/neck"] and tab.problems == []


def test_what_is_wrong_with_a_form_is_said_in_it_and_everything_that_was_entered_stays(local, browser, pictures):
    with http_server(local) as url:
        tab = browser.new_tab()
        tab.open(f"{url}/")
        choose(tab, pictures[1:2])
        tab.type("500", "[name=age_approx]")
        tab.type("P-77", "[name=patient_id]")
        # Past the browser's own check, which scripts and other clients do not have.
        tab.evaluate("document.getElementById('analyse').noValidate = true")
        tab.click("#send")
        tab.wait_for("document.getElementById('form-problem').innerText.includes('age_approx')")
        assert local.rows() == [] and tab.evaluate("document.getElementById('images').files.length") == 1
        tab.evaluate("document.querySelector('[name=age_approx]').value = '50'")
        tab.click("#send")
        tab.wait_for(RESULT)
        (row,) = local.rows()
        assert row["patient_hmac"] is not None and row["metadata"]["age_approx"] == 50


def test_a_form_whose_session_is_over_says_so_and_keeps_its_pictures(local, browser, pictures):
    with http_server(local) as url:
        tab = browser.new_tab()
        tab.open(f"{url}/")
        choose(tab, pictures[1:2])
        tab.send("Network.clearBrowserCookies")
        tab.click("#send")
        tab.wait_for("document.getElementById('form-problem').innerText.includes('load the page again')")
        assert tab.evaluate("document.getElementById('images').files.length") == 1 and local.rows() == []


def test_the_skip_link_moves_the_focus_and_nothing_else(local, browser, pictures):
    with http_server(local) as url:
        tab = browser.new_tab()
        tab.open(f"{url}/")
        choose(tab, pictures[:1])
        tab.evaluate("(window.same = true, document.querySelector('.skip').focus())")
        tab.press("Enter", 13, "\r")
        tab.wait_for("location.hash === '#main' && document.activeElement.id === 'main'")
        assert tab.evaluate("window.same && document.getElementById('images').files.length") == 1
        tab.evaluate("document.getElementById('send').click()")
        tab.wait_for(RESULT)
        tab.evaluate("history.back()")
        tab.wait_for("!!document.getElementById('send')")


def test_an_upload_works_without_javascript(local, browser, pictures):
    with http_server(local) as url:
        tab = browser.new_tab()
        tab.open(f"{url}/")
        choose(tab, pictures[:1])
        tab.send("Emulation.setScriptExecutionDisabled", value=True)
        tab.send("Page.reload")
        tab.wait_for("document.readyState === 'complete' && document.getElementById('drop-hint')?.hidden")
        choose(tab, pictures[:1])
        tab.click("#send")
        tab.wait_for(RESULT)
        assert len(local.rows()) == 1


def test_a_caller_signs_in_with_a_key_and_sees_no_one_else_s_results(local, browser, pictures):
    keys = {name: create_api_key(local.log.store, name, "caller", "test")[1] for name in ("Ada", "Eve")}
    with http_server(local, require_keys=True) as url:
        address = ""
        for name, key in keys.items():
            tab = browser.new_tab()
            tab.send("Network.clearBrowserCookies")
            tab.open(f"{url}/sign-in")
            tab.type(key, "#key")
            tab.press("Enter", 13, "\r")
            tab.wait_for("location.pathname === '/' && document.readyState === 'complete'")
            assert name in tab.text("header")
            if not address:
                choose(tab, pictures[:1])
                tab.click("#send")
                tab.wait_for(RESULT)
                address = tab.evaluate("location.href")
                picture = tab.evaluate("document.querySelector('.layers img').src")
            else:
                tab.open(address)
                assert "there are none at this address" in tab.text("#main")
                assert tab.evaluate(f"fetch({json.dumps(picture)}).then((answer) => answer.status)") == 404
        assert tab.evaluate("document.cookie") == ""
