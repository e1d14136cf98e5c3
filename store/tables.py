"""The tables, in SQLAlchemy Core: one schema for SQLite and PostgreSQL.

Times are BIGINT microseconds since the epoch, UTC. JSON columns hold what `json.dumps` can write, never NaN.
"""

from __future__ import annotations

import time

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

# The newest revision of `store/migrations`, which brings older stores here: a change of tables needs one.
SCHEMA_VERSION = 5

# SQLite gives an id of its own only to a column of type INTEGER.
_Id = BigInteger().with_variant(Integer, "sqlite")
# SQL NULL for None: the default would store the JSON text 'null', which `IS NULL` does not find.
_Json = JSON(none_as_null=True)


def now_us() -> int:
    """The present as microseconds since the epoch, UTC."""
    return time.time_ns() // 1000


schema = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

schema_version = Table("schema_version", schema, Column("version", Integer, primary_key=True, autoincrement=False))

predictions = Table(
    "predictions",
    schema,
    Column("id", String(64), primary_key=True),
    Column("idempotency_key", String(255)),
    Column("received_at", BigInteger, nullable=False),
    Column("acquired_at", BigInteger),
    Column("caller", String(255), nullable=False),
    Column("role", String(16), nullable=False),
    Column("patient_hmac", String(64)),
    Column("institution", String(255)),
    Column("device", String(255)),
    Column("image_hash", String(64)),
    Column("model_version", String(64), nullable=False),
    Column("context", String(16), nullable=False),
    Column("metadata", _Json, nullable=False),
    Column("image_score", Float),
    Column("class_probabilities", _Json),
    Column("risk", Float),
    Column("band", String(16)),
    Column("threshold", Float),
    Column("abstained", Boolean, nullable=False),
    Column("reasons", _Json, nullable=False),
    Column("brightness", Float),
    Column("contrast", Float),
    Column("blur", Float),
    Column("red", Float),
    Column("green", Float),
    Column("blue", Float),
    Column("embedding", LargeBinary),
    Column("stage_ms", _Json, nullable=False),
    # NULL keys never collide, so rows without a key are unconstrained on both databases.
    UniqueConstraint("caller", "idempotency_key"),
    Index("ix_predictions_role_received_at", "role", "received_at"),
    Index("ix_predictions_patient_hmac", "patient_hmac"),
    # Erasure asks which pictures other records use.
    Index("ix_predictions_image_hash", "image_hash"),
)

