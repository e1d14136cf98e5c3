"""What a check keeps, makes up for and takes over, and what it says of clocks."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from modeling.bundle import load_bundle
from monitoring import evidently_report
from monitoring.drift_check import Window, check_window
from monitoring.drift_report import DriftSettings
from monitoring.prediction_log import PredictionLog
from ray_jobs.check_drift import CheckDriftConfig, run
from store.prediction_windows import window_content
from store.tables import now_us
from tests.drift_population import lesions, records
from tests.test_ray_jobs_check_drift import _fake_report, drift_bundle

DAY_US = 86_400_000_000
SETTINGS = DriftSettings(num_resamples=100, num_splits=10)
TODAY = now_us() // DAY_US * DAY_US


@pytest.fixture
def written(monkeypatch) -> list[Path]:
    """Evidently reports that were written, by a stand-in."""
    files: list[Path] = []
    monkeypatch.setattr(evidently_report, "write_evidently_report", lambda *args: _fake_report(files, *args))
    return files


@pytest.fixture
def home(tmp_path, any_store_url):
    drift_bundle(tmp_path / "bundle")
    log = PredictionLog(any_store_url, str(tmp_path / "images"), str(tmp_path / "spool"))
    for day in (4, 2, 1):
        log.write(records(lesions(30, day, (2, 5)), TODAY - day * DAY_US), {})
    yield tmp_path, log, any_store_url
    log.store.close()


def label_one(log: PredictionLog, start_us: int) -> None:
    import sqlalchemy as sql

    from store.tables import labels

    row = next(iter(log.store.predictions_between(start_us, start_us + DAY_US)))
    values = {"prediction_id": row["id"], "label": "benign", "malignant": False, "labeller": "a", "labelled_at": 1}
    with log.store.writing() as connection:
        connection.execute(sql.insert(labels), values)


def test_missed_days_are_made_up_for_once_and_changed_ones_again(home, written):
    folder, log, store_url = home
    config = CheckDriftConfig(
        bundle=str(folder / "bundle"),
        store_url=store_url,
        out=str(folder / "drift"),
        settings=SETTINGS,
        backfill=30,
    )
    days = [f"{datetime.now(UTC).date() - timedelta(days=back):%Y-%m-%d}" for back in (4, 3, 2, 1)]
    first = run(config)
    assert [result["day"] for result in first["windows"]] == days  # none before the log's first
    assert [result["status"] for result in first["windows"]] == ["ok", "insufficient", "ok", "ok"]
    assert len(written) == 3 and run(config) == first and len(written) == 3
    log.write(records(lesions(1, 9, (2, 2)), TODAY - 2 * DAY_US + 7), {})
    assert run(config)["windows"][2]["rows"] == first["windows"][2]["rows"] + 2 and len(written) == 4


def test_labels_alone_measure_quality_and_take_the_drift_over(home, written):
    folder, log, _ = home
    bundle, window = load_bundle(folder / "bundle"), Window("day", TODAY - DAY_US, TODAY)
    asked = []

    def quality(store, bundle, model_version, window):
        asked.append(store.label_watermark(window.start_us, window.end_us))
        return {"labels": len(asked)}

    def check():
        return check_window(log.store, bundle, "1", window, folder / "drift", SETTINGS, lambda _: None, quality)

    first = check()
    assert check() == first and asked == [0] and len(written) == 1
    label_one(log, window.start_us)
    assert check() == first and asked == [0, 1] and len(written) == 1
    assert json.loads(Path(first["report"]).read_text())["quality"] == {"labels": 2}
    rows = log.store.drift_reports()
    assert [(row["label_watermark"], row["statistics"]["quality"]) for row in rows] == [
        (0, {"labels": 1}),
        (1, {"labels": 2}),
    ]


def test_clocks_that_run_ahead_are_counted(home, written):
    folder, log, _ = home
    ahead = records(lesions(2, 50, (2, 2)), TODAY - DAY_US + 5, acquired_at=TODAY)
    log.write(ahead, {})
    log.write(records(lesions(1, 51, (3, 3)), TODAY + 9 * DAY_US), {})
    window = Window("day", TODAY - DAY_US, TODAY)
    bundle = load_bundle(folder / "bundle")
    result = check_window(log.store, bundle, None, window, folder / "drift", SETTINGS, lambda _: None)
    skew = json.loads(Path(result["report"]).read_text())["clock_skew"]
    assert skew == {"tolerance_s": 300, "future_rows": 3, "acquired_after_received": len(ahead)}


def test_a_window_past_retention_keeps_its_report(home, written):
    import sqlalchemy as sql

    from store.tables import predictions

    folder, log, _ = home
    window, bundle = Window("day", TODAY - DAY_US, TODAY), load_bundle(folder / "bundle")
    first = check_window(log.store, bundle, "1", window, folder / "drift", SETTINGS, lambda _: None)
    with log.store.writing() as connection:
        connection.execute(sql.delete(predictions))
    assert window_content(log.store, window.start_us, window.end_us).num_rows == 0
    assert check_window(log.store, bundle, "1", window, folder / "drift", SETTINGS, lambda _: None) == first


def test_every_model_that_answered_is_checked_and_one_without_a_bundle_is_named(home, written, monkeypatch):
    from modeling.registry import ModelVersion

    folder, log, store_url = home
    log.write(records(lesions(30, 60, (2, 5)), TODAY - DAY_US + 3, model_version="2"), {})
    log.write(records(lesions(2, 61, (2, 2)), TODAY - DAY_US + 4, model_version="gone"), {})

    class Registry:
        def __init__(self, *_):
            pass

        def resolve(self, ref):
            if ref == "gone":
                raise ValueError("no gone registered")
            return ModelVersion(ref, str(folder / "bundle"), load_bundle(folder / "bundle").digest, "run")

    monkeypatch.setattr("modeling.registry.Registry", Registry)
    places = {"store_url": store_url, "out": str(folder / "drift"), "settings": SETTINGS}
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    windows = run(CheckDriftConfig(model="all", start=yesterday, **places))["windows"]
    assert {(result["model_version"], result["status"]) for result in windows} == {
        ("1", "ok"),
        ("2", "ok"),
        ("gone", "no_reference"),
    }
