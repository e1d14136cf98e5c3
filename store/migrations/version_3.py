"""Erased patients, whose late rows are kept out; indexes for pages of records, alarms and the audit trail."""

import sqlalchemy as sql
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "erased_patients",
        sql.Column("patient_hmac", sql.String(64), primary_key=True),
        sql.Column("erased_at", sql.BigInteger, nullable=False),
    )
    op.create_index("ix_erased_patients_erased_at", "erased_patients", ["erased_at"])
    # Some stores of versions 1 and 2 have these, and others do not: an index was no reason for a new version then.
    for name, table, columns in (
        ("ix_predictions_image_hash", "predictions", ["image_hash"]),
        ("ix_labels_labelled_at", "labels", ["labelled_at"]),
        ("ix_alarms_raised_at", "alarms", ["raised_at"]),
        ("ix_alarms_kind_raised_at", "alarms", ["kind", "raised_at"]),
        ("ix_alarms_acknowledged_at_raised_at", "alarms", ["acknowledged_at", "raised_at"]),
        ("ix_drift_reports_model_version_window_end", "drift_reports", ["model_version", "window_end"]),
        ("ix_audit_subject", "audit", ["subject"]),
    ):
        op.create_index(name, table, columns, if_not_exists=True)
