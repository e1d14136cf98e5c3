"""Tells the store of a model what people decide by: the service has neither its bundle nor its engine sets at hand."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from modeling.bundle import Bundle
from monitoring.promotion_gate import Evidence
from store.database import Store
from store.model_facts import record_model_facts


def tell_report(store: Store, bundle: Bundle) -> None:
    """The gate split's metrics with their intervals, and the subgroups, of each context of a bundle."""
    reports = {}
    for context in bundle.manifest.contexts:
        metrics = bundle.metrics(context)
        reports[context] = {"gate": metrics["gate"], "subgroups": metrics.get("clinical", {}).get("subgroups", [])}
    record_model_facts(store, bundle.digest, "report", reports)


def tell_verdict(
    store: Store, gate: dict[str, Any], evidence: Evidence, candidate: Bundle, champion: Bundle | None
) -> None:
    """What the gate said of a candidate, with what it saw: both models' reports and engine sets.

    Args:
        gate: the gate's report as JSON; the paired comparisons come to it.
    """
    seen = [(candidate, evidence.engine_sets)]
    if champion is not None:
        seen.append((champion, evidence.champion_engine_sets))
    for bundle, engine_sets in seen:
        tell_report(store, bundle)
        engines = {found.device: found.model_dump(mode="json") for found in engine_sets}
        record_model_facts(store, bundle.digest, "engines", engines)
    comparisons = {context: asdict(found) for context, found in evidence.comparisons.items()}
    record_model_facts(store, candidate.digest, "gate", {"": gate | {"comparisons": comparisons}})
