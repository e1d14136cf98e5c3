"""What is wrong with the service now, in the order of urgency: what an operator reads first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from serve.monitoring_data import OVERDUE_US, Model, StoreState
from serve.page_templates import window_name
from store.monitoring_summary import HOUR_US

Level = Literal["critical", "warning"]

HEADLINES = {
    "critical": "Something is wrong, and needs someone now.",
    "warning": "Something needs a look today.",
    None: "Nothing is known to be wrong.",
}
# As in the alert rules of deploy/prometheus.
_ABSTAINED, _MIN_ANSWERS = 0.2, 50
_WAITED_US = HOUR_US // 2
_NODES = {"image_scorer": "the image scorer", "metadata_fusion": "the metadata fusion", "log": "the drift logger"}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong; `target`: the part of the page that says more."""

    level: Level
    text: str
    target: str


@dataclass(frozen=True)
class ReplicaState:
    """What the replica that answers knows by itself.

    Attributes:
        nodes: state of each node, see `PredictionService.readiness`; None: they did not answer in time.
        spooled: batches of predictions that wait on its disk; damaged: those that were set aside.
    """

    nodes: Mapping[str, str] | None
    spooled: int
    damaged: int


def findings(model: Model, replica: ReplicaState, store: StoreState | None, now: int) -> list[Finding]:
    """All that is wrong, critical things first.

    Args:
        store: None: it does not answer.
        now: microseconds UTC.
    """
    found = _of_replica(replica)
    if store is None:
        detail = "The store does not answer: alarms, drift, labels and figures are not known now."
        found.insert(0, Finding("critical", detail, "service"))
    else:
        found += _of_alarms(store) + _of_checks(model, store, now) + _of_work(store, now)
    return sorted(found, key=lambda finding: finding.level != "critical")


def worst(found: list[Finding]) -> Level | None:
    """The level of the first finding; None where nothing is wrong."""
    return found[0].level if found else None


def _of_replica(replica: ReplicaState) -> list[Finding]:
    found: list[Finding] = []
    if replica.nodes is None:
        found.append(Finding("critical", "The nodes of the service do not answer.", "service"))
    for name, state in (replica.nodes or {}).items():
        if state == "spooling":
            text = "Predictions are kept on one node's disk, and do not reach the store."
            found.append(Finding("critical", text, "service"))
        elif state != "ok":
            text = f"Of the service's nodes, {_NODES.get(name, name)} says: {state}."
            found.append(Finding("critical", text, "service"))
    if replica.spooled:
        verb = "waits" if replica.spooled == 1 else "wait"
        text = f"{_number(replica.spooled, 'batch', 'batches')} of predictions {verb} on this replica's disk."
        found.append(Finding("warning", text, "service"))
    if replica.damaged:
        text = f"{_number(replica.damaged, 'batch', 'batches')} of predictions could not be stored whole (*.damaged)."
        found.append(Finding("warning", text, "service"))
    return found


def _of_alarms(store: StoreState) -> list[Finding]:
    found: list[Finding] = []
    for level, name in (("critical", "critical alarm"), ("warning", "warning")):
        kinds = {kind: number for (kind, severity), number in sorted(store.open.items()) if severity == level}
        if kinds:
            total = sum(kinds.values())
            named = ", ".join(kind.replace("_", " ") for kind in kinds)
            text = f"{_number(total, name, name + 's')} {'is' if total == 1 else 'are'} open: {named}."
            found.append(Finding(level, text, "alarms"))  # type: ignore[arg-type]
    for channel, number in sorted(store.undelivered.items()):
        text = f"Channel {channel} did not take {_number(number, 'open alarm', 'open alarms')}."
        found.append(Finding("warning", text, "alarms"))
    return found


def _of_checks(model: Model, store: StoreState, now: int) -> list[Finding]:
    check = store.check
    if check is None:
        text = f"Model {model.version} has answered for more than a day, and nobody looked for drift."
        return [Finding("warning", text, "drift")] if store.checkable else []
    found: list[Finding] = []
    age = now - check["window_end"]
    if age > OVERDUE_US:
        text = f"The drift check is overdue: the last window ended {age // HOUR_US:,} hours ago."
        found.append(Finding("warning", text, "drift"))
    if check["alarm"]:
        named = ", ".join(check["drifted"][:5]) + (" and others" if len(check["drifted"]) > 5 else "")
        found.append(Finding("warning", f"The last drift check ({window_name(check)}) found drift: {named}.", "drift"))
    for problem in check["problems"] or []:
        found.append(Finding("warning", f"On experts' labels the model is worse than it was: {problem}.", "quality"))
    return found


def _of_work(store: StoreState, now: int) -> list[Finding]:
    found: list[Finding] = []
    queue = store.queue
    if queue.oldest_at is not None and now - queue.oldest_at > _WAITED_US:
        text = f"A submission has waited for {(now - queue.oldest_at) // 60_000_000:,} minutes."
        found.append(Finding("warning", text, "service"))
    if queue.failed:
        text = f"{_number(queue.failed, 'submission', 'submissions')} failed in the last 24 hours."
        found.append(Finding("warning", text, "service"))
    if store.answers >= _MIN_ANSWERS and store.abstained > _ABSTAINED * store.answers:
        share = round(100 * store.abstained / store.answers)
        text = f"In the last hour the model gave no risk for {share} % of the lesions."
        found.append(Finding("warning", text, "traffic"))
    return found


def _number(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
