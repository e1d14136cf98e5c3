"""A simulated month: a quiet clinic, three changes that are each found within their day, late labels, a retraining, a
promotion, a rollback. Real jobs on a real cluster, traffic through the API."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sql
import yaml

from local.jobs import JobFailedError
from modeling.bundle import load_bundle
from serve.client import ConflictError, DermrayClient
from store.api_keys import create_api_key
from store.champions import DEPLOYED
from store.database import Store, open_store
from store.labels import MISSED_CANCER
from store.tables import labels, predictions
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

# Engines of reduced precision have tests of their own.
EXPORT_ENGINE = {"model": "candidate", "dataset": "datasets/demo", "lesions": 200, "rounds": 1} | dict.fromkeys(
    ("int8", "better_int8")
)


def write_config(home: Path, name: str, values: dict) -> str:
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.fixture(scope="module")
def month(ray_connected, tmp_path_factory) -> Iterator[Month]:
    """A champion of 400 patients, and its service, which takes replays and asks for keys."""
    home = tmp_path_factory.mktemp("month") / "home"
    home.mkdir()
    month = Month(home, ray_connected, datetime.now(UTC).date() - timedelta(days=DAYS + 10))
    # The gate split follows from the patients' pseudonyms: with a key of its own, each run would judge the candidates
    # on other lesions, and now and then refuse the better one.
    key = home / "secrets" / "patient_hmac.key"
    key.parent.mkdir(mode=0o700)
    key.write_bytes(hashlib.sha256(b"a month").digest())
    sample = ["--num-patients", "400", "--lesions-per-patient", "8", "--prevalence", str(PREVALENCE), "--seed", "7"]
    month.job("make_sample", "--out", str(home / "samples" / "demo"), *sample)
    month.job("prepare_dataset", "--config", str(DEMO / "prepare_dataset.yaml"), "--num-folds", "2")
    month.job("train_model", "--config", write_config(home, "train_model", TRAIN_MODEL), "--run-name", "first")
    month.job("export_engine", "--config", write_config(home, "export_engine", EXPORT_ENGINE))
    month.job("promote_model", "--config", str(DEMO / "promote_model.yaml"), "--approver", "Ada")
    store = open_store(f"sqlite:///{home}/store.db")
    for name, role in (("clinic", "admin"), ("reader", "reviewer"), ("Ben", "approver"), ("Cleo", "approver")):
        month.keys[name] = create_api_key(store, name, role, "Ada")[1]
    store.close()
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
    assert "blur" in found[month.day(CAMERA_DAY)], found
    assert "age_approx" in found[month.day(AGE_DAY)], found
    assert "embedding" in found[month.day(EMBEDDING_DAY)], found
    assert sum(bool(drifted) for day, drifted in found.items() if day not in changed) <= 1, found
    with DermrayClient(month.url, trust_env=False) as client:
        alarms = [alarm for alarm in client.alarms() if alarm.kind == "drift"]
    assert {alarm.detail["window"] for alarm in alarms} >= {str(day) for day in changed}
    again = month.job("check_drift", "--start", str(month.day(0)), "--end", str(month.day(DAYS - 1)))
    assert again["windows"] == result["windows"]


def missed(store: Store) -> set[str]:
    """Ids of predictions that answered "negative" of what an expert called malignant."""
    below = sql.and_(predictions.c.risk < predictions.c.threshold, ~predictions.c.abstained)
    query = sql.select(predictions.c.id).join(labels, labels.c.prediction_id == predictions.c.id)
    with store.reading() as connection:
        return set(connection.execute(query.where(labels.c.malignant, below)).scalars())


def test_labels_come_late_each_missed_cancer_is_raised_once_and_windows_are_judged_again(month):
    store = open_store(f"sqlite:///{month.home}/store.db")
    parts = [path.parent.name for path in (month.home / "clinic").glob("*/answers.csv")]
    numbers = []
    for until in (month.evening(11), month.evening(DAYS + 5), month.evening(DAYS + 5)):
        for name in parts:
            month.label(name, until, delay_days=6.0)
        with store.reading() as connection:
            numbers.append(connection.execute(sql.select(sql.func.count()).select_from(labels)).scalar_one())
        raised = [alarm["detail"]["prediction_id"] for alarm in store.alarms() if alarm["kind"] == MISSED_CANCER]
        assert sorted(raised) == sorted(missed(store)) and raised
    assert 0 < numbers[0] < numbers[1] == numbers[2]

    month.job("check_drift", "--start", str(month.day(0)), "--end", str(month.day(DAYS - 1)))
    reports: dict[int, list[dict]] = {}
    for report in store.drift_reports():
        reports.setdefault(report["window_start"], []).append(report)
    assert len(reports) == DAYS
    for versions in reports.values():
        # The drift of a window stays what it was; what the labels say is new.
        before, after = versions[0], versions[-1]
        assert after["label_watermark"] > before["label_watermark"] == 0 and after["drifted"] == before["drifted"]
        assert after["statistics"]["quality"]["window"]["labelled"] > 0
    quality = reports[max(reports)][-1]["statistics"]["quality"]["trailing"]
    assert quality["labelled"] == numbers[1] and 2 < quality["delay_days"]["median"] < 7
    figures = quality["contexts"]["none"]
    assert figures["auc"]["low"] < figures["auc"]["value"] < figures["auc"]["high"]
    assert figures["missed"] == len(missed(store))
    store.close()


def retrain(month: Month, name: str, values: dict) -> dict:
    """Runs the job `retrain` as a timer does, with a training of its own."""
    config = {
        # For a month of this clinic, three drifted days are cause enough.
        "triggers": {
            "drift": {"windows": 3, "days": DAYS + 15},
            "new_labels": None,
            "schedule": None,
            "cool_down_days": 7,
        },
        "prepare": {
            "config": "configs/demo/prepare_dataset.yaml",
            "values": {"num_folds": 2, "add_labels": {"require": "single", "max_share": 0.9}},
        },
        "train": {"config": write_config(month.home, f"train_{name}", TRAIN_MODEL), "values": {"training": values}},
        "export": {"config": write_config(month.home, "export_engine", EXPORT_ENGINE)},
        "gate": {"config": "configs/demo/promote_model.yaml"},
    }
    return month.job("retrain", "--config", write_config(month.home, name, config))


def champion(month: Month) -> str:
    with DermrayClient(month.url, trust_env=False) as client:
        return client.model().model_version


def test_drift_retrains_once_and_the_gate_refuses_a_worse_candidate(month):
    # Nothing is learnt: random weights, and steps too small to matter.
    worse = {"model": {"weights": "none"}, "optimizer": {"epochs": 1, "learning_rate": 1e-6}}
    worse["sampling"] = {"epoch_rows": 256}
    (done,) = retrain(month, "worse", worse)["retrainings"]
    assert (done["trigger"], done["state"], done["gate_passed"]) == ("drift", "done", False)
    assert retrain(month, "worse", worse)["retrainings"] == []
    promote = ["--config", str(DEMO / "promote_model.yaml"), "--model", done["model_version"], "--approver", "Ada"]
    with pytest.raises(JobFailedError, match="does not pass the gate.*auc"):
        month.job("promote_model", *promote)
    assert champion(month) == "1"


def test_a_better_candidate_is_approved_by_someone_else_promoted_served_and_rolled_back(month):
    def client(name: str) -> DermrayClient:
        return DermrayClient(month.url, api_key=month.keys[name], trust_env=False)

    with client("Ben") as ben:
        asked = ben.retrain("the pictures of this month")
    better = {"optimizer": {"epochs": 3}, "sampling": {"epoch_rows": 1280}}
    (done,) = retrain(month, "better", better)["retrainings"]
    version = done["model_version"]
    assert done["id"] == asked.retrain_id and done["gate_passed"], done
    with client("Ben") as ben, client("Cleo") as cleo:
        assert ben.retrain_request(asked.retrain_id).model_version == version
        with pytest.raises(ConflictError):
            ben.approve(version, "mine")
        with pytest.raises(JobFailedError, match="nobody has approved"):
            month.job("promote_model", "--config", str(DEMO / "promote_model.yaml"), "--model", version)
        cleo.approve(version, "fewer missed cancers")

    service = {
        "port": month.cluster.http_port,
        "scorer": {"max_replicas": 1},
        "access": {"require_keys": True},
        "ingress": {"accept_replays": True},
    }
    promote = ["--config", str(DEMO / "promote_model.yaml"), "--deploy", "true"]
    promote += ["--deploy-config", write_config(month.home, "deploy", service)]
    promoted = month.job("promote_model", *promote, "--model", version)
    assert (promoted["champion"], promoted["approver"], promoted["paired"]) == (version, "Cleo", True)
    assert champion(month) == version
    with client("reader") as reader:
        labelled = next(iter(reader.predictions(labelled=True, limit=1)))
        used_in = reader.prediction(labelled.prediction_id).used_in
    assert any(version in use.model_versions for use in used_in)

    back = month.job("promote_model", *promote, "--rollback", "true", "--approver", "Cleo", "--reason", "drill")
    assert (back["champion"], back["previous"]) == ("1", version)
    assert champion(month) == "1"
    store = open_store(f"sqlite:///{month.home}/store.db")
    entries = store.audit_entries()
    assert month.job("verify_audit")["length"] == len(entries)
    decided = [entry for entry in entries if entry["subject"].startswith("model/") and entry["action"] != DEPLOYED]
    actions = [entry["action"] for entry in decided]
    assert actions.count("promotion_refused") == 1 and actions[-2:] == ["promote", "rollback"]
    store.close()