images = Table(
    "images",
    schema,
    Column("hash", String(64), primary_key=True),
    Column("suffix", String(8), nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("stored_at", BigInteger, nullable=False),
)

labels = Table(
    "labels",
    schema,
    Column("id", _Id, primary_key=True),
    Column("prediction_id", String(64), nullable=False, index=True),
    Column("label", String(64), nullable=False),
    Column("malignant", Boolean, nullable=False),
    Column("labeller", String(255), nullable=False),
    Column("labelled_at", BigInteger, nullable=False, index=True),
    Column("confidence", Float),
    Column("comment", Text),
    Column("supersedes", BigInteger),
    Column("source", String(32), nullable=False, server_default="api"),
    # Of the source, which may send an annotation again.
    Column("external_id", String(255)),
    # A third reader's word, which settles what two readers see differently.
    Column("adjudication", Boolean, nullable=False, server_default=false()),
    # An index and no constraint, which SQLite adds to a table only by copying it whole.
    Index("uq_labels_source_external_id", "source", "external_id", unique=True),
)

alarms = Table(
    "alarms",
    schema,
    Column("id", _Id, primary_key=True),
    Column("dedupe_key", String(255), nullable=False, unique=True),
    Column("kind", String(32), nullable=False),
    Column("severity", String(16), nullable=False),
    Column("raised_at", BigInteger, nullable=False),
    Column("model_version", String(64)),
    Column("message", Text, nullable=False),
    Column("detail", _Json, nullable=False),
    Column("acknowledged_at", BigInteger),
    Column("acknowledged_by", String(255)),
    # What it is about: within the cool-down, an alarm that says nothing new about its topic is stored and not sent.
    Column("topic", String(255)),
    Column("quieted_by", BigInteger),
    Index("ix_alarms_topic_raised_at", "topic", "raised_at"),
    Index("ix_alarms_raised_at", "raised_at"),
    Index("ix_alarms_kind_raised_at", "kind", "raised_at"),
    Index("ix_alarms_acknowledged_at_raised_at", "acknowledged_at", "raised_at"),
)

# What has become of an alarm at each place it is sent to; an alarm without a row is still to be sent.
alarm_deliveries = Table(
    "alarm_deliveries",
    schema,
    Column("alarm_id", BigInteger, primary_key=True, autoincrement=False),
    Column("channel", String(64), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_attempt_at", BigInteger, nullable=False),
    Column("leased_until", BigInteger),
    Column("last_error", Text),
    Column("sent_at", BigInteger),
    Index("ix_alarm_deliveries_state_next_attempt_at", "state", "next_attempt_at"),
)

drift_reports = Table(
    "drift_reports",
    schema,
    Column("id", _Id, primary_key=True),
    Column("window_start", BigInteger, nullable=False),
    Column("window_end", BigInteger, nullable=False),
    Column("model_version", String(64), nullable=False),
    Column("reference", String(64), nullable=False),
    Column("label_watermark", BigInteger, nullable=False),
    Column("status", String(16), nullable=False),
    Column("num_rows", BigInteger, nullable=False),
    Column("num_groups", BigInteger, nullable=False),
    Column("alarm", Boolean, nullable=False),
    Column("drifted", _Json, nullable=False),
    Column("statistics", _Json, nullable=False),
    Column("input_digest", String(64), nullable=False),
    Column("report", Text),
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("window_start", "window_end", "model_version", "reference", "label_watermark"),
    Index("ix_drift_reports_model_version_window_end", "model_version", "window_end"),
)
DRIFT_KEY = tuple(
    drift_reports.c[name] for name in ("window_start", "window_end", "model_version", "reference", "label_watermark")
)

submissions = Table(
    "submissions",
    schema,
    Column("id", String(64), primary_key=True),
    Column("idempotency_key", String(255)),
    Column("caller", String(255), nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("submitted_at", BigInteger, nullable=False),
    Column("leased_until", BigInteger),
    Column("attempts", Integer, nullable=False),
    Column("request", _Json, nullable=False),
    Column("result", _Json),
    Column("error", Text),
    Column("finished_at", BigInteger),
    UniqueConstraint("caller", "idempotency_key"),
)

api_keys = Table(
    "api_keys",
    schema,
    Column("id", String(64), primary_key=True),
    Column("name", String(255), nullable=False),
    Column("key_hash", String(64), nullable=False, unique=True),
    Column("role", String(16), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
)

retrain_requests = Table(
    "retrain_requests",
    schema,
    Column("id", String(64), primary_key=True),
    Column("dedupe_key", String(255), nullable=False, unique=True),
    Column("trigger", String(32), nullable=False),
    Column("reason", Text, nullable=False),
    Column("requested_by", String(255), nullable=False),
    Column("requested_at", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("leased_until", BigInteger),
    Column("job_id", String(255)),
    Column("model_version", String(64)),
    Column("detail", _Json, nullable=False),
    Column("finished_at", BigInteger),
    Column("stage", String(32)),
    Column("error", Text),
)

approvals = Table(
    "approvals",
    schema,
    Column("id", _Id, primary_key=True),
    Column("model_version", String(64), nullable=False, index=True),
    Column("decision", String(16), nullable=False),
    Column("approver", String(255), nullable=False),
    Column("reason", Text, nullable=False),
    Column("gate", _Json, nullable=False),
    Column("decided_at", BigInteger, nullable=False),
)

candidates = Table(
    "candidates",
    schema,
    Column("model_version", String(64), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("gate_metrics", _Json, nullable=False),
    Column("state", String(16), nullable=False),
    # Who asked for the training: not the one to approve it.
    Column("requested_by", String(255)),
    Column("dataset_digest", String(64)),
    Column("retrain_id", String(64)),
)

# What the jobs tell people of a model: the service has neither its bundle nor its engine sets at hand.
model_facts = Table(
    "model_facts",
    schema,
    Column("digest", String(64), primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("name", String(255), primary_key=True),
    Column("content", _Json, nullable=False),
    Column("recorded_at", BigInteger, nullable=False),
)

dataset_versions = Table(
    "dataset_versions",
    schema,
    Column("digest", String(64), primary_key=True),
    Column("path", Text, nullable=False),
    Column("parent_digest", String(64)),
    Column("created_at", BigInteger, nullable=False),
    Column("num_rows", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("deleted_at", BigInteger),
    Column("detail", _Json, nullable=False),
)

# Which labelled predictions a data set version holds: from a prediction to the models that learned from it.
dataset_predictions = Table(
    "dataset_predictions",
    schema,
    Column("dataset_digest", String(64), primary_key=True),
    Column("prediction_id", String(64), primary_key=True),
    Column("label_id", BigInteger, nullable=False),
    Column("patient_hmac", String(64)),
    Index("ix_dataset_predictions_prediction_id", "prediction_id"),
    Index("ix_dataset_predictions_patient_hmac", "patient_hmac"),
)

# Copies of the log that were written elsewhere: an erasure has to reach them.
exports = Table(
    "exports",
    schema,
    Column("id", String(64), primary_key=True),
    Column("path", Text, nullable=False),
    Column("window_start", BigInteger, nullable=False),
    Column("window_end", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("num_rows", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("deleted_at", BigInteger),
    Column("detail", _Json, nullable=False),
)

# Kept for good: another machine's spool may bring a patient's rows back after any time. It holds no more than the audit
# trail does.
erased_patients = Table(
    "erased_patients",
    schema,
    Column("patient_hmac", String(64), primary_key=True),
    Column("erased_at", BigInteger, nullable=False, index=True),
)

audit = Table(
    "audit",
    schema,
    Column("id", _Id, primary_key=True, autoincrement=False),
    Column("at", BigInteger, nullable=False),
    Column("actor", String(255), nullable=False),
    Column("action", String(64), nullable=False),
    Column("subject", String(255), nullable=False, index=True),
    Column("detail", _Json, nullable=False),
    Column("previous_hash", String(64), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
)
