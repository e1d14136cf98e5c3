"""A record comes back from the log as it was written, and is nowhere before its image is on disk."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import cv2
import numpy as np
import pytest
from pydantic import ValidationError

from monitoring.prediction_log import (
    PredictionLog,
    PredictionRecord,
    decode_embedding,
    encode_embedding,
    patient_hmac,
)
from store.database import StoreUnavailableError
from store.image_files import prepare_image

EMBEDDING = np.linspace(-3, 3, 64, dtype=np.float32)


def record(**values) -> PredictionRecord:
    return PredictionRecord(**{"model_version": "1", "context": "none", **values})


def full_record(image_hash: str) -> PredictionRecord:
    return record(
        idempotency_key="key",
        received_at=1_000,
        acquired_at=900,
        caller="clinic",
        patient_hmac=patient_hmac("P1", "secret"),
        institution="Basel",
        device="DermScan 3",
        image_hash=image_hash,
        metadata={"age_approx": 50.0, "sex": "female", "site": None},
        image_score=0.2,
        class_probabilities={"benign": 0.9, "malignant": 0.1},
        risk=0.1,
        band="moderate",
        threshold=0.05,
        brightness=0.5,
        contrast=0.1,
        blur=2.0,
        red=0.6,
        green=0.5,
        blue=0.4,
        embedding=encode_embedding(EMBEDDING),
        stage_ms={"decode": 1.5},
    )


@pytest.fixture
def log(tmp_path):
    opened = PredictionLog(f"sqlite:///{tmp_path}/store.db", str(tmp_path / "images"), str(tmp_path / "spool"))
    yield opened
    opened.store.close()


@pytest.fixture
def image():
    return prepare_image(cv2.imencode(".jpg", np.full((32, 32, 3), 120, np.uint8))[1].tobytes())


def test_a_record_comes_back_as_written(log, image):
    written = full_record(image.hash)
    assert log.write([written], {image.hash: image.data}).num_new == 1
    assert log.find_by_idempotency_key("clinic", "key") == written
    assert PredictionRecord.from_row(log.store.find_prediction(written.id)) == written
    assert log.image_files.get(image.hash, log.store.image_suffix(image.hash)) == image.data


def test_a_retried_write_changes_nothing(log, image):
    first = full_record(image.hash)
    again = first.model_copy(update={"id": "other", "risk": 0.7})
    assert log.write([first], {image.hash: image.data}).num_new == 1
    assert log.write([first, again], {image.hash: image.data}).num_new == 0
    assert log.find_by_idempotency_key("clinic", "key") == first


def test_no_row_without_its_image(log, image, tmp_path):
    (tmp_path / "images").write_text("a file where the folder should be")
    with pytest.raises(StoreUnavailableError, match="images cannot be written"):
        log.write([full_record(image.hash)], {image.hash: image.data})
    assert len(log.read_window(0, 2**62)) == 0


def test_an_image_under_a_wrong_name_is_refused(log, image):
    wrong = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(ValueError, match="does not hash to its name"):
        log.write([full_record(wrong)], {wrong: image.data})
    assert len(log.read_window(0, 2**62)) == 0


def test_spooled_records_reach_the_store_once_it_answers(log, image, tmp_path):
    written = full_record(image.hash)
    (tmp_path / "images").write_text("in the way")
    log.spool_records([written], {image.hash: image.data})
    with pytest.raises(StoreUnavailableError):
        log.replay_spool()
    (tmp_path / "images").unlink()
    assert log.replay_spool() == 1 and log.replay_spool() == 0
    assert log.find_by_idempotency_key("clinic", "key") == written
    assert log.image_files.get(image.hash, ".jpg") == image.data


def test_a_store_of_another_release_does_not_cost_the_spool(tmp_path):
    (tmp_path / "store.db").write_text("not a database " * 20)
    log = PredictionLog(f"sqlite:///{tmp_path}/store.db", str(tmp_path / "images"), str(tmp_path / "spool"))
    log.spool_records([record()], {})
    with pytest.raises(ValueError, match="not an SQLite database"):
        log.replay_spool()
    assert log.spool.pending() == 1


def test_a_window_is_one_flat_table_with_a_group_per_patient(log):
    patient = patient_hmac("P1", b"secret")
    rows = [
        record(id="a", received_at=10, patient_hmac=patient, metadata={"age_approx": 40.0}),
        record(id="b", received_at=11, patient_hmac=patient, embedding=encode_embedding(EMBEDDING)),
        record(id="c", received_at=12, metadata={"sex": "male"}, abstained=True, reasons=["blurred"]),
        record(id="late", received_at=20),
        record(id="shadow", received_at=13, role="shadow"),
    ]
    log.write(rows, {})
    table = log.read_window(10, 20)
    assert table["id"].tolist() == ["a", "b", "c"]
    assert table["group"].tolist() == [patient, patient, "c"]
    assert table["meta.age_approx"].tolist()[0] == 40.0 and table["meta.age_approx"].isna().tolist()[1:] == [True, True]
    assert table["meta.sex"].tolist()[2] == "male"
    assert np.isnan(table.loc[0, "embedding_00"])
    np.testing.assert_allclose(table.filter(regex="^embedding_").to_numpy()[1], EMBEDDING, atol=2e-3)
    empty = log.read_window(30, 40)
    assert len(empty) == 0 and {"group", "risk", "embedding_63"} <= set(empty.columns)


def test_embeddings_keep_half_precision_and_never_overflow():
    np.testing.assert_allclose(decode_embedding(encode_embedding(EMBEDDING)), EMBEDDING, atol=2e-3)
    assert np.isfinite(decode_embedding(encode_embedding(np.full(64, 1e9)))).all()
    with pytest.raises(ValueError, match="63 values; expected 64"):
        encode_embedding(np.zeros(63))


def test_patients_are_pseudonyms_under_a_secret():
    assert patient_hmac("P1", "a") == patient_hmac("P1", b"a") != patient_hmac("P1", "b")
    assert patient_hmac("P1", "a") != patient_hmac("P2", "a") and "P1" not in patient_hmac("P1", "a")
    with pytest.raises(ValueError, match="key is empty"):
        patient_hmac("P1", "")


@pytest.mark.parametrize(
    "field, value",
    [
        ("patient_hmac", "patient 7"),
        ("risk", float("nan")),
        ("embedding", b"short"),
        ("role", "test"),
        ("surprise", 1),
    ],
)
def test_a_wrong_record_is_refused_and_names_the_field(field, value):
    with pytest.raises(ValidationError) as caught:
        record(**{field: value})
    assert caught.value.errors()[0]["loc"][0] == field


def test_a_missing_number_in_metadata_is_stored_as_missing(log):
    log.write([record(id="a", metadata={"age_approx": float("nan")})], {})
    assert log.store.find_prediction("a")["metadata"] == {"age_approx": None}


def test_importing_the_log_costs_a_replica_none_of_the_heavy_packages():
    code = "import sys, monitoring.prediction_log; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"ray", "pandas", "mlflow", "evidently", "torch", "sklearn"}
