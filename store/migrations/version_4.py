"""Deliveries of alarms, sources of labels, stages of retraining, lineage of data sets, exports."""

import sqlalchemy as sql
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("labels", sql.Column("source", sql.String(32), nullable=False, server_default="api"))
    op.add_column("labels", sql.Column("external_id", sql.String(255)))
    op.add_column("labels", sql.Column("adjudication", sql.Boolean, nullable=False, server_default=sql.false()))
    op.create_index("uq_labels_source_external_id", "labels", ["source", "external_id"], unique=True)
    op.add_column("alarms", sql.Column("topic", sql.String(255)))
    op.add_column("alarms", sql.Column("quieted_by", sql.BigInteger))
    op.create_index("ix_alarms_topic_raised_at", "alarms", ["topic", "raised_at"])
    op.add_column("retrain_requests", sql.Column("stage", sql.String(32)))
    op.add_column("retrain_requests", sql.Column("error", sql.Text))
    op.add_column("candidates", sql.Column("requested_by", sql.String(255)))
    op.add_column("candidates", sql.Column("dataset_digest", sql.String(64)))
    op.add_column("candidates", sql.Column("retrain_id", sql.String(64)))
    op.create_table(
        "alarm_deliveries",
        sql.Column("alarm_id", sql.BigInteger, primary_key=True, autoincrement=False),
        sql.Column("channel", sql.String(64), primary_key=True),
        sql.Column("state", sql.String(16), nullable=False),
        sql.Column("attempts", sql.Integer, nullable=False),
        sql.Column("next_attempt_at", sql.BigInteger, nullable=False),
        sql.Column("leased_until", sql.BigInteger),
        sql.Column("last_error", sql.Text),
        sql.Column("sent_at", sql.BigInteger),
    )
    op.create_index("ix_alarm_deliveries_state_next_attempt_at", "alarm_deliveries", ["state", "next_attempt_at"])
    op.create_table(
        "dataset_versions",
        sql.Column("digest", sql.String(64), primary_key=True),
        sql.Column("path", sql.Text, nullable=False),
        sql.Column("parent_digest", sql.String(64)),
        sql.Column("created_at", sql.BigInteger, nullable=False),
        sql.Column("num_rows", sql.BigInteger, nullable=False),
        sql.Column("state", sql.String(16), nullable=False),
        sql.Column("deleted_at", sql.BigInteger),
        sql.Column("detail", sql.JSON, nullable=False),
    )
    op.create_table(
        "dataset_predictions",
        sql.Column("dataset_digest", sql.String(64), primary_key=True),
        sql.Column("prediction_id", sql.String(64), primary_key=True),
        sql.Column("label_id", sql.BigInteger, nullable=False),
        sql.Column("patient_hmac", sql.String(64)),
    )
    op.create_index("ix_dataset_predictions_prediction_id", "dataset_predictions", ["prediction_id"])
    op.create_index("ix_dataset_predictions_patient_hmac", "dataset_predictions", ["patient_hmac"])
    op.create_table(
        "exports",
        sql.Column("id", sql.String(64), primary_key=True),
        sql.Column("path", sql.Text, nullable=False),
        sql.Column("window_start", sql.BigInteger, nullable=False),
        sql.Column("window_end", sql.BigInteger, nullable=False),
        sql.Column("created_at", sql.BigInteger, nullable=False),
        sql.Column("num_rows", sql.BigInteger, nullable=False),
        sql.Column("state", sql.String(16), nullable=False),
        sql.Column("deleted_at", sql.BigInteger),
        sql.Column("detail", sql.JSON, nullable=False),
    )
