"""What the jobs tell people of a model, by its bundle's digest: its report by context, its engine sets by device, and
what the promotion gate said of it last."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import sqlalchemy as sql

from store.database import Store
from store.tables import model_facts, now_us

Kind = Literal["report", "engines", "gate"]


class Facts(NamedTuple):
    """All that is known of one model.

    Attributes:
        report: `gate` (metrics with intervals) and `subgroups`, by context.
        engines: an engine set as JSON, by device.
        gate: the gate's report with `notes`, `champion_version` and paired `comparisons`; None for a model that was
            never judged.
        judged_at: when it was, us since the epoch.
    """

    report: dict[str, Any]
    engines: dict[str, Any]
    gate: dict[str, Any] | None = None
    judged_at: int | None = None


def record_model_facts(store: Store, digest: str, kind: Kind, facts: Mapping[str, dict[str, Any]]) -> bool:
    """Stores facts of one kind by name, in place of what there was under these names; returns whether any is new.

    Args:
        digest: of the bundle, sha256.
        facts: JSON by name: a context, a device, or "".
    """
    known = sql.and_(model_facts.c.digest == digest, model_facts.c.kind == kind)
    changed = False
    with store.writing() as connection:
        query = sql.select(model_facts.c.name, model_facts.c.content).where(known)
        found = {name: content for name, content in connection.execute(query)}
        for name, content in facts.items():
            if found.get(name) == content:
                continue
            values = {"content": content, "recorded_at": now_us()}
            statement = store._insert(model_facts).values(digest=digest, kind=kind, name=name, **values)
            key = [column.name for column in model_facts.primary_key]
            connection.execute(statement.on_conflict_do_update(index_elements=key, set_=values))
            changed = True
    return changed


def find_model_facts(store: Store, digests: Collection[str]) -> dict[str, Facts]:
    """What is known of these models, by digest; of an unknown one nothing."""
    found = {digest: Facts({}, {}) for digest in digests}
    table = model_facts.c
    query = sql.select(model_facts).where(table.digest.in_(list(found))).order_by(table.digest, table.kind, table.name)
    with store.reading() as connection:
        for row in connection.execute(query).mappings():
            facts = found[row["digest"]]
            if row["kind"] == "gate":
                found[row["digest"]] = facts._replace(gate=row["content"], judged_at=row["recorded_at"])
            else:
                getattr(facts, row["kind"])[row["name"]] = row["content"]
    return found
