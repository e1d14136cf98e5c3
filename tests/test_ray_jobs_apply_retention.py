"""What is past its retention goes, nothing else does, and an interrupted run is finished by the next."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import pytest
import sqlalchemy as sql

from ray_jobs import apply_retention as job
from ray_jobs.apply_retention import ApplyRetentionConfig, run
from ray_jobs.export_predictions import ExportPredictionsConfig
from ray_jobs.export_predictions import run as export
from store import retention
from store.alarm_records import acknowledge_alarm
from store.database import open_store
from store.exports import export_id, find_export
from store.image_files import ImageFiles
from store.labels import NewLabel, add_label
from store.tables import (
    alarm_deliveries,
    alarms,
    dataset_predictions,
    dataset_versions,
    drift_reports,
    exports,
    images,
    labels,
    now_us,
    predictions,
    submissions,
)
from tests.log_rows import prediction_row

pytestmark = pytest.mark.slow

DAY = 86_400_000_000
NOW = now_us()
OLD, RECENT = NOW - 40 * DAY, NOW - 10 * DAY
LABEL = {"label": "benign", "malignant": False, "labeller": "Dr Weber"}


def picture(name: str) -> bytes:
    return b"\xff\xd8 picture " + name.encode()


def hash_of(name: str) -> str:
    return hashlib.sha256(picture(name)).hexdigest()


class Place:
    """Old and recent records with pictures; `labelled` and `held` are old, `shared` is a picture of both ages."""

    def __init__(self, folder: Path, url: str):
        self.url, self.store, self.folder = url, open_store(url), folder
        self.files = ImageFiles(str(folder / "images"))
        self.files.put_many([picture(name) for name in ("old", "recent", "labelled", "held", "shared", "waiting")])
        rows = [
            prediction_row(name, received_at=when, image_hash=hash_of(image), risk=0.1, threshold=0.5)
            for name, when, image in (
                ("old", OLD, "old"),
                ("old-shared", OLD, "shared"),
                ("labelled", OLD, "labelled"),
                ("held", OLD, "held"),
                ("recent", RECENT, "recent"),
                ("recent-shared", RECENT, "shared"),
            )
        ]
        shadows = [
            {**row, "id": f"{row['id']}.shadow", "role": "shadow"} for row in rows if row["id"] in ("old", "labelled")
        ]
        names = ("old", "recent", "labelled", "held", "shared", "waiting")
        kept = [{"hash": hash_of(name), "suffix": ".jpg", "num_bytes": 9, "stored_at": OLD} for name in names]
        self.store.insert_predictions(rows + shadows, kept)
        add_label(self.store, NewLabel("labelled", **LABEL), "clinic")
        request = {"caller": "c", "attempts": 1, "submitted_at": OLD}
        with self.store.writing() as connection:
            for name, state, finished in (("done", "done", OLD), ("failed", "failed", OLD), ("new", "done", RECENT)):
                row = {"id": name, "state": state, "finished_at": finished, "request": {"image_hash": None}, **request}
                connection.execute(sql.insert(submissions).values(row))
            waiting = {"id": "waiting", "state": "queued", "request": {"image_hash": hash_of("waiting")}, **request}
            connection.execute(sql.insert(submissions).values(waiting))
            for name, seen in (("seen", OLD), ("unseen", None)):
                alarm = {"kind": "drift", "severity": "warning", "raised_at": OLD, "message": name, "detail": {}}
                connection.execute(sql.insert(alarms).values(dedupe_key=name, acknowledged_at=seen, **alarm))
            for alarm_id in (1, 2):
                sent = {"alarm_id": alarm_id, "channel": "log", "state": "sent", "attempts": 1, "next_attempt_at": 0}
                connection.execute(sql.insert(alarm_deliveries).values(sent))
            version = {
                "digest": "d" * 64,
                "path": "x",
                "created_at": OLD,
                "num_rows": 1,
                "state": "ready",
                "detail": {},
            }
            connection.execute(sql.insert(dataset_versions).values(version))
            held = {"dataset_digest": "d" * 64, "prediction_id": "held", "label_id": 1, "patient_hmac": None}
            connection.execute(sql.insert(dataset_predictions).values(held))

    def run(self, **values):
        return run(ApplyRetentionConfig(store_url=self.url, images_url=self.files.url, **values))

    def ids(self, table=predictions, column="id"):
        with self.store.reading() as connection:
            return set(connection.execute(sql.select(table.c[column])).scalars())

    def pictures(self):
        return {path.stem for path in Path(self.files.url).rglob("*.jpg")}

    def state(self):
        tables = (predictions, labels, images, submissions, alarms, alarm_deliveries, dataset_predictions)
        with self.store.reading() as connection:
            rows = {
                table.name: sorted(str(tuple(row)) for row in connection.execute(sql.select(table))) for table in tables
            }
        return rows | {"pictures": self.pictures()}


EVERYTHING = {"predictions_days": 30, "images_days": 30, "alarms_days": 30, "submissions_days": 30}
NAMES = ("old", "recent", "labelled", "held", "shared", "waiting")


@pytest.fixture
def place(tmp_path, any_store_url):
    made = Place(tmp_path, any_store_url)
    yield made
    made.store.close()


def test_nothing_goes_unless_it_is_configured(place):
    before, entries = place.state(), place.store.audit_entries()
    assert place.run()["due"] == {} and place.state() == before
    assert place.store.audit_entries() == entries


def test_old_predictions_go_with_their_pictures_and_the_rest_stays(place):
    result = place.run(predictions_days=30)
    assert result["due"] == {"predictions": 3, "images": 0}
    assert result["removed"] == {"alarms_blanked": 0, "labels": 0, "predictions": 3, "images": 1, "image_files": 1}
    assert place.ids() == {"labelled", "labelled.shadow", "held", "recent", "recent-shared"}
    assert place.ids(images, "hash") == place.pictures() == {hash_of(name) for name in NAMES if name != "old"}
    assert place.ids(dataset_predictions, "prediction_id") == {"held"}
    (entry,) = [entry for entry in place.store.audit_entries() if entry["action"] == "apply_retention"]
    assert entry["detail"] == {"due": result["due"], "predictions_days": 30.0, "keep_labelled": True}
    before = place.state(), place.store.audit_entries()
    assert place.run(predictions_days=30)["removed"] == {}
    assert (place.state(), place.store.audit_entries()) == before


def test_labelled_ones_go_where_they_are_not_to_be_kept(place):
    removed = place.run(predictions_days=30, keep_labelled=False)["removed"]
    assert removed["predictions"] == 5 and removed["labels"] == 1
    assert place.ids() == {"held", "recent", "recent-shared"} and place.ids(labels) == set()


def test_a_missed_cancer_that_nobody_has_seen_keeps_its_record(place):
    alarm = add_label(place.store, NewLabel("old", "malignant", True, "Dr Roth"), "clinic").alarm
    dry = place.run(predictions_days=30, keep_labelled=False, dry_run=True)
    removed = place.run(predictions_days=30, keep_labelled=False)["removed"]
    assert dry["due"]["predictions"] == removed["predictions"] == 3 and removed["alarms_blanked"] == 0
    assert place.ids() == {"old", "old.shadow", "held", "recent", "recent-shared"}
    assert alarm["message"] in {row["message"] for row in place.store.alarms(unacknowledged_only=True)}
    acknowledge_alarm(place.store, alarm["id"], "Dr Roth", None)
    assert place.run(predictions_days=30, keep_labelled=False)["removed"]["alarms_blanked"] == 1
    assert "old" not in place.ids()
    (row,) = [row for row in place.store.alarms() if row["id"] == alarm["id"]]
    assert "old" not in str(row["detail"]) and "retention" in row["message"] and "erased:" in row["dedupe_key"]


def test_a_prediction_goes_once_its_data_set_is_deleted_and_the_lineage_stays(place):
    with place.store.writing() as connection:
        connection.execute(sql.update(dataset_versions).values(state="deleted"))
    place.run(predictions_days=30)
    assert "held" not in place.ids() and place.ids(dataset_predictions, "prediction_id") == {"held"}


def test_pictures_go_before_their_records(place):
    removed = place.run(images_days=30)["removed"]
    assert removed == {"images": 2, "image_files": 2} and "old" in place.ids()
    assert place.pictures() == {hash_of(name) for name in ("recent", "labelled", "shared", "waiting")}


def test_finished_submissions_and_acknowledged_alarms_go(place):
    removed = place.run(submissions_days=30, alarms_days=30)["removed"]
    assert removed["submissions"] == 2 and removed["alarms"] == 1
    assert place.ids(submissions) == {"new", "waiting"} and place.ids(alarms, "dedupe_key") == {"unseen"}
    assert place.ids(alarm_deliveries, "alarm_id") == {2}
    assert hash_of("waiting") in place.pictures()


def test_a_dry_run_counts_and_removes_nothing(place):
    before = place.state(), place.store.audit_entries()
    dry = place.run(dry_run=True, **EVERYTHING)
    assert dry["due"] == {"predictions": 3, "submissions": 2, "alarms": 1, "images": 2} and dry["removed"] == {}
    assert (place.state(), place.store.audit_entries()) == before


def test_batches_of_one_remove_the_same(place, monkeypatch):
    monkeypatch.setattr(retention, "BATCH_ROWS", 1)
    place.run(**EVERYTHING)
    assert place.ids() == {"labelled", "labelled.shadow", "held", "recent", "recent-shared"}
    assert place.ids(submissions) == {"new", "waiting"} and hash_of("old") not in place.pictures()


STAGES = [
    (job, "apply_retention"),
    (retention, "delete_predictions"),
    (retention, "_remove_rows"),
    (retention, "_remove_images"),
    (retention, "_still_due"),
    (retention.ImageFiles, "remove"),
    (job, "empty_write_ahead_log"),
]


@pytest.mark.parametrize("stage", range(len(STAGES)), ids=[name for _, name in STAGES])
@pytest.mark.parametrize("calls", [0, 1])
def test_killed_at_any_stage_and_run_again_it_ends_the_same(stage, calls, tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "BATCH_ROWS", 1)
    ends = []
    for killed in (False, True):
        folder = tmp_path / str(killed)
        folder.mkdir()
        place = Place(folder, f"sqlite:///{folder}/store.db")
        with place.store.writing() as connection:
            connection.execute(sql.update(labels).values(labelled_at=1))
        if killed:
            with monkeypatch.context() as patch:
                whole, reached = getattr(*STAGES[stage]), []

                def kill(*args, whole=whole, reached=reached, **values):
                    reached.append(1)
                    if len(reached) > calls:
                        raise KeyboardInterrupt
                    return whole(*args, **values)

                patch.setattr(*STAGES[stage], kill)
                with suppress(KeyboardInterrupt):
                    place.run(**EVERYTHING)
                assert reached, "the stage is never reached"
        place.run(**EVERYTHING)
        ends.append(place.state())
        place.store.close()
    assert ends[0] == ends[1]


def test_a_picture_that_comes_back_while_its_batch_is_looked_at_stays(place, monkeypatch):
    looked, arrived = retention._still_due, []

    def comes_back(connection, hashes, due):
        if not arrived:
            arrived.append(1)
            again = prediction_row("again", received_at=RECENT, image_hash=hash_of("old"))
            place.store.insert_predictions([again])
        return looked(connection, hashes, due)

    monkeypatch.setattr(retention, "_still_due", comes_back)
    place.run(images_days=30)
    assert arrived and hash_of("old") in place.pictures() and hash_of("old") in place.ids(images, "hash")
    assert hash_of("held") not in place.pictures()


def test_exports_go_too(place):
    day = {"start": "2024-05-01", "end": "2024-05-01", "store_url": place.url, "out": str(place.folder / "exports")}
    path = export(ExportPredictionsConfig(**day))["path"]
    assert place.run(exports_days=30)["removed"] == {} and Path(path).exists()
    with place.store.writing() as connection:
        connection.execute(sql.update(exports).values(created_at=OLD))
    assert place.run(exports_days=30)["removed"] == {"exports": 1}
    assert not Path(path).exists() and find_export(place.store, export_id(path))["state"] == "deleted"
    assert export(ExportPredictionsConfig(**day))["path"] == path and Path(path).exists()
    assert find_export(place.store, export_id(path))["state"] == "current"


def test_drift_reports_and_the_audit_trail_stay(place):
    key = {"window_start": OLD, "window_end": OLD, "model_version": "1", "reference": "r", "label_watermark": 0}
    report = {"status": "ok", "num_rows": 1, "num_groups": 1, "alarm": False, "drifted": [], "statistics": {}}
    place.store.upsert_drift_report({**key, **report, "input_digest": "", "report": None})
    entries = place.store.audit_entries()
    place.run(**EVERYTHING)
    assert len(place.ids(drift_reports)) == 1 and place.store.audit_entries()[: len(entries)] == entries


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="predictions_days"):
        ApplyRetentionConfig(predictions_days=0)
    with pytest.raises(ValueError, match="does not exist"):
        run(ApplyRetentionConfig(store_url=f"sqlite:///{tmp_path}/none.db", predictions_days=1))
