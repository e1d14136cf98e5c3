"""The page /review/label-studio in a real browser: a ZIP comes down, an export goes up, with scripts and without."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import sqlalchemy as sql
from playwright.sync_api import Page, expect
from starlette.testclient import TestClient

from store.api_keys import create_api_key
from store.tables import labels
from tests.browser import Tab, needs_chromium
from tests.bundle_factory import lesion_image
from tests.http_server import http_server
from tests.label_studio import annotated
from tests.local_service import LocalService

pytestmark = [pytest.mark.browser, needs_chromium]

HOSTILE = "<img src=x onerror=window.hacked=1>"


class Clinic:
    """A service with five lesions and a reviewer, and files of what the reviewer said in Label Studio."""

    def __init__(self, local: LocalService, browser, folder: Path):
        self.local, self.browser, self.folder = local, browser, folder
        self.url = ""
        self.key = create_api_key(local.log.store, "Ada", "reviewer", "test")[1]
        for seed in range(5):
            files = {"image": (f"{seed}.jpg", lesion_image(seed), "image/jpeg")}
            assert TestClient(local.api).post("/v1/predict", files=files).status_code == 200

    def open(self, width: int = 1280, scripts: bool = True) -> Tab:
        tab = self.browser.new_tab(self.url, width, scripts=scripts)
        tab.sign_in(self.key, "/review")
        tab.page.get_by_role("link", name="Label Studio").click()
        expect(tab.page.get_by_role("heading", level=1)).to_have_text("Label Studio")
        return tab

    def download(self, page: Page, number: int) -> list[dict]:
        """Takes so many tasks along; each is there with its picture once the ZIP is unpacked."""
        page.get_by_label("Lesions 1 to 200").fill(str(number))
        with page.expect_download() as coming:
            page.get_by_role("button", name="Download ZIP").click()
        coming.value.save_as(self.folder / coming.value.suggested_filename)
        with zipfile.ZipFile(self.folder / coming.value.suggested_filename) as archive:
            archive.extractall(self.folder)
        (file,) = self.folder.glob("dermray/*/tasks.json")
        tasks = json.loads(file.read_text())
        for task in tasks:
            picture = self.folder / task["data"]["image"].removeprefix("/data/local-files/?d=")
            assert picture.read_bytes().startswith(b"\xff\xd8\xff")
        return tasks

    def send(self, page: Page, content: list[dict], button: str = "Import") -> None:
        file = self.folder / "project-1.json"
        file.write_text(json.dumps(content))
        page.get_by_label("Export").set_input_files(file)
        with page.expect_navigation():
            page.get_by_role("button", name=button).click()

    def labels(self) -> list[dict]:
        with self.local.log.store.reading() as connection:
            return [dict(row) for row in connection.execute(sql.select(labels).order_by(labels.c.id)).mappings()]


@pytest.fixture
def clinic(local, browser, tmp_path):
    folder = tmp_path / "label-studio"
    folder.mkdir()
    clinic = Clinic(local, browser, folder)
    with http_server(local, require_keys=True) as clinic.url:
        yield clinic


def figure(page: Page, name: str) -> int:
    names, numbers = (page.locator(f"#counts {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return int(dict(zip(names, numbers, strict=True))[name])


@pytest.mark.parametrize(("width", "scripts"), [(1280, True), (390, False)])
def test_tasks_go_down_and_annotations_come_back(clinic, width, scripts):
    tab = clinic.open(width, scripts)
    page = tab.page
    tasks = clinic.download(page, 3)
    assert len(tasks) == 3 and tab.fits()
    with clinic.local.log.store.writing() as connection:
        connection.exec_driver_sql("UPDATE predictions SET threshold = 2.0")
    page.get_by_label("Names of the annotators").fill("1 = Dr Weber\n2 = Ada")
    clinic.send(page, annotated(tasks), "Only check")
    expect(page.get_by_role("status")).to_contain_text("Dr Weber")
    assert figure(page, "Labels") == 3 and clinic.labels() == []
    # What was filled in is still there, but for the file.
    clinic.send(page, annotated(tasks))
    assert (figure(page, "Stored"), figure(page, "Missed cancers")) == (3, 3)
    stored = clinic.labels()
    assert {row["labeller"] for row in stored} == {"Dr Weber"}
    assert {row["prediction_id"] for row in stored} == {task["data"]["prediction_id"] for task in tasks}
    clinic.send(page, annotated(tasks))
    assert (figure(page, "Stored"), figure(page, "Already known")) == (0, 3) and clinic.labels() == stored
    assert tab.fits() and tab.problems == []


def test_a_wrong_export_is_listed_as_text_and_stores_nothing(clinic):
    tab = clinic.open(width=390)
    page = tab.page
    content = annotated(clinic.download(page, 3))
    content[0]["annotations"][0]["result"][0]["value"]["choices"] = [HOSTILE]
    content[1]["data"]["prediction_id"] = "x" * 64
    clinic.send(page, content)
    expect(page.get_by_role("alert").filter(has_text="Nothing was stored")).to_be_visible()
    lines = page.locator("#problems li").all_inner_texts()
    assert len(lines) == 2 and lines[0].startswith(f"task 11, annotation 100: label is '{HOSTILE}'")
    assert lines[1].startswith("task 12, annotation 101: prediction_id is xxx") and clinic.labels() == []
    assert tab.fits() and page.evaluate("window.hacked") is None and tab.problems == []


def test_a_number_out_of_range_is_not_sent_and_without_lesions_there_is_a_reason(clinic):
    tab = clinic.open()
    page = tab.page
    page.get_by_label("Lesions 1 to 200").fill("201")
    page.get_by_role("button", name="Download ZIP").click()
    assert page.get_by_label("Lesions 1 to 200").evaluate("field => field.validity.rangeOverflow")
    clinic.send(page, annotated(clinic.download(page, 5)))
    page.get_by_label("Of the last days").fill("7")
    with page.expect_navigation():
        page.get_by_role("button", name="Download ZIP").click()
    expect(page.get_by_role("alert").filter(has_text="no unlabelled lesion of the last 7 days")).to_be_visible()
    expect(page.get_by_label("Of the last days")).to_have_value("7")
    assert tab.problems == []
