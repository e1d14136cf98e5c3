"""What the jobs tell people of a model."""

import sqlalchemy as sql
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "model_facts",
        sql.Column("digest", sql.String(64), primary_key=True),
        sql.Column("kind", sql.String(16), primary_key=True),
        sql.Column("name", sql.String(255), primary_key=True),
        sql.Column("content", sql.JSON, nullable=False),
        sql.Column("recorded_at", sql.BigInteger, nullable=False),
    )
