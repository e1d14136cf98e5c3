"""What people do on the pages of the demo's service, from a picture to an acknowledged alarm and from a candidate to a
new model and back, in a real browser on real nodes."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import yaml
from playwright.sync_api import expect

from local.cluster import LocalCluster
from local.jobs import REPO_ROOT, run_job_on
from local.traffic import read_lesions
from modeling.registry import CHAMPION, Registry
from serve.client import DermrayClient
from store.candidates import record_candidate
from store.database import open_store
from tests.browser import Chromium, Tab

LESIONS = 12


def from_a_picture_to_an_acknowledged_alarm(browser: Chromium, url: str, home: Path, width: int, first: int) -> None:
    """Upload, result, review, label, alarm, acknowledge.

    Args:
        first: the lesion of the ordinary day to begin with, so that each time others are sent.
    """
    tab = browser.new_tab(url, width)
    folder = home / "traffic" / "ordinary"
    day = read_lesions(folder / "train-image.hdf5", folder / "train-metadata.csv", set())
    pictures = [
        {"name": f"lesion {number}.jpg", "mimeType": "image/jpeg", "buffer": lesion.image}
        for number, lesion in enumerate(itertools.islice(day, first, first + LESIONS))
    ]
    page = tab.open("/")
    page.locator("#images").set_input_files(pictures)
    # Small moles of a child: the model lets some of them pass.
    page.locator("[name=age_approx]").fill("10")
    page.locator("[name=clin_size_long_diam_mm]").fill("1.2")
    page.locator("#send").click()
    expect(page.get_by_role("heading", name=f"{LESIONS} lesions, highest risk first")).to_be_visible()
    with DermrayClient(url, trust_env=False) as client:
        mine = list(itertools.islice(client.predictions(limit=LESIONS), LESIONS))
        passed = [row for row in mine if row.risk is not None and row.risk < row.threshold]
        missed = min(passed, key=lambda row: row.risk)
        tab.open(f"/review?again={missed.prediction_id}")
        page.get_by_role("radio", name="malignant").check()
        with page.expect_navigation():
            page.get_by_role("button", name="Save").click()
        expect(page.locator(".said")).to_contain_text("it missed this")
        tab.open("/monitoring")
        alarm = page.locator("#alarms tr", has_text=missed.prediction_id)
        expect(alarm).to_contain_text("critical")
        alarm.get_by_placeholder("Comment").fill("patient was called in")
        with page.expect_navigation():
            page.keyboard.press("Enter")
        expect(page.locator("#alarms")).to_contain_text("is acknowledged")
        (stored,) = [
            row for row in client.alarms(kind="missed_cancer") if row.detail["prediction_id"] == missed.prediction_id
        ]
    assert stored.acknowledged_by == "anonymous" and stored.detail["acknowledgement"] == "patient was called in"
    assert tab.fits() and tab.problems == []


def from_a_candidate_to_a_new_model_and_back(
    browser: Chromium, url: str, home: Path, cluster: LocalCluster, widths: tuple[int, int]
) -> None:
    """Approve, the new version answers; go back, the old one does. The candidate is the champion's bundle once more."""
    registry = Registry(f"sqlite:///{home}/mlflow.db", "dermray", str(home / "mlflow-artifacts"))
    champion = registry.resolve(CHAMPION)
    (bundle,) = (home / "bundles").iterdir()
    found = registry.log_candidate(bundle, "again", {}, {})
    store = open_store(f"sqlite:///{home}/store.db")
    record_candidate(store, found.version, found.digest, {}, requested_by="Dr Weber")
    store.close()
    deploy = home / "deploy.json"
    deploy.write_text(json.dumps({"port": cluster.http_port}))
    promote = home / "promote.json"
    rules = yaml.safe_load((REPO_ROOT / "configs" / "demo" / "promote_model.yaml").read_text(encoding="utf-8"))
    promote.write_text(json.dumps(rules | {"deploy_config": str(deploy)}))

    def apply(name: str) -> dict[str, Any]:
        flags, environment = ["--promote-config", str(promote)], cluster.client_environment()
        return run_job_on(environment, home, "apply_decisions", flags, name, show=lambda _: None)

    tab = browser.new_tab(url, widths[0])
    page = tab.open("/models")
    candidate = page.get_by_role("article", name=f"Candidate: version {found.version}")
    candidate.get_by_label("Why?").fill("sees the same as before")
    with page.expect_navigation():
        candidate.get_by_role("button", name="Approve").click()
    expect(candidate).to_contain_text("anonymous approved it")
    outcome = apply("approved")
    assert [row["champion"] for row in outcome["done"]] == [found.version], outcome
    assert _answering(tab) == found.version
    other = browser.new_tab(url, widths[1])
    page = other.open("/models")
    expect(page.locator("#main")).to_contain_text(f"Version {found.version} answers, the champion since")
    page.get_by_label(re.compile("What is wrong")).fill("misses on site 4")
    with page.expect_navigation():
        page.get_by_role("button", name=f"Go back to version {champion.version}").click()
    expect(page.locator("[role=status]")).to_contain_text("misses on site 4")
    assert [row["champion"] for row in apply("back")["done"]] == [champion.version]
    assert _answering(other) == champion.version
    page = other.open("/models")
    expect(page.locator("#main")).to_contain_text(f"Version {champion.version} answers, the champion since")
    for shown in (tab, other):
        assert shown.fits() and shown.problems == []


def _answering(tab: Tab) -> str:
    """The version that a sample's result is from."""
    page = tab.open("/")
    page.locator(".sample").first.click()
    page.locator("#send").click()
    expect(page.locator("#result-title")).to_be_visible()
    found = re.search(r"Model version (\S+);", page.locator("#main").inner_text())
    assert found is not None
    return found[1]
