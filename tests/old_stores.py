"""Stores as older releases made them, on both databases."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Any

import psycopg
import sqlalchemy as sql
from sqlalchemy.engine import Engine

from tests.house import REPO_ROOT

# What the third release added to a store of the first, in SQL that both databases take; `gate_metrics` is JSON.
_VERSION_3 = """
CREATE TABLE candidates (
    model_version VARCHAR(64) NOT NULL,
    digest VARCHAR(64) NOT NULL,
    created_at BIGINT NOT NULL,
    gate_metrics JSON NOT NULL,
    state VARCHAR(16) NOT NULL,
    CONSTRAINT pk_candidates PRIMARY KEY (model_version)
);
CREATE TABLE erased_patients (
    patient_hmac VARCHAR(64) NOT NULL,
    erased_at BIGINT NOT NULL,
    CONSTRAINT pk_erased_patients PRIMARY KEY (patient_hmac)
);
CREATE INDEX ix_erased_patients_erased_at ON erased_patients (erased_at);
CREATE INDEX ix_predictions_image_hash ON predictions (image_hash);
CREATE INDEX ix_labels_labelled_at ON labels (labelled_at);
CREATE INDEX ix_alarms_raised_at ON alarms (raised_at);
CREATE INDEX ix_alarms_kind_raised_at ON alarms (kind, raised_at);
CREATE INDEX ix_alarms_acknowledged_at_raised_at ON alarms (acknowledged_at, raised_at);
CREATE INDEX ix_drift_reports_model_version_window_end ON drift_reports (model_version, window_end);
CREATE INDEX ix_audit_subject ON audit (subject);
INSERT INTO candidates VALUES ('7', 'd7', 5, '{"none": {"auc": 0.9}}', 'open');
INSERT INTO erased_patients VALUES ('e1', 6);
INSERT INTO schema_version VALUES (3);
"""

# Beside the approval and the audit entry that the first release's SQLite store holds.
ROWS: dict[str, dict[str, Any]] = {
    "alarms": {
        "dedupe_key": "drift/1",
        "kind": "drift",
        "severity": "warning",
        "raised_at": 11,
        "message": "blur drifts",
        "detail": {"p": 0.001},
        "acknowledged_by": "Ada",
    },
    "api_keys": {"id": "k1", "name": "clinic", "key_hash": "a" * 64, "role": "caller", "created_at": 12},
    "drift_reports": {
        "window_start": 0,
        "window_end": 10,
        "model_version": "1",
        "reference": "r",
        "label_watermark": 0,
        "status": "ok",
        "num_rows": 3,
        "num_groups": 2,
        "alarm": False,
        "drifted": ["blur"],
        "statistics": {"blur": 0.5},
        "input_digest": "i",
        "created_at": 13,
    },
    "images": {"hash": "h1", "suffix": ".jpg", "num_bytes": 2**40, "stored_at": 14},
    "labels": {
        "prediction_id": "p1",
        "label": "melanoma",
        "malignant": True,
        "labeller": "Dr Weber",
        "labelled_at": 15,
        "confidence": 0.9,
        "comment": "née à Zürich",
    },
    "predictions": {
        "id": "p1",
        "idempotency_key": "once",
        "received_at": 16,
        "caller": "clinic",
        "role": "champion",
        "patient_hmac": "f" * 64,
        "image_hash": "h1",
        "model_version": "1",
        "context": "none",
        "metadata": {"sex": "female", "age_approx": 60},
        "risk": 0.125,
        "abstained": False,
        "reasons": [],
        "embedding": bytes(range(256)),
        "stage_ms": {"total": 3.5},
    },
    "retrain_requests": {
        "id": "t1",
        "dedupe_key": "week 1",
        "trigger": "drift",
        "reason": "blur",
        "requested_by": "Ada",
        "requested_at": 17,
        "state": "queued",
        "attempt": 1,
        "detail": {"windows": [1, 2]},
    },
    "submissions": {
        "id": "s1",
        "caller": "clinic",
        "state": "queued",
        "submitted_at": 18,
        "attempts": 0,
        "request": {"image_hash": "h1"},
    },
}
# The approval and the audit entry of `store_version_1.sql`.
_DECISION = """
INSERT INTO approvals (model_version, decision, approver, reason, gate, decided_at)
VALUES ('1', 'promote', 'Ada', 'first', '{}', 1795355104627621);
INSERT INTO audit VALUES (1, 1795355104629513, 'Ada', 'promote', 'model/1', '{"reason": "first", "gate": {}}',
'0000000000000000000000000000000000000000000000000000000000000000',
'ba4a4505a5a16e379f8357f7210b7c3deee55754b43918eb6aa00253b743c766');
"""


def make_version_1(url: str) -> None:
    """A store as the first release makes it, with a row in every table."""
    if url.startswith("sqlite"):
        run_script(url, (REPO_ROOT / "tests" / "store_version_1.sql").read_text())
    else:
        run_script(url, (REPO_ROOT / "tests" / "store_version_1_postgresql.sql").read_text() + _DECISION)
    engine = plain_engine(url)
    found = sql.MetaData()
    with engine.begin() as connection:
        found.reflect(connection)
        for name, row in ROWS.items():
            connection.execute(sql.insert(found.tables[name]).values(row))
    engine.dispose()


def make_version_3(url: str) -> None:
    """A store that the first release made and the third upgraded."""
    make_version_1(url)
    run_script(url, _VERSION_3)


def run_script(url: str, script: str) -> None:
    """Runs SQL statements past the store."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
            database.executescript(script)
    else:
        with psycopg.connect(url) as connection:
            connection.execute(script)


def plain_engine(url: str) -> Engine:
    """An engine without what the store's own adds to it."""
    return sql.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))


def all_rows(engine: Engine, columns: dict[str, list[str]] | None = None) -> dict[str, list[tuple]]:
    """Every row of every table; of the tables and columns that are named, if any are."""
    found = sql.MetaData()
    with engine.connect() as connection:
        found.reflect(connection)
        columns = columns or {name: list(table.c.keys()) for name, table in found.tables.items()}
        queries = {name: sql.select(*(found.tables[name].c[key] for key in keys)) for name, keys in columns.items()}
        return {name: [tuple(row) for row in connection.execute(query)] for name, query in queries.items()}
