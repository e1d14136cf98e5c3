"""Candidates: trained models that wait for a decision."""

import sqlalchemy as sql
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "candidates",
        sql.Column("model_version", sql.String(64), primary_key=True),
        sql.Column("digest", sql.String(64), nullable=False),
        sql.Column("created_at", sql.BigInteger, nullable=False),
        sql.Column("gate_metrics", sql.JSON, nullable=False),
        sql.Column("state", sql.String(16), nullable=False),
    )
