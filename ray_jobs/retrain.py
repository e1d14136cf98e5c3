"""Trains again when a trigger holds: drift, new labels, a schedule, or someone who asks (`--trigger manual`).

The cause is recorded as a request, one at a time is worked on, and each stage's result is kept: data set, training,
engines, and what the gate says of the candidate. Run again, it goes on where a killed one stopped. The champion stays.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from modeling.bundle import load_bundle
from modeling.locations import SUBMITTED
from modeling.registry import CHAMPION
from monitoring.alarms import raise_alarm
from monitoring.retraining_triggers import (
    DAY_US,
    DriftWindow,
    RetrainingFacts,
    Trigger,
    TriggerRules,
    cooling_down,
    find_triggers,
)
from ray_jobs.job import JobConfig, Location, run_job, say
from ray_jobs.retraining_driver import StageFailedError, work
from ray_jobs.retraining_stages import StepConfig, check_steps, labels_required, open_registry, retraining_stages
from store.alarm_topics import topic_name
from store.database import Store, StoreUnavailableError, open_store
from store.retraining import find_retraining, open_retrainings, request_retraining
from store.retraining_facts import candidate_since, count_new_labels, drift_windows, last_retrainings
from store.retraining_queue import RetrainTakenOverError, claim_retraining, retrainings_failed_since
from store.tables import now_us

# Who asked, where no person did.
ASKED_BY = "retraining trigger"
_ALARM_DAYS = 30


class RetrainConfig(JobConfig):
    trigger: Literal["manual"] | None = Field(None, description="manual: asks now, with --reason and --requested-by")
    reason: str = Field("", max_length=1000, description="of a manual one")
    requested_by: str | None = Field(None, max_length=255, description="who asks; cannot approve the candidate")
    triggers: TriggerRules = Field(default_factory=TriggerRules)
    at: datetime | None = Field(None, description="time to judge the triggers at, UTC; null: now")
    prepare: StepConfig | None = Field(
        StepConfig(config="configs/prepare_dataset.yaml"), description="null: the data set of `train` as it is"
    )
    train: StepConfig = StepConfig(config="configs/train_model.yaml")
    export: StepConfig = StepConfig(config="configs/export_engine.yaml")
    gate: StepConfig = StepConfig(config="configs/promote_model.yaml")
    warm_start: bool = Field(False, description="begin with the weights of the champion's networks, where that is fair")
    lease_s: float = Field(300, ge=0.2, le=86_400, description="a driver that was not heard of for so long is gone")
    max_attempts: int = Field(3, ge=1, le=100, description="drivers that may be lost before the request fails")
    runs: Location = "runs"
    bundles: Location = "bundles"
    engine_sets: Location = "engine_sets"
    store_url: Location = "sqlite:///store.db"
    tracking_uri: Location = "sqlite:///mlflow.db"
    artifact_root: Location = "mlflow-artifacts"
    model_name: str = "dermray"

    @field_validator("at")
    @classmethod
    def _aware(cls, at: datetime | None) -> datetime | None:
        return at.replace(tzinfo=UTC) if at is not None and at.tzinfo is None else at

    @model_validator(mode="after")
    def _a_person_says_why(self) -> RetrainConfig:
        for name in ("reason", "requested_by"):
            # A flag without a value arrives as "true".
            missing = not (getattr(self, name) or "").strip() or getattr(self, name) == "true"
            if self.trigger == "manual" and missing:
                raise ValueError(f"{name} is missing; expected --{name.replace('_', '-')} with --trigger manual")
        return self


def gather_facts(config: RetrainConfig, store: Store, now: int) -> RetrainingFacts:
    """What the triggers are judged by.

    Args:
        now: microseconds UTC.

    Raises:
        ValueError: the champion's bundle is gone or damaged.
    """
    champion = open_registry(config).find(CHAMPION)
    last_done, last_ended = last_retrainings(store, now)
    if champion is None:
        return RetrainingFacts(now, None, last_done=last_done, last_ended=last_ended)
    dataset = load_bundle(champion.uri, champion.digest).manifest.dataset_digest
    return RetrainingFacts(
        now=now,
        model_version=champion.version,
        dataset_digest=dataset,
        windows=[DriftWindow(*window) for window in drift_windows(store, champion.version, now)],
        new_labels=count_new_labels(store, dataset, now, labels_required(config)),
        model_since=candidate_since(store, champion.version),
        last_done=last_done,
        last_ended=last_ended,
    )


def ask(config: RetrainConfig, store: Store, now: int) -> tuple[str | None, list[Trigger]]:
    """Records a request where a person asks or a cause holds; returns its id where it is new, and the causes.

    A cause asks only while no request is open: the model that comes of that one may well answer it. Of several, the
    most urgent asks, and the request names them all.
    """
    if config.trigger is not None:
        who = str(config.requested_by)
        row, new = request_retraining(store, config.trigger, config.trigger, config.reason, who)
        say(f"retraining {row['id'][:8]}: {'requested' if new else 'an open request of this trigger'}")
        return row["id"] if new else None, []
    facts = gather_facts(config, store, now)
    found = find_triggers(config.triggers, facts)
    if not found:
        quiet = "cooling down after the last one" if cooling_down(config.triggers, facts) else "no trigger holds"
        say("no champion: nothing to train again" if facts.model_version is None else quiet)
        return None, []
    if open_retrainings(store):
        say("a request is open: none is added")
        return None, found
    first = found[0]
    reason = "; ".join(trigger.reason for trigger in found)
    detail = {trigger.kind: trigger.detail for trigger in found}
    detail = {"model_version": facts.model_version, "causes": detail}
    row, new = request_retraining(store, first.key, first.kind, reason, ASKED_BY, detail, once=True)
    say(f"retraining {row['id'][:8]}: {reason}{'' if new else ': asked for before'}")
    return row["id"] if new else None, found


def alarm_of(row: dict[str, Any]) -> dict[str, Any]:
    """The alarm of a failed request. It does not quote the error, which may name a lesion: alarms leave the house.

    Its topic is the trigger: a cause that fails in the same stage again within the cool-down says nothing new.
    """
    return {
        "dedupe_key": topic_name("retraining", row["id"]),
        "topic": topic_name("retraining", row["trigger"]),
        "kind": "retraining",
        "severity": "warning",
        "model_version": row["model_version"],
        "message": f"retraining {row['id']} ({row['trigger']}) failed in stage {row['stage'] or 'none'}; the champion "
        f"is unchanged; GET /v1/retrain/{row['id']} has the reason",
        "detail": {
            "retrain_id": row["id"],
            "trigger": row["trigger"],
            "stage": row["stage"],
            "attempt": row["attempt"],
            "findings": [row["stage"] or "none"],
        },
    }


def raise_alarms(store: Store) -> None:
    """One alarm for each request that failed lately, also one whose driver was killed before it could say so."""
    for row in retrainings_failed_since(store, now_us() - _ALARM_DAYS * DAY_US):
        raise_alarm(store, alarm_of(row))


def job_id() -> str | None:
    """The id of the submitted job that this process is; None where it was started by hand."""
    facts = json.loads(os.environ.get(SUBMITTED) or "{}")
    return (facts.get("metadata") or {}).get("job_submission_id")


def run(config: RetrainConfig) -> dict[str, Any]:
    check_steps(config)
    done: list[str] = []
    try:
        store = open_store(config.store_url)
        requested, causes = ask(config, store, now_us() if config.at is None else int(config.at.timestamp() * 1e6))
        # After each one: a person may have asked meanwhile.
        while (claim := claim_retraining(store, int(config.lease_s * 1e6), config.max_attempts, job_id())) is not None:
            say(
                f"retraining {claim.id[:8]}: attempt {claim.attempt}, asked for by {claim.requested_by}: {claim.reason}"
            )
            try:
                work(store, claim, retraining_stages(config, claim, store), config.lease_s, say)
            finally:
                raise_alarms(store)
            done.append(claim.id)
        raise_alarms(store)
        waiting = open_retrainings(store)
        rows = [find_retraining(store, request_id) for request_id in done]
    except StoreUnavailableError as error:
        raise ValueError(f"{error}; run it again once the store answers") from error
    except RetrainTakenOverError as error:
        raise ValueError(str(error)) from error
    except StageFailedError as error:
        if error.by_user:
            raise ValueError(str(error)) from error
        raise
    if waiting:
        say(f"{waiting} open, one of them at work elsewhere")
    shown = ("id", "trigger", "reason", "state", "attempt", "model_version")
    return {
        "requested": requested,
        "causes": [trigger.kind for trigger in causes],
        "retrainings": [
            {name: row[name] for name in shown} | {"gate_passed": row["detail"]["stages"]["gate"]["passed"]}
            for row in rows
            if row is not None
        ],
        "open": waiting,
    }


if __name__ == "__main__":
    run_job("retrain", RetrainConfig, run, __doc__)
