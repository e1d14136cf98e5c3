"""When a model should be trained again: facts in, triggers out.

A trigger's key names its cause. The store takes a cause once: the same drift, the same batch of labels or the same
period leads to one retraining, and to another one only where that failed. A cool-down after each retraining keeps a
cause that goes on from asking every day.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

DAY_US = 86_400_000_000
Kind = Literal["drift", "new_labels", "schedule"]


class DriftTrigger(BaseModel):
    """So many windows of the champion, drifted within the last days."""

    model_config = ConfigDict(extra="forbid")

    windows: int = Field(2, ge=1, le=1000, description="drifted windows that are needed")
    days: float = Field(3, gt=0, le=366, description="within so many days before now")


class NewLabelsTrigger(BaseModel):
    """So many labelled predictions that the champion's data set does not hold."""

    model_config = ConfigDict(extra="forbid")

    count: int = Field(200, ge=1)


class ScheduleTrigger(BaseModel):
    """So many days since the last retraining was done or, without one, since the champion was trained."""

    model_config = ConfigDict(extra="forbid")

    days: float = Field(90, gt=0, le=3660)


class TriggerRules(BaseModel):
    """Which triggers there are; null switches one off."""

    model_config = ConfigDict(extra="forbid")

    drift: DriftTrigger | None = Field(default_factory=DriftTrigger)
    new_labels: NewLabelsTrigger | None = Field(default_factory=NewLabelsTrigger)
    schedule: ScheduleTrigger | None = Field(default_factory=ScheduleTrigger)
    cool_down_days: float = Field(7, ge=0, le=366, description="no trigger so long after a retraining has ended")


class DriftWindow(NamedTuple):
    """A checked window: microseconds UTC, and whether it drifted."""

    start: int
    end: int
    drifted: bool


@dataclass(frozen=True)
class RetrainingFacts:
    """What is known at `now` (all times microseconds UTC).

    Attributes:
        model_version: the champion; None: there is none, and nothing triggers.
        dataset_digest: of the data set version that it was trained on.
        windows: of the champion, in any order; those that end after `now` are not looked at.
        new_labels: labelled predictions that this data set version does not hold.
        model_since: when the champion was trained, where known.
        last_done, last_ended: the last retraining that led to a candidate, and the last one at all.
    """

    now: int
    model_version: str | None
    dataset_digest: str = ""
    windows: Sequence[DriftWindow] = ()
    new_labels: int = 0
    model_since: int | None = None
    last_done: int | None = None
    last_ended: int | None = None


class Trigger(NamedTuple):
    """A cause that holds.

    Attributes:
        key: the same for the same cause.
        detail: the figures behind it, as JSON.
    """

    kind: Kind
    key: str
    reason: str
    detail: dict[str, Any]


def find_triggers(rules: TriggerRules, facts: RetrainingFacts) -> list[Trigger]:
    """The causes that hold, the most urgent first; none within the cool-down, and none without a champion."""
    if facts.model_version is None or cooling_down(rules, facts):
        return []
    found = [_drift(rules.drift, facts), _new_labels(rules.new_labels, facts), _schedule(rules.schedule, facts)]
    return [trigger for trigger in found if trigger is not None]


def cooling_down(rules: TriggerRules, facts: RetrainingFacts) -> bool:
    """Whether the last retraining ended less than `cool_down_days` ago."""
    return facts.last_ended is not None and facts.now - facts.last_ended < rules.cool_down_days * DAY_US


def _drift(rule: DriftTrigger | None, facts: RetrainingFacts) -> Trigger | None:
    if rule is None:
        return None
    span = int(rule.days * DAY_US)
    drifted = sorted(window for window in facts.windows if window.drifted and window.end <= facts.now)
    recent = [window for window in drifted if window.end > facts.now - span]
    if len(recent) < rule.windows:
        return None
    # The drift began with the first of the windows that follow each other so closely: the key stays while it lasts.
    first = drifted[-1]
    for window in reversed(drifted[:-1]):
        if first.start - window.end >= span:
            break
        first = window
    reason = f"{len(recent)} windows of model {facts.model_version} drifted within {rule.days:g} days"
    detail = {"windows": [[window.start, window.end] for window in recent], "since": first.start}
    return Trigger("drift", f"drift:{facts.model_version}:{first.start}", reason, detail)


def _new_labels(rule: NewLabelsTrigger | None, facts: RetrainingFacts) -> Trigger | None:
    if rule is None or facts.new_labels < rule.count:
        return None
    reason = f"{facts.new_labels} labelled predictions since data set {facts.dataset_digest[:12]}"
    key = f"new_labels:{facts.dataset_digest[:16]}:{facts.new_labels // rule.count}"
    return Trigger("new_labels", key, reason, {"new_labels": facts.new_labels, "needed": rule.count})


def _schedule(rule: ScheduleTrigger | None, facts: RetrainingFacts) -> Trigger | None:
    if rule is None:
        return None
    since = max((moment for moment in (facts.last_done, facts.model_since) if moment is not None), default=None)
    span = int(rule.days * DAY_US)
    if since is not None and facts.now - since < span:
        return None
    days = "never before" if since is None else f"{(facts.now - since) / DAY_US:.1f} days ago"
    reason = f"due every {rule.days:g} days, last {days}"
    # Counted from the last training: a period that began at a fixed date could end the day after it.
    period = facts.now // span if since is None else (facts.now - since) // span
    return Trigger("schedule", f"schedule:{since or 0}:{period}", reason, {"since": since, "days": rule.days})
