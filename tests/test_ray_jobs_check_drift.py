"""check_drift on a real store, bundle and Evidently: quiet days, a shifted day, and the same again without a trace."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from modeling.bundle import load_bundle, write_manifest
from monitoring import evidently_report
from monitoring.prediction_log import PredictionLog
from ray_jobs import apply_retention
from ray_jobs.check_drift import CheckDriftConfig, run, windows
from ray_jobs.job import parse_config
from store.database import open_store
from store.labels import NewLabel, add_label
from tests.drift_population import lesions, records, reference
from tests.tiny_bundle import tiny_bundle

FIRST_DAY = date(2026, 3, 1)
SETTINGS = {"num_resamples": 300, "num_splits": 15}


def midnight(day: int) -> int:
    """Microseconds of the start of a day counted from FIRST_DAY."""
    moment = datetime(FIRST_DAY.year, FIRST_DAY.month, FIRST_DAY.day, tzinfo=UTC) + timedelta(days=day)
    return int(moment.timestamp()) * 1_000_000


def drift_bundle(directory: Path) -> Path:
    """A tiny bundle whose reference holds patients with lesions."""
    fields = tiny_bundle(directory, contexts=["image_only", "none"]).manifest.model_dump(mode="json", exclude={"files"})
    reference().to_parquet(directory / "reference.parquet", index=False)
    write_manifest(directory, fields)
    return directory


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """An ordinary day, a shifted day, an almost empty one; the first also has rows of another model and of a shadow."""
    home = tmp_path_factory.mktemp("drift")
    drift_bundle(home / "bundle")
    log = PredictionLog(f"sqlite:///{home}/store.db", str(home / "images"), str(home / "spool"))
    log.write(records(lesions(50, 1, (2, 5)), midnight(0)), {})
    log.write(records(lesions(12, 4, shifted=True), midnight(0) + 7, model_version="2"), {})
    # What a shadow made of the same traffic is no answer, and no drift.
    shadowed = records(lesions(30, 5, shifted=True), midnight(0) + 9)
    log.write([record.model_copy(update={"role": "shadow"}) for record in shadowed], {})
    log.write(records(lesions(50, 2, (2, 5), shifted=True), midnight(1)), {})
    log.write(records(lesions(3, 3), midnight(2)), {})
    log.store.close()
    return home


class OneModel:
    """A registry whose champion is version 1."""

    def __init__(self, *_):
        pass

    def resolve(self, _):
        from modeling.registry import ModelVersion

        return ModelVersion("1", str(OneModel.bundle), load_bundle(OneModel.bundle).digest, "run")


@pytest.fixture
def one_model(home, monkeypatch):
    OneModel.bundle = home / "bundle"
    monkeypatch.setattr("modeling.registry.Registry", OneModel)


def config(home: Path, **values) -> CheckDriftConfig:
    places = {"store_url": f"sqlite:///{home}/store.db", "out": str(home / "drift"), "settings": SETTINGS}
    return CheckDriftConfig(**places | values)


def contents(home: Path) -> dict[str, bytes]:
    """Every report and the store, as bytes, and when each was last written."""
    files = [path for path in (home / "drift").rglob("*") if path.is_file()] + [
        home / "store.db",
        home / "store.db-wal",
    ]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files if path.exists()}


@pytest.fixture
def checked(home, one_model, tmp_path):
    """Three days checked, in a copy of the home."""
    copy = Path(shutil.copytree(home, tmp_path / "copy"))
    return copy, run(config(copy, start=FIRST_DAY, end=FIRST_DAY + timedelta(days=2)))


def open_rows(home: Path):
    log = PredictionLog(f"sqlite:///{home}/store.db", "", "")
    rows, alarms = log.store.drift_reports(), log.store.alarms()
    log.store.close()
    return rows, alarms


def test_days_are_judged_reported_and_alarmed_once(checked):
    home, result = checked
    ordinary, shifted, empty = result["windows"]
    assert [day["day"] for day in result["windows"]] == ["2026-03-01", "2026-03-02", "2026-03-03"]
    assert [day["status"] for day in result["windows"]] == ["ok", "drift", "insufficient"]
    assert (ordinary["drifted"], ordinary["alarm"], empty["drifted"], empty["alarm"]) == ([], False, [], False)
    assert {"red", "blur", "age_approx"} <= set(shifted["drifted"]) == set(result["drifted"])
    assert ordinary["rows_of_other_models"] > 0

    rows, alarms = open_rows(home)
    assert [(row["status"], row["num_groups"]) for row in rows] == [("ok", 50), ("drift", 50), ("insufficient", 3)]
    assert [alarm["detail"]["window"] for alarm in alarms] == ["2026-03-02"]

    report = json.loads(Path(shifted["report"]).read_text())
    assert report["drifted"] == shifted["drifted"]
    own = {feature["name"]: feature for feature in report["features"]}
    evidently = json.loads(Path(shifted["report"]).with_name("evidently.json").read_text())
    theirs = {
        metric["config"]["column"]: metric
        for metric in evidently["metrics"]
        if metric["config"]["type"].endswith("ValueDrift")
    }
    assert set(theirs) == set(own)
    for name, metric in theirs.items():
        assert metric["value"] == pytest.approx(own[name]["distance"], abs=1e-5)
        assert metric["config"]["threshold"] == own[name]["threshold"]
    count = evidently["metrics"][0]["value"]["count"]
    assert count == sum(feature["drifted"] for feature in own.values())
    assert "<html" in Path(shifted["html"]).read_text()[:2000] and empty["html"] is None

    # One project, one snapshot per judged window, in the layout that `evidently ui` reads.
    from evidently.ui.workspace import Workspace

    workspace = Workspace(str(home / "drift" / "workspace"))
    (project,) = workspace.list_projects()
    runs = [workspace.get_run(project.id, number) for number in workspace.list_runs(project.id)]
    assert {run.name for run in runs} == {"2026-03-01", "2026-03-02"}
    assert len(project.dashboard.model().panels) == 2

    before = contents(home)
    assert run(config(home, start=FIRST_DAY, end=FIRST_DAY + timedelta(days=2))) == result
    assert contents(home) == before


def test_late_predictions_and_lost_reports_are_made_up_for(checked, monkeypatch):
    home, result = checked
    written = []
    monkeypatch.setattr(evidently_report, "write_evidently_report", lambda *args: _fake_report(written, *args))
    log = PredictionLog(f"sqlite:///{home}/store.db", "", "")
    late = records(lesions(12, 9), midnight(0) + 3_600_000_000)
    log.write(late, {})
    again = run(config(home, start=FIRST_DAY, end=FIRST_DAY + timedelta(days=1)))
    assert again["windows"][0]["rows"] == result["windows"][0]["rows"] + len(late)
    assert again["windows"][1] == result["windows"][1] and len(written) == 1
    Path(again["windows"][1]["html"]).unlink()
    assert run(config(home, start=FIRST_DAY, end=FIRST_DAY + timedelta(days=1))) == again and len(written) == 2
    rows, alarms = open_rows(home)
    assert len(rows) == 3 and len(alarms) == 1 and rows[0]["num_rows"] == again["windows"][0]["rows"]
    log.store.close()


def test_a_day_of_which_retention_left_the_labelled_rows_keeps_its_report(checked):
    """Experts label what is malignant or uncertain: alone, these rows look like another population."""
    home, result = checked
    url = f"sqlite:///{home}/store.db"
    store = open_store(url)
    rows = list(store.predictions_between(midnight(0), midnight(1)))
    oldest = sorted((row for row in rows if row["model_version"] == "1"), key=lambda row: row["metadata"]["age_approx"])
    for row in oldest[-len(rows) // 2 :]:
        add_label(store, NewLabel(row["id"], "malignant", True, "Dr Weber"), "clinic")
    before, _ = open_rows(home)
    days = (datetime.now(UTC).date() - FIRST_DAY).days - 1
    settings = {"predictions_days": days, "store_url": url, "images_url": str(home / "images")}
    removed = apply_retention.run(apply_retention.ApplyRetentionConfig(**settings))
    assert removed["removed"]["predictions"] > 0 and list(store.predictions_between(midnight(0), midnight(1)))
    again = run(config(home, start=FIRST_DAY, end=FIRST_DAY))
    assert again["windows"] == result["windows"][:1] and open_rows(home)[0] == before
    store.close()


def _fake_report(written, features, verdicts, html, json_path, max_rows, seed, entry):
    written.append(html)
    html.parent.mkdir(parents=True, exist_ok=True)
    html.write_text("html")
    json_path.write_text("{}")
    entry.snapshot_file.parent.mkdir(parents=True, exist_ok=True)
    entry.snapshot_file.write_text("{}")


def test_times_give_one_window_and_a_bundle_needs_no_registry(home, tmp_path, monkeypatch):
    monkeypatch.setattr(evidently_report, "write_evidently_report", lambda *args: _fake_report([], *args))
    copy = Path(shutil.copytree(home, tmp_path / "copy"))
    flags = ["--start", "2026-03-01T00:00:00Z", "--end", "2026-03-03T02:00:00+02:00", "--bundle", str(copy / "bundle")]
    places = ["--store-url", f"sqlite:///{copy}/store.db", "--out", str(copy / "drift")]
    parsed = parse_config(CheckDriftConfig, flags + places, None)
    result = run(parsed)
    (window,) = result["windows"]
    rows, _ = open_rows(copy)
    assert (rows[0]["window_start"], rows[0]["window_end"]) == (midnight(0), midnight(2))
    assert window["rows_of_other_models"] == 0 and rows[0]["model_version"].startswith("bundle:")
    assert window["rows"] == rows[0]["num_rows"] > 300 and result["html"] == window["html"]


def test_the_day_of_a_row_is_utc_and_the_end_is_not_included():
    first, second = windows(FIRST_DAY, FIRST_DAY + timedelta(days=1))
    assert (first.start_us, first.end_us, second.start_us) == (midnight(0), midnight(1), midnight(1))
    (yesterday,) = windows(None, None)
    assert yesterday.name == f"{datetime.now(UTC).date() - timedelta(days=1):%Y-%m-%d}"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"start": "01.03.2026"}, "expected a date such as 2026-11-21"),
        ({"start": "2026-03-02", "end": "2026-03-01"}, "lies before start"),
        ({"start": "2026-03-01T10:00:00", "end": "2026-03-01"}, "expected two dates or two times"),
        ({"start": "2026-03-01T10:00:00", "end": "2026-03-01T10:00:00"}, "is not after"),
        ({"start": "2999-01-01"}, "lies in the future"),
        ({"start": "0026-03-01", "end": "2026-03-01"}, "at most 3660"),
        ({"settings": {"false_alarm_rate": 0}}, "greater than 0"),
        ({"treshold": 1}, "Extra inputs"),
    ],
)
def test_wrong_values_are_refused(home, values, message):
    with pytest.raises(ValidationError, match=message):
        config(home, **values)


def test_a_day_that_does_not_exist_is_named_with_what_is_expected(home):
    with pytest.raises(ValidationError, match="expected a date such as") as caught:
        parse_config(CheckDriftConfig, ["--start", "2026-02-30"], None)
    assert caught.value.errors()[0]["loc"] == ("start",)


def test_a_missing_store_and_a_missing_champion_are_one_line(home, one_model, tmp_path):
    with pytest.raises(ValueError, match="store .*typo.db does not exist"):
        run(config(home, start=FIRST_DAY, store_url=f"sqlite:///{tmp_path}/typo.db"))
    with pytest.raises(ValueError, match="no bundle at"):
        run(config(home, start=FIRST_DAY, bundle=str(tmp_path / "nothing")))


def test_no_champion_says_how_to_get_one(home, tmp_path):
    with pytest.raises(ValueError, match="no champion registered"):
        run(config(home, start=FIRST_DAY, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"))
