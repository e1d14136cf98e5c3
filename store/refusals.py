"""Refused decisions in the audit trail: once each, however often the same attempt is repeated."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sql

from store.connection import ADVISORY_LOCK
from store.database import Store
from store.tables import audit


def record_refusal(store: Store, actor: str, action: str, subject: str, detail: dict[str, Any]) -> bool:
    """Audits a refusal, unless the last one of this action about this subject was the same; returns whether it is new.

    Args:
        actor: who tried; another person who tries the same is another refusal.
        detail: JSON; equal detail means the same refusal.
    """
    table = audit.c
    query = sql.select(table.actor, table.detail).where(table.subject == subject, table.action == action)
    with store.writing() as connection:
        if connection.dialect.name == "postgresql":
            # What `_append_audit` takes; here already, so that of two who come at once the second sees the first.
            connection.execute(sql.select(sql.func.pg_advisory_xact_lock(ADVISORY_LOCK)))
        last = connection.execute(query.order_by(table.id.desc()).limit(1)).first()
        if last is not None and last.actor == actor and _text(last.detail) == _text(detail):
            return False
        store._append_audit(connection, actor, action, subject, detail)
        return True


def _text(detail: dict[str, Any]) -> str:
    return json.dumps(detail, sort_keys=True)
