"""Quality gate and a named approver, then the champion alias moves; `--rollback` returns to the previous champion.

Without `--approver`, the last person who approved the version at the service (POST /v1/candidates/{version}/approve)
has decided; whoever asked for the training cannot. `--auto` promotes without a person where the config allows it.
`--deploy` swaps the running service afterwards. Running it again changes nothing. Exit status 2 and the failed rules
when the gate is not passed: there is no override.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from modeling.bundle import load_bundle
from modeling.registry import CHAMPION, ModelVersion, Registry
from monitoring.gate_table import markdown, table_lines
from monitoring.promotion_gate import GateReport, GateRules, check_gate
from ray_jobs.job import REPO_ROOT, JobConfig, Location, parse_config, run_job, say
from ray_jobs.model_reports import tell_verdict
from ray_jobs.promotion_evidence import gather_evidence, open_champion
from store.candidates import (
    APPROVAL_REFUSED,
    PROMOTED,
    REJECTED,
    find_rejection,
    is_one_of,
    mark_candidate,
    open_approval,
    requesters,
)
from store.champions import PROMOTION_REFUSED, is_recorded, note_deployed, record_move
from store.database import Store, open_store
from store.refusals import record_refusal
from store.synced_files import replace_synced

if TYPE_CHECKING:
    from modeling.bundle import Bundle
    from ray_jobs.deploy_service import DeployServiceConfig

# Another set of engines, or more traffic, may pass these; what else fails will not get better.
_MAY_YET_PASS = ("require_engine_parity", "require_paired", "max_ms_per_image", "max_latency_ratio", "shadow.")


class AutoPromotion(BaseModel):
    """What `--auto` may do. It always takes the paired comparison and every rule that is on.

    Attributes:
        allow: whether there is promotion without a person at all.
        configured_by: who answers for it; stands in the history as the approver, and may not have asked for the
            training either.
        first_champion: also where there is no champion to compare with.
    """

    model_config = ConfigDict(extra="forbid")

    allow: bool = False
    configured_by: str = Field("", max_length=200)
    first_champion: bool = False

    @model_validator(mode="after")
    def _named(self) -> AutoPromotion:
        if self.allow and not self.configured_by.strip():
            raise ValueError("configured_by is blank; expected the name of the person who answers for --auto")
        return self


class PromoteModelConfig(JobConfig):
    approver: str | None = Field(None, description="name of the person who decides; null: who approved the version")
    reason: str = Field("", description="kept with the decision; blank: the approval's")
    model: str | None = Field(None, description="alias or version; with --rollback: the champion to leave")
    rollback: bool = Field(False, description="return to the previous champion, without a gate")
    auto: bool = Field(False, description="promote without a person, if auto_promotion allows it")
    auto_promotion: AutoPromotion = Field(default_factory=AutoPromotion)
    rules: GateRules = Field(default_factory=GateRules)
    dataset: Location | None = Field(None, description="data set whose gate split both models score; null: unpaired")
    num_scorers: int = Field(1, ge=1, le=1024, description="engine actors")
    num_bootstrap: int = Field(1000, ge=100, le=100_000, description="resamples of the paired intervals")
    seed: int = Field(0, ge=0, description="of the resampling")
    gate_scores: Location = Field("gate_scores", description="keeps risks on the gate split, by bundle and data set")
    reports: Location = Field("promotion_reports", description="gets the table of each gate, JSON and Markdown")
    deploy: bool = Field(False, description="afterwards swap the running service, as deploy_service does")
    deploy_config: Location | None = Field(None, description="of deploy_service; null: configs/deploy_service.yaml")
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

    @model_validator(mode="after")
    def _one_way(self) -> PromoteModelConfig:
        if self.auto and (self.rollback or self.approver is not None):
            other = "rollback" if self.rollback else "approver"
            raise ValueError(f"auto and {other} are both given; expected one: a rollback, a person, or --auto")
        if self.auto and not self.auto_promotion.allow:
            raise ValueError("auto is given, but auto_promotion.allow is false; expected --approver NAME")
        if self.rules.require_paired is None or self.auto:
            paired = self.auto or self.dataset is not None
            self.rules = self.rules.model_copy(update={"require_paired": paired})
        return self


def _report_path(folder: str, version: str, report: GateReport) -> Path:
    beside = "first" if report.champion_digest is None else report.champion_digest[:12]
    return Path(folder) / f"version-{version}-{report.bundle_digest[:12]}-beside-{beside}.json"


def _write_report(
    config: PromoteModelConfig,
    registry: Registry,
    target: ModelVersion,
    report: GateReport,
    champion: str | None,
    notes: list[str],
) -> dict[str, Any]:
    """Writes the table as JSON and Markdown, here and in MLflow beside the version; returns what the registry keeps.

    MLflow has room for 5,000 characters in a promotion's tag: less than the table of three contexts takes.
    """
    path = _report_path(config.reports, target.version, report)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(report.as_json() | {"notes": notes}, indent=1).encode()
    page = path.with_suffix(".md")
    replace_synced(path, content)
    replace_synced(page, markdown(report, target.version, champion, notes).encode())
    for file in (path, page):
        registry.log_artifact_file(target, file, "promotion_gate")
    return {
        "passed": report.passed,
        "bundle_digest": report.bundle_digest,
        "champion_digest": report.champion_digest,
        "dataset_digest": report.dataset_digest,
        "paired": report.paired,
        "report": str(path),
        "report_sha256": hashlib.sha256(content).hexdigest(),
    }


def _table(gate: dict[str, Any]) -> dict[str, Any]:
    """The table behind what the registry keeps of a gate; no more than that where the file is gone or another one."""
    try:
        content = Path(gate["report"]).read_bytes()
    except (KeyError, OSError):
        return gate
    if hashlib.sha256(content).hexdigest() != gate["report_sha256"]:
        return gate
    return {**json.loads(content), **gate}


def _key(event: dict[str, Any]) -> str:
    return f"{event['event']}@{event['at']}"


def _record(store: Store, event: dict[str, Any], deploy: bool) -> None:
    """Writes the decision to the approvals table and the audit chain, unless an earlier attempt did.

    Args:
        deploy: the service is swapped next; who finds that it was not does it.
    """
    if "event" not in event:
        return  # the alias was set by other means: there is no decision to record
    gate = _table(event["gate"]) | {"registry_event": _key(event), "previous": event["previous"], "deploy": deploy}
    record_move(store, event["action"], event["version"], event["approver"], event["reason"], gate)


def _finish_last(config: PromoteModelConfig, registry: Registry, store: Store) -> None:
    """Records what made the champion, if that run was cut off before it could: after another decision it would be lost,
    and its approval would count a second time."""
    champion, last = registry.find(CHAMPION), (registry.history() or [{}])[-1]
    if champion is not None and last.get("version") == champion.version and not is_recorded(store, _key(last)):
        _record(store, last, config.deploy)
        _mark(store, registry, {**last, "digest": champion.digest})


def _mark(store: Store, registry: Registry, event: dict[str, Any]) -> None:
    """What the service shows of the candidates; one that its training did not tell the store of stays unknown."""
    mark_candidate(store, event["version"], event["digest"], PROMOTED)
    if event.get("action") == "rollback":
        left = registry.resolve(event["previous"])
        mark_candidate(store, left.version, left.digest, REJECTED)


def _refuse_rejected(store: Store, version: str, digest: str) -> None:
    rejection = find_rejection(store, version, digest)
    if rejection is not None:
        raise ValueError(
            f"version {version} was rejected by {rejection['approver']} ({rejection['reason']}); expected another "
            "candidate"
        )


def _approval(config: PromoteModelConfig, store: Store, version: str, digest: str) -> tuple[str, str]:
    """Who decides, and why: the config's approver, `--auto`'s, else the last one of this version.

    Raises:
        ValueError: nobody has, or only who asked for the training; or a person has rejected it.
    """
    _refuse_rejected(store, version, digest)
    asked = requesters(store, version, digest)
    given = config.auto_promotion.configured_by.strip() if config.auto else config.approver
    if given is not None:
        if is_one_of(given, asked):
            detail = {"digest": digest, "requested_by": asked}
            record_refusal(store, given, APPROVAL_REFUSED, f"model/{version}", detail)
            field = "auto_promotion.configured_by" if config.auto else "approver"
            raise ValueError(f"{field} = {given!r} asked for version {version}; expected another person's approval")
        return (f"auto (configured by {given})" if config.auto else given), config.reason
    approval = open_approval(store, version, digest, asked)
    if approval is None:
        but = f" but {', '.join(asked)}, who asked for it" if open_approval(store, version, digest) else ""
        raise ValueError(
            f"nobody has approved version {version}{but}; give --approver NAME, or POST "
            f"/v1/candidates/{version}/approve"
        )
    return approval["approver"], config.reason or approval["reason"]


def judge_candidate(
    config: PromoteModelConfig, target: ModelVersion, bundle: Bundle, champion: ModelVersion | None, store: Store
) -> tuple[GateReport, list[str]]:
    """What the gate says of a candidate, line by line, and notes on how it was measured; it decides nothing.

    Args:
        target, bundle: the candidate.

    Raises:
        ValueError: see `gather_evidence`.
    """
    other = open_champion(champion)
    evidence, notes = gather_evidence(config, target, bundle, champion, other, store)
    report = check_gate(config.rules, bundle, other, evidence)
    for line in table_lines(report):
        say(line)
    beside = None if champion is None else champion.version
    tell_verdict(store, report.as_json() | {"notes": notes, "champion_version": beside}, evidence, bundle, other)
    return report, notes


def _promote(config: PromoteModelConfig, registry: Registry, store: Store) -> dict[str, Any]:
    target = registry.resolve(config.model or "candidate")
    bundle = load_bundle(target.uri, target.digest)
    champion = registry.find(CHAMPION)
    if champion is not None and champion.version == target.version:
        say(f"version {target.version} already is the champion")
        last = (registry.history() or [{}])[-1]
        event = last if last.get("version") == target.version else {"version": target.version}
        return {**event, "changed": False, "digest": bundle.digest}
    if config.auto and champion is None and not config.auto_promotion.first_champion:
        raise ValueError(
            "auto: there is no champion to compare with; expected --approver NAME, or auto_promotion.first_champion"
        )
    approver, reason = _approval(config, store, target.version, bundle.digest)
    report, notes = judge_candidate(config, target, bundle, champion, store)
    kept = _write_report(config, registry, target, report, None if champion is None else champion.version, notes)
    say(f"table: {Path(kept['report']).with_suffix('.md')}")
    if not report.passed:
        record_refusal(store, approver, PROMOTION_REFUSED, f"model/{target.version}", report.as_json())
        if not all(result.rule.startswith(_MAY_YET_PASS) for result in report.failed):
            mark_candidate(store, target.version, bundle.digest, REJECTED)
        failed = "; ".join(str(result) for result in report.failed)
        raise ValueError(f"version {target.version} of {config.model_name!r} does not pass the gate: {failed}")
    # The gate may have taken long enough for somebody to look at its table.
    _refuse_rejected(store, target.version, bundle.digest)
    event = registry.promote(target.version, approver, reason, kept)
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
    event = registry.rollback(config.approver, config.reason, champion.version)
    return {**event, "digest": previous.digest}


def _deploy_config(config: PromoteModelConfig) -> DeployServiceConfig | None:
    """The service's config, read before anything is decided; None without `deploy`.

    Raises:
        ValueError: it would deploy something else than what is promoted here.
    """
    if not config.deploy:
        return None
    from ray_jobs.deploy_service import DeployServiceConfig

    file = Path(config.deploy_config or REPO_ROOT / "configs" / "deploy_service.yaml")
    service = parse_config(DeployServiceConfig, [], file)
    for name in ("tracking_uri", "artifact_root", "model_name", "engine_sets", "store_url"):
        if getattr(service, name) != getattr(config, name):
            raise ValueError(
                f"deploy_config: {file} has {name} = {getattr(service, name)!r}; expected {getattr(config, name)!r}"
            )
    if service.bundle is not None or service.model != CHAMPION:
        raise ValueError(f"deploy_config: {file} does not serve the champion; expected model: champion and no bundle")
    return service


def _deploy(service: DeployServiceConfig, version: str) -> dict[str, Any]:
    from ray_jobs import deploy_service

    try:
        return deploy_service.run(service)
    except ValueError as error:
        raise ValueError(
            f"version {version} is the champion, but the service goes on with what it had: {error}; run this again, or "
            "deploy_service"
        ) from error


def run(config: PromoteModelConfig) -> dict[str, Any]:
    service = _deploy_config(config)
    registry = Registry(config.tracking_uri, config.model_name, config.artifact_root)
    # Opened first: without a store to record the decision in, the champion must not move.
    store = open_store(config.store_url)
    _finish_last(config, registry, store)
    event = _rollback(config, registry) if config.rollback else _promote(config, registry, store)
    _record(store, event, config.deploy)
    _mark(store, registry, event)
    gate = _table(event.get("gate", {}))
    deployed = None if service is None else _deploy(service, event["version"])
    if deployed is not None and "event" in event:
        note_deployed(store, event["version"], _key(event))
    return {
        "champion": event["version"],
        "previous": event.get("previous"),
        "changed": event["changed"],
        "action": "rollback" if config.rollback else "promote",
        "approver": event.get("approver"),
        "digest": event["digest"],
        "paired": gate.get("paired"),
        "gate": gate.get("results", []),
        "report": gate.get("report"),
        "deployed": deployed,
    }


if __name__ == "__main__":
    run_job("promote_model", PromoteModelConfig, run, __doc__)
