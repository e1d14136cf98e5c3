"""Who was made the champion, by whom and why, and what people asked for that no job has done yet.

The registry decides which version is the champion; these are the decisions as the jobs and the service recorded them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from store.candidates import APPROVAL_REFUSED, APPROVE, CANDIDATE, REJECT, list_candidates, open_approval, requesters
from store.connection import ADVISORY_LOCK
from store.database import Store
from store.tables import approvals, audit, candidates

PROMOTE, ROLLBACK, ASK_ROLLBACK = "promote", "rollback", "ask_rollback"
PROMOTION_REFUSED, ROLLBACK_REFUSED = "promotion_refused", "rollback_refused"
DEPLOYED = "deployed"

# Subjects that begin with "model/"; as a range, which an index serves in either database.
_MODELS = (audit.c.subject >= "model/", audit.c.subject < "model0")


class Champion(NamedTuple):
    """The champion on record.

    Attributes:
        previous: what a rollback would return to; None where there is none.
        decision: the row that made it the champion.
    """

    model_version: str
    previous: str | None
    decision: dict[str, Any]


class NotChampionError(Exception):
    """A rollback from a version that is not the champion, or that has none before it."""


def champion_on_record(store: Store) -> Champion | None:
    """The champion by the newest promotion or rollback; None before the first."""
    query = sql.select(approvals).where(approvals.c.decision.in_((PROMOTE, ROLLBACK))).order_by(approvals.c.id)
    with store.reading() as connection:
        rows = [dict(row) for row in connection.execute(query).mappings()]
    if not rows:
        return None
    champion = rows[-1]["model_version"]
    earlier: list[str | None] = []
    for row in rows:
        if row["decision"] == PROMOTE:
            earlier.append(row["gate"].get("previous"))
        elif earlier:
            earlier.pop()
    while earlier and earlier[-1] == champion:
        earlier.pop()
    return Champion(champion, earlier[-1] if earlier else None, rows[-1])


def record_move(
    store: Store, decision: str, model_version: str, person: str, reason: str, gate: dict[str, Any]
) -> bool:
    """Records that a job moved the champion, once for each `registry_event` of `gate`; returns whether it is new."""
    mine = sql.and_(approvals.c.model_version == model_version, approvals.c.decision == decision)
    with store.writing() as connection:
        _one_at_a_time(connection)
        known = connection.execute(sql.select(approvals.c.gate).where(mine)).scalars()
        if any(row.get("registry_event") == gate["registry_event"] for row in known):
            return False
        store._record_decision(connection, model_version, person, reason, decision, gate)
        return True


def _one_at_a_time(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        # What `_append_audit` takes; here already, so that of two who come at once the second sees the first.
        connection.execute(sql.select(sql.func.pg_advisory_xact_lock(ADVISORY_LOCK)))


def is_recorded(store: Store, registry_event: str) -> bool:
    """Whether a promotion or rollback that the registry made is on record."""
    return any(row["gate"].get("registry_event") == registry_event for row in store.approvals())


def ask_rollback(store: Store, model_version: str, person: str, reason: str) -> dict[str, Any]:
    """Records that a person wants the champion left for the one before it; returns the row, of whoever asked first.

    Args:
        model_version: the champion to leave.

    Raises:
        NotChampionError: it is not the champion on record, or there is none before it.
    """
    with store.writing() as connection:
        _one_at_a_time(connection)
        champion = champion_on_record(store)
        if champion is None or champion.model_version != model_version:
            now = "there is none" if champion is None else f"version {champion.model_version} is"
            raise NotChampionError(f"version {model_version} is not the champion, {now}")
        if champion.previous is None:
            raise NotChampionError(f"version {model_version} has no champion before it to go back to")
        waiting = open_rollback(store)
        if waiting is not None:
            return waiting
        number = store._record_decision(connection, model_version, person, reason, ASK_ROLLBACK, {})
        return dict(connection.execute(sql.select(approvals).where(approvals.c.id == number)).mappings().one())


def open_rollback(store: Store) -> dict[str, Any] | None:
    """The rollback that someone asked for and no job has done: no promotion or rollback is newer."""
    decided = approvals.c.decision.in_((PROMOTE, ROLLBACK, ASK_ROLLBACK))
    query = sql.select(approvals).where(decided).order_by(approvals.c.id.desc()).limit(1)
    with store.reading() as connection:
        row = connection.execute(query).mappings().first()
    return dict(row) if row is not None and row["decision"] == ASK_ROLLBACK else None


def open_approvals(store: Store, limit: int) -> list[dict[str, Any]]:
    """Approvals that wait for a promotion, oldest first, so that the newest has the last word: of the newest `limit`
    candidates that are still ones."""
    found = []
    for row in list_candidates(store, limit):
        if row["state"] == CANDIDATE and row["approvals"]:
            asked = requesters(store, row["model_version"], row["digest"])
            approval = open_approval(store, row["model_version"], row["digest"], asked)
            if approval is not None:
                found.append(approval)
    return sorted(found, key=lambda approval: approval["id"])


def unfinished(store: Store) -> dict[str, Any] | None:
    """The newest promotion or rollback, if its job was cut off: before the candidate was marked, or before it had
    swapped the service as it was to."""
    query = sql.select(approvals).where(approvals.c.decision.in_((PROMOTE, ROLLBACK))).order_by(approvals.c.id.desc())
    with store.reading() as connection:
        row = connection.execute(query.limit(1)).mappings().first()
        if row is None:
            return None
        version, gate = row["model_version"], row["gate"]
        unmarked = sql.select(candidates.c.state).where(
            candidates.c.model_version == version, candidates.c.digest == gate.get("bundle_digest")
        )
        if connection.execute(unmarked).scalar() == CANDIDATE:
            return dict(row)
        swapped = not gate.get("deploy") or _noted(connection, version, gate.get("registry_event"))
    return None if swapped else dict(row)


def note_deployed(store: Store, model_version: str, registry_event: str) -> None:
    """Audits that the service runs what a promotion or rollback made the champion, once per event."""
    with store.writing() as connection:
        if not _noted(connection, model_version, registry_event):
            detail = {"registry_event": registry_event}
            store._append_audit(connection, "promote_model", DEPLOYED, f"model/{model_version}", detail)


def _noted(connection: Connection, model_version: str, registry_event: str | None) -> bool:
    query = sql.select(audit.c.detail).where(audit.c.subject == f"model/{model_version}", audit.c.action == DEPLOYED)
    return any(detail.get("registry_event") == registry_event for detail in connection.execute(query).scalars())


def decisions(store: Store, limit: int) -> list[dict[str, Any]]:
    """The newest decisions about models, newest first, refused attempts among them: `at` (us), `action`, `person`,
    `model_version`, `reason`, `detail`."""
    table = audit.c
    done = (APPROVE, REJECT, PROMOTE, ROLLBACK, ASK_ROLLBACK, DEPLOYED)
    actions = (*done, PROMOTION_REFUSED, ROLLBACK_REFUSED, APPROVAL_REFUSED)
    query = sql.select(audit).where(*_MODELS, table.action.in_(actions)).order_by(table.id.desc()).limit(limit)
    with store.reading() as connection:
        return [
            {
                "at": row["at"],
                "action": row["action"],
                "person": row["actor"],
                "model_version": row["subject"].removeprefix("model/"),
                "reason": row["detail"].get("reason", ""),
                "detail": row["detail"],
            }
            for row in connection.execute(query).mappings()
        ]
