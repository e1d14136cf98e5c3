"""An export holds the window, typed, in equal bytes; interrupted or raced by an erasure it holds no one erased."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pyarrow.parquet as pq
import pytest

from monitoring import prediction_export
from monitoring.prediction_log import encode_embedding
from ray_jobs import export_predictions
from ray_jobs.export_predictions import ExportPredictionsConfig, run
from store.database import open_store
from store.erasure import PatientErasure
from store.erasure_reach import pending_copies
from store.exports import export_id, find_export
from store.image_files import ImageFiles
from store.labels import NewLabel, add_label
from store.spool import Spool
from tests.log_rows import prediction_row

THEIRS, OTHER = "a" * 64, "b" * 64
START = datetime(2024, 5, 1, tzinfo=UTC)
START_US = int(START.timestamp()) * 1_000_000
HOUR = 3_600_000_000


@pytest.fixture
def store(any_store_url):
    opened = open_store(any_store_url)
    rows = [
        prediction_row(
            f"p{number:03d}",
            received_at=START_US + number * HOUR // 10,
            patient_hmac=(THEIRS, OTHER, None)[number % 3],
            risk=0.1,
            threshold=0.5,
            metadata={"site": "arm", "age_approx": 50.0 + number},
            class_probabilities={"malignant": 0.1, "benign": 0.9},
            embedding=None if number % 5 == 0 else encode_embedding(np.full(64, number / 8)),
        )
        for number in range(100)
    ]
    rows.append({**rows[3], "id": "p003.shadow", "role": "shadow", "model_version": "2"})
    rows.append(prediction_row("outside", received_at=START_US + 24 * HOUR, patient_hmac=OTHER))
    opened.insert_predictions(rows)
    add_label(opened, NewLabel("p001", "malignant", True, "Dr Weber", labelled_at=START_US), "clinic")
    add_label(opened, NewLabel("p001", "malignant", True, "Dr Roth", confidence=0.5), "clinic")
    yield opened
    opened.close()


@pytest.fixture
def job(store, tmp_path):
    url = store.engine.url.render_as_string(hide_password=False)

    def config(**values):
        return ExportPredictionsConfig(
            **{"start": "2024-05-01", "end": "2024-05-01", "out": str(tmp_path / "out"), "store_url": url} | values
        )

    return config


def erase(store, tmp_path, patient=THEIRS):
    return PatientErasure(store, ImageFiles(str(tmp_path / "images")), Spool(tmp_path / "spool")).erase(patient, "x")


def bytes_of(result):
    with open(result["path"], "rb") as file:
        return file.read()


def row_of(store, result):
    return find_export(store, export_id(result["path"]))


def test_the_window_is_there_typed_with_its_labels(store, job):
    result = run(job(role="both"))
    table = pq.read_table(result["path"])
    assert table.schema.equals(prediction_export.SCHEMA) and result["rows"] == table.num_rows == 101
    rows = {row["id"]: row for row in table.to_pylist()}
    assert "outside" not in rows and rows["p003.shadow"]["model_version"] == "2"
    one = rows["p001"]
    assert one["received_at"] == datetime(2024, 5, 1, 0, 6, tzinfo=UTC) and one["patient_hmac"] == OTHER
    assert one["metadata"] == '{"age_approx": 51.0, "site": "arm"}'
    assert one["class_probabilities"] == [("benign", 0.9), ("malignant", 0.1)]
    assert one["embedding"] == [0.125] * 64 and rows["p000"]["embedding"] is None
    assert [(label["labeller"], label["malignant"]) for label in one["labels"]] == [
        ("Dr Weber", True),
        ("Dr Roth", True),
    ]
    assert one["labels"][0]["labelled_at"] == START and rows["p002"]["labels"] == []


def test_the_same_rows_give_the_same_bytes_and_the_same_row(store, job, monkeypatch):
    first = run(job())
    content, row, entries = bytes_of(first), row_of(store, first), store.audit_entries()
    assert row["state"] == "current" and row["num_rows"] == 100
    again = run(job())
    assert bytes_of(again) == content and row_of(store, again) == row and store.audit_entries() == entries
    monkeypatch.setattr(prediction_export, "_PAGE_ROWS", 7)
    assert bytes_of(run(job())) == content


def test_row_groups_are_of_one_size_however_the_rows_come(store, job, monkeypatch):
    monkeypatch.setattr(prediction_export, "ROW_GROUP_ROWS", 32)
    monkeypatch.setattr(prediction_export, "_PAGE_ROWS", 50)
    metadata = pq.read_metadata(run(job())["path"])
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [32, 32, 32, 4]


def test_more_rows_replace_the_file(store, job):
    first = run(job())
    store.insert_predictions([prediction_row("late", received_at=START_US + 1)])
    second = run(job())
    assert second["path"] == first["path"] and second["rows"] == 101
    assert row_of(store, second)["num_rows"] == pq.read_metadata(second["path"]).num_rows == 101


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["export_tables", "publish_export", "move", "commit"])
def test_killed_at_any_stage_and_run_again(stage, store, job, tmp_path, monkeypatch):
    done = run(job(out=str(tmp_path / "whole")))

    def killed(*_args, **_values):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stage == "move":
            patch.setattr("store.replaced_file.ReplacedFile.move", killed)
        elif stage == "commit":
            # Behind the move: the file is in its place, and the transaction is lost.
            patch.setattr("store.exports._update_published", killed)
        else:
            patch.setattr(export_predictions, stage, killed)
        with pytest.raises(KeyboardInterrupt):
            run(job())
    path = tmp_path / "out" / "predictions-champion-2024-05-01.parquet"
    row = find_export(store, export_id(str(path)))
    assert row["state"] == "writing", "known before it is visible"
    result = run(job())
    assert bytes_of(result) == bytes_of(done) and row_of(store, result)["state"] == "current"
    assert set(row_of(store, result)["detail"]) == {"sha256"}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_who_is_erased_while_it_is_written_is_not_in_it(store, job, tmp_path, monkeypatch):
    publish = export_predictions.publish_export
    erased = []

    def erased_before(*args):
        if not erased:
            erased.append(erase(store, tmp_path))
        return publish(*args)

    with monkeypatch.context() as patch:
        patch.setattr(export_predictions, "publish_export", erased_before)
        result = run(job())
    assert erased[0].pending == {"exports": 1, "datasets": 0} and erased[0].counts["predictions"] == 35
    patients = set(pq.read_table(result["path"])["patient_hmac"].to_pylist())
    assert patients == {OTHER, None} and result["rows"] == 66
    assert pending_copies(store) == {"exports": 0, "datasets": 0}
    fresh = run(job(out=str(tmp_path / "fresh")))
    assert bytes_of(fresh) == bytes_of(result), "as if they had never been there"


def test_the_last_one_to_begin_wins(store, job, monkeypatch):
    publish, results = export_predictions.publish_export, []

    def overtaken(*args):
        if not results:
            results.append(None)
            results.append(run(job()))
        return publish(*args)

    monkeypatch.setattr(export_predictions, "publish_export", overtaken)
    with pytest.raises(ValueError, match="taken over by another run"):
        run(job())
    assert row_of(store, results[1])["state"] == "current"
    assert pq.read_metadata(results[1]["path"]).num_rows == 100


def test_a_bucket_holds_the_same_bytes(store, job):
    import fsspec

    local = run(job())
    remote = run(job(out="memory://exports"))
    assert fsspec.filesystem("memory").cat("/exports/predictions-champion-2024-05-01.parquet") == bytes_of(local)
    assert [path for path in fsspec.filesystem("memory").ls("/exports", detail=False) if ".tmp" in path] == []
    assert row_of(store, remote)["state"] == "current"


def test_mistakes_are_one_line(job, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        run(job(store_url=f"sqlite:///{tmp_path}/none.db"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^out .*Not a directory"):
        run(job(out=str(tmp_path / "file" / "below")))
    with pytest.raises(ValueError, match="lies in the future"):
        job(start="2999-01-01", end="2999-01-02")
