"""docs/http_api.md does what it says: its commands run in order, and what it shows is what the service answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import cv2
import numpy as np
import pytest

from monitoring.prediction_log import PredictionRecord
from serve.client import DermrayClient
from serve.ingress import build_api
from serve.settings import ModelReference, UploadLimits
from store.api_keys import ROLES, create_api_key
from store.candidates import record_candidate
from tests.bundle_factory import backend, lesion_image, lesion_rule
from tests.house import REPO_ROOT
from tests.http_server import http_server
from tests.local_service import LocalService
from tests.tiny_bundle import tiny_bundle

PAGE = (REPO_ROOT / "docs" / "http_api.md").read_text(encoding="utf-8")
URL = "http://127.0.0.1:8000"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SHELL = [text for kind, text in BLOCKS if kind == "sh"]


@dataclass
class Place:
    """A running service, a folder with the page's pictures, and the environment that it expects."""

    local: LocalService
    url: str
    folder: str
    environment: dict[str, str]

    def run(self, *command):
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )


@pytest.fixture
def place(tmp_path, dermray_home):
    bundle = tiny_bundle(
        tmp_path / "bundle", contexts=["image_only", "none", "patient"], abstention=lesion_rule(), synthetic=True
    )
    reference = ModelReference(bundle_uri=str(tmp_path / "bundle"), sha256=bundle.digest, version="7")
    local = LocalService(reference, dermray_home)
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "lesion.jpg").write_bytes(lesion_image(2001))
    (folder / "second.jpg").write_bytes(lesion_image(2002))
    blurred = cv2.imencode(".jpg", np.full((48, 48, 3), (120, 140, 180), np.uint8))[1]
    (folder / "blurred.jpg").write_bytes(blurred.tobytes())
    names = {"caller": "clinic"}
    keys = {role: create_api_key(local.log.store, names.get(role, role), role, "admin")[1] for role in ROLES}
    for version, digest in (("8", "a" * 64), ("9", "b" * 64)):
        record_candidate(local.log.store, version, digest, {"none": {"auc": {"value": 0.91}}})
    for version, previous in (("6", None), ("7", "6")):
        local.log.store.record_approval(version, "Dr Adams", "", "promote", {"previous": previous})
    missed = PredictionRecord(id="missed", model_version="7", context="none", risk=0.01, threshold=0.05)
    local.log.write([missed], {})
    with http_server(local, require_keys=True) as url:
        with DermrayClient(url, keys["reviewer"], trust_env=False) as client:
            client.label("missed", "malignant")
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPO_ROOT),
            "no_proxy": "127.0.0.1",
            "DERMRAY_API_KEY": keys["caller"],
            **{role.upper(): key for role, key in keys.items()},
        }
        yield Place(local, url, str(folder), environment)


def values_of(text):
    """The JSON values that follow each other in a text."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while text[at:].strip():
        at += len(text[at:]) - len(text[at:].lstrip())
        value, at = decoder.raw_decode(text, at)
        found.append(value)
    return found


def differences(shown, real, where="answer"):
    """Where an answer is not of the shape that the page shows: names, kinds, and what is null."""
    if isinstance(shown, dict) and isinstance(real, dict):
        missing = [f"{where}.{name} is not in the answer" for name in shown if name not in real]
        inner = [differences(shown[name], real[name], f"{where}.{name}") for name in shown if name in real]
        return missing + sum(inner, [])
    if isinstance(shown, list) and isinstance(real, list):
        short = [f"{where} has {len(real)} items"] if len(real) < len(shown) else []
        pairs = zip(shown, real, strict=False)
        return short + sum((differences(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(pairs)), [])
    number = (int, float)
    same = type(shown) is type(real) or (type(shown) in number and type(real) in number)
    return [] if same else [f"{where} is {real!r}; the page shows {shown!r}"]


def answer_of(place, shell):
    """The one answer that a block of commands printed."""
    with open(f"{place.folder}/output_{BLOCKS.index(('sh', shell))}", encoding="utf-8") as file:
        return json.load(file)


def test_a_wrong_answer_on_the_page_would_be_seen():
    real = {"risk": 0.1, "items": [{"id": 1}], "error": None}
    assert differences({"risk": 0.7, "items": [{"id": 9}]}, real) == []
    for wrong in ({"risk": None}, {"items": [{"name": 1}]}, {"items": [{}, {}]}, {"error": "x"}, {"risk": True}):
        assert differences(wrong, real)


@pytest.mark.skipif(shutil.which("curl") is None or shutil.which("bash") is None, reason="no curl or bash")
def test_every_command_runs_and_answers_what_the_page_shows(place):
    assert [line for line in PAGE.splitlines() if line.strip().startswith("curl ") and line not in "".join(SHELL)] == []
    script = ["set -euo pipefail"]
    expected = []
    for index, (kind, text) in enumerate(BLOCKS):
        if kind == "sh":
            script.append(f"exec >output_{index}\n{text.replace(URL, place.url)}")
            follower = BLOCKS[index + 1] if index + 1 < len(BLOCKS) else ("", "")
            expected.append((index, values_of(follower[1]) if follower[0] == "json" else []))
    done = place.run("bash", "-c", "\n".join(script))
    assert done.returncode == 0, done.stderr
    wrong = []
    for index, shown in expected:
        with open(f"{place.folder}/output_{index}", encoding="utf-8") as file:
            real = values_of(file.read())
        if len(real) != len(shown):
            wrong.append(f"{BLOCKS[index][1]}: {len(real)} answers; the page shows {len(shown)}: {real}")
            continue
        for number, pair in enumerate(zip(shown, real, strict=True)):
            refused = [f"refused: {pair[1]}"] if "error" in pair[1] and "error" not in pair[0] else []
            wrong += [f"{BLOCKS[index][1]}: {line}" for line in refused + differences(*pair, f"answer {number + 1}")]
    assert wrong == []
    for name, head in (("evidence.png", b"\x89PNG"), ("review.jpg", b"\xff\xd8")):
        with open(f"{place.folder}/{name}", "rb") as file:
            assert file.read().startswith(head), name
    first, repeated = (answer_of(place, text) for text in SHELL if "visit-17-lesion-3" in text)
    assert first["prediction_id"] == repeated["prediction_id"], "one Idempotency-Key, two records"
    # The page ends with the erasure of the patient whose lesion that was.
    assert first["prediction_id"] not in {row["id"] for row in place.local.rows()}


def test_the_python_lines_run(place):
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    done = place.run(sys.executable, "-c", code.replace(URL, place.url))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert re.fullmatch(r"[01]\.\d{3} (low|moderate|high)", first) and second == "done"


def test_every_route_is_on_the_page(place):
    schema = build_api(backend(place.local.service, place.local.log)).openapi()
    commands = re.sub(r"\\\n\s*", " ", "\n".join(SHELL))
    commands = commands.replace("/alarms/1/", "/alarms/{}/").replace("/candidates/8/", "/candidates/{}/")
    commands = commands.replace("/candidates/9/", "/candidates/{}/")
    commands = re.sub(r"/\$[A-Z]+|/patient-17", "/{}", commands)
    used = {match.rstrip("/") for match in re.findall(r"\$DERMRAY(/[\w/{}]*)", commands)}
    assert used == {re.sub(r"\{\w+(:path)?\}", "{}", path) for path in schema["paths"]}


def test_the_limits_on_the_page_are_those_of_the_service():
    (shown,) = [value for _, text in BLOCKS if '"limits"' in text for value in values_of(text)]
    assert shown["limits"] == UploadLimits().model_dump()
