"""Quality gate and a named approver, then the champion alias moves; `--rollback` returns to the previous champion.

Without `--approver`, the last person who approved the version at the service (POST /v1/candidates/{version}/approve)
has decided. Running it again changes nothing. Exit status 2 and the failed rules when the gate is not passed: there is
no override.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from modeling.bundle import load_bundle
from modeling.engine_set import engine_sets
from modeling.registry import CHAMPION, ModelVersion, Registry
from monitoring.promotion_gate import GateRules, check_gate
from ray_jobs.job import JobConfig, Location, run_job, say
from store.candidates import PROMOTED, REJECTED, mark_candidate, open_approval
from store.database import Store, open_store


class PromoteModelConfig(JobConfig):
    approver: str | None = Field(None, description="name of the person who decides; null: who approved the version")
    reason: str = Field("", description="kept with the decision; blank: the approval's")
    model: str | None = Field(None, description="alias or version; with --rollback: the champion to leave")
    rollback: bool = Field(False, description="return to the previous champion, without a gate")
    rules: GateRules = Field(default_factory=GateRules)
    engine_sets: Location = "engine_sets"
    store_url: Location = "sqlite:///store.db"
    tracking_uri: Location = "sqlite:///mlflow.db"
    artifact_root: Location = "mlflow-artifacts"
    model_name: str = "dermray"

    @field_validator("approver")
    @classmethod
    def _named(cls, approver: str | None) -> str | None:
        if approver is None:
            return None
        # `--approver` without a value arrives as "true".
        if not approver.strip() or approver == "true":
            raise ValueError("expected the name of the person who approves")
        return approver.strip()


def _record(store: Store, event: dict[str, Any]) -> None:
    """Writes the decision to the approvals table and the audit chain, unless an earlier attempt did."""
    if "event" not in event:
        return  # the alias was set by other means: there is no decision to record
    key = f"{event['event']}@{event['at']}"
    if any(row["gate"].get("registry_event") == key for row in store.approvals()):
        return
    store.record_approval(
        model_version=event["version"],
        approver=event["approver"],
        reason=event["reason"],
        decision=event["action"],
        gate={**event["gate"], "registry_event": key, "previous": event["previous"]},
    )


def _mark(store: Store, registry: Registry, event: dict[str, Any]) -> None:
    """What the service shows of the candidates; one that its training did not tell the store of stays unknown."""
    mark_candidate(store, event["version"], event["digest"], PROMOTED)
    if event.get("action") == "rollback":
        left = registry.resolve(event["previous"])
        mark_candidate(store, left.version, left.digest, REJECTED)


def _approval(config: PromoteModelConfig, store: Store, version: str, digest: str) -> tuple[str, str]:
    """Who decides, and why: the config's approver, else the last one of this version."""
    if config.approver is not None:
        return config.approver, config.reason
    approval = open_approval(store, version, digest)
    if approval is None:
        raise ValueError(
            f"nobody has approved version {version}; give --approver NAME, or POST /v1/candidates/{version}/approve"
        )
    return approval["approver"], config.reason or approval["reason"]


def _promote(config: PromoteModelConfig, registry: Registry, store: Store) -> dict[str, Any]:
    target = registry.resolve(config.model or "candidate")
    bundle = load_bundle(target.uri, target.digest)
    champion = registry.find(CHAMPION)
    if champion is not None and champion.version == target.version:
        say(f"version {target.version} already is the champion")
        last = (registry.history() or [{}])[-1]
        event = last if last.get("version") == target.version else {"version": target.version}
        return {**event, "changed": False, "digest": bundle.digest}
    approver, reason = _approval(config, store, target.version, bundle.digest)
    other = None if champion is None else load_bundle(champion.uri, champion.digest)
    report = check_gate(config.rules, bundle, other, engine_sets(config.engine_sets, bundle.digest))
    for result in report.results:
        say(f"{'passed' if result.passed else 'FAILED'}  {result}")
    if not report.passed:
        store.append_audit(approver, "promotion_refused", f"model/{target.version}", report.as_json())
        if any(result.rule != "require_engine_parity" for result in report.failed):
            # Other engines may still pass; the model itself will not get better.
            mark_candidate(store, target.version, bundle.digest, REJECTED)
        failed = "; ".join(str(result) for result in report.failed)
        raise ValueError(f"version {target.version} of {config.model_name!r} does not pass the gate: {failed}")
    event = registry.promote(target.version, approver, reason, report.as_json())
    return {**event, "digest": bundle.digest}


def _rollback(config: PromoteModelConfig, registry: Registry) -> dict[str, Any]:
    if config.approver is None:
        raise ValueError("approver is missing; expected --approver with the name of the person who rolls back")
    champion = registry.resolve(CHAMPION)
    if config.model is not None:
        leaving = registry.resolve(config.model).version
        last = (registry.history() or [{}])[-1]
        if (last.get("action"), last.get("previous"), champion.version) == ("rollback", leaving, last.get("version")):
            say(f"version {leaving} was rolled back before")
            return {**last, "changed": False, "digest": champion.digest}
        if leaving != champion.version:
            raise ValueError(f"model = {config.model!r}: version {leaving} is not the champion, {champion.version} is")
    previous: ModelVersion = registry.previous_champion()
    load_bundle(previous.uri, previous.digest)
    return {**registry.rollback(config.approver, config.reason), "digest": previous.digest}


def run(config: PromoteModelConfig) -> dict[str, Any]:
    registry = Registry(config.tracking_uri, config.model_name, config.artifact_root)
    # Opened first: without a store to record the decision in, the champion must not move.
    store = open_store(config.store_url)
    event = _rollback(config, registry) if config.rollback else _promote(config, registry, store)
    _record(store, event)
    _mark(store, registry, event)
    return {
        "champion": event["version"],
        "previous": event.get("previous"),
        "changed": event["changed"],
        "action": "rollback" if config.rollback else "promote",
        "approver": event.get("approver"),
        "digest": event["digest"],
        "gate": event.get("gate", {}).get("results", []),
    }


if __name__ == "__main__":
    run_job("promote_model", PromoteModelConfig, run, __doc__)
