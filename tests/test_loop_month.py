"""A simulated month: a quiet clinic, three changes that are each found within their day, late labels, a retraining, a
promotion, a rollback. Real jobs on a real cluster, traffic through the API."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from modeling.bundle import load_bundle
from tests.house import REPO_ROOT
from tests.month import (
    AGE_DAY,
    CAMERA,
    CAMERA_DAY,
    DAYS,
    EMBEDDING_DAY,
    OLDER,
    ORDINARY,
    PREVALENCE,
    SIGMA,
    Month,
    shift_embeddings,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

DEMO = REPO_ROOT / "configs" / "demo"
# Small pictures and two short epochs: enough to tell cancers, not to tell them well.
TRAINING = {
    "model": {"backbone": "tf_efficientnet_lite0", "weights": "package", "input_size": 48, "frozen_blocks": 2},
    "optimizer": {"epochs": 2, "batch_size": 32, "learning_rate": 0.001, "ema_decay": 0.9},
    "sampling": {"negatives_per_positive": 1, "epoch_rows": 768},
    "augmentation": {"recipe": "light"},
    "workers": {"torch_threads": 1},
}
TRAIN_MODEL = {
    "dataset": "datasets/demo",
    "store_url": "sqlite:///store.db",
    "training": TRAINING,
    "build": {"num_bootstrap": 200},
    "max_concurrent": 2,
}


def write_config(home: Path, name: str, values: dict) -> str:
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.fixture(scope="module")
def month(ray_connected, tmp_path_factory) -> Iterator[Month]:
    """A champion of 200 patients, and its service, which takes replays and asks for keys."""
    home = tmp_path_factory.mktemp("month") / "home"
    home.mkdir()
    month = Month(home, ray_connected, datetime.now(UTC).date() - timedelta(days=DAYS + 10))
    sample = ["--num-patients", "200", "--lesions-per-patient", "8", "--prevalence", str(PREVALENCE), "--seed", "7"]
    month.job("make_sample", "--out", str(home / "samples" / "demo"), *sample)
    month.job("prepare_dataset", "--config", str(DEMO / "prepare_dataset.yaml"), "--num-folds", "2")
    month.job("train_model", "--config", write_config(home, "train_model", TRAIN_MODEL), "--run-name", "first")
    month.job("export_engine", "--config", str(DEMO / "export_engine.yaml"), "--lesions", "200", "--rounds", "1")
    month.job("promote_model", "--config", str(DEMO / "promote_model.yaml"), "--approver", "Ada")
    for name, role in (("clinic", "admin"), ("reader", "reviewer"), ("Ben", "approver"), ("Cleo", "approver")):
        file = home / f"{name}.key"
        who = ["--name", name, "--role", role, "--actor", "Ada"]
        month.job("manage_api_keys", "--action", "create", *who, "--key-file", str(file))
        month.keys[name] = file.read_text().strip()
    flags = ["--port", str(ray_connected.http_port), "--scorer.max-replicas", "1", "--access.require-keys", "true"]
    month.url = month.job("deploy_service", *flags, "--ingress.accept-replays", "true")["url"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DERMRAY_API_KEY", month.keys["clinic"])
        yield month
    from ray import serve

    serve.shutdown()


def test_ordinary_days_are_quiet_and_each_change_is_found_within_its_day(month):
    for number, (first_day, days) in enumerate(ORDINARY):
        month.write(f"ordinary{number}", days, 101 + number)
        month.send(f"ordinary{number}", first_day, days)
    month.write("camera", 1, 111, CAMERA)
    month.write("older", 1, 112, OLDER)
    month.write("shifted", 1, 113)
    (bundle,) = (month.home / "bundles").iterdir()
    assert shift_embeddings(month.part("shifted"), load_bundle(bundle), SIGMA) == pytest.approx(SIGMA, rel=0.05)
    for name, day in (("camera", CAMERA_DAY), ("older", AGE_DAY), ("shifted", EMBEDDING_DAY)):
        month.send(name, day, 1)

    result = month.job("check_drift", "--start", str(month.day(0)), "--end", str(month.day(DAYS - 1)))
    found = {date.fromisoformat(window["day"]): window["drifted"] for window in result["windows"]}
    assert len(found) == DAYS and all(window["status"] != "insufficient" for window in result["windows"])
    changed = {month.day(number) for number in (CAMERA_DAY, AGE_DAY, EMBEDDING_DAY)}
    assert {"blur", "red", "blue"} <= set(found[month.day(CAMERA_DAY)])
    assert "age_approx" in found[month.day(AGE_DAY)]
    assert "embedding" in found[month.day(EMBEDDING_DAY)]
    assert sum(bool(drifted) for day, drifted in found.items() if day not in changed) <= 1, found
