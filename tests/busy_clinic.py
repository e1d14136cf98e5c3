"""A service with something on every page: lesions, labels, alarms, a candidate beside the champion."""

from __future__ import annotations

import re

import httpx
from starlette.testclient import TestClient

from store.api_keys import create_api_key
from store.labels import NewLabel, add_label
from store.tables import now_us
from tests.bundle_factory import blank_image, lesion_image
from tests.local_service import LocalService
from tests.model_facts import a_candidate_and_a_champion
from tests.monitored_month import a_drift_report, labelled_lesions

HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>\u202e'


class BusyClinic:
    """Lesions of three patients, one of them with a name that would like to be HTML, and one that the model missed.

    Attributes:
        key: of an approver called Ada.
    """

    def __init__(self, local: LocalService):
        self.local, self.store = local, local.log.store
        self.key = create_api_key(self.store, "Ada", "approver", "test")[1]
        client = TestClient(local.api)
        for seed in range(12):
            files = {"image": (f"{seed}.jpg", lesion_image(seed), "image/jpeg")}
            data = {"patient_id": f"patient {seed % 3}", "institution": HOSTILE, "device": f"camera {seed % 2}"}
            assert client.post("/v1/predict", files=files, data=data).status_code == 200
        assert client.post("/v1/predict", files={"image": ("0.png", blank_image(), "image/png")}).status_code == 200
        rows = [row for row in local.rows() if row["risk"] is not None]
        with self.store.writing() as connection:
            connection.exec_driver_sql("UPDATE predictions SET threshold = 2.0 WHERE id = ?", (rows[0]["id"],))
        add_label(self.store, NewLabel(rows[0]["id"], "malignant", True, "Ben", comment=HOSTILE), "Ben")
        add_label(self.store, NewLabel(rows[1]["id"], "benign", False, "Ben"), "Ben")
        alarm = {"kind": "drift", "severity": "warning", "model_version": "3", "raised_at": now_us()}
        alarm |= {"message": f"drift on 2026-11-22: {HOSTILE}", "detail": {"drifted": ["age_approx"]}}
        self.store.raise_alarm({**alarm, "dedupe_key": "drift:1", "topic": "drift:3"})
        labelled_lesions(self.store, malignant=15, benign=40, missed=2)
        for days_ago in range(30, 0, -1):
            a_drift_report(self.store, days_ago, (HOSTILE, "sex") if days_ago < 3 else ())
        a_candidate_and_a_champion(self.store, passed=False, requested_by=HOSTILE)

    def upload(self, cookies: dict[str, str], url: str, number: int) -> str:
        """Sends the form of `/` as a browser with these cookies does; returns the address of its answers."""
        with httpx.Client(base_url=url, cookies=cookies, trust_env=False) as client:
            fields = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]+)"', client.get("/").text))
            files = [("images", (HOSTILE + ".jpg", lesion_image(50 + seed), "image/jpeg")) for seed in range(number)]
            answer = client.post("/", data=fields, files=files)
        assert answer.status_code == 200, answer.text
        return f"/results/{fields['key']}?n={number}"
