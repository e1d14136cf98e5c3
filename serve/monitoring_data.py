"""What `/monitoring` reads of the store, part by part, in threads of its own; and what it writes there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from monitoring.prediction_log import PredictionLog
from serve.store_calls import StoreCalls
from store.alarm_deliveries import FAILED, count_deliveries
from store.alarm_figures import open_alarms
from store.alarm_records import acknowledge_alarm, alarms_page, count_repeats, find_alarm
from store.database import Store
from store.drift_history import drift_history, find_drift_report
from store.monitoring_summary import HOUR_US, answered_before, count_answers, monitoring_summary
from store.retraining import find_retraining, list_retrainings, request_retraining
from store.risk_samples import LabelledRisk, Risk, labelled_risks, recent_risks
from store.submissions import QueueState, queue_state
from store.tables import SCHEMA_VERSION

DAY_US = 24 * HOUR_US
# A day's window ends at midnight and is checked in the hours after; the alert rules of deploy/prometheus have the same.
OVERDUE_US = 36 * HOUR_US
# Windows that the drift charts show.
WINDOWS = 30
# Labels are few and come late; check_drift measures quality on as many days.
QUALITY_DAYS = 30
RETRAININGS = 20
# A page is looked at, not waited for.
_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Model:
    """The model that is asked about: its version in the registry, and its bundle's digest."""

    version: str
    digest: str


@dataclass(frozen=True)
class StoreState:
    """What may be wrong now, as the store has it.

    Attributes:
        database: "sqlite" or "postgresql"; schema: revision of its tables.
        open: open alarms by (kind, severity).
        undelivered: open alarms that a channel was given up on, by channel.
        check: the newest drift report of the model, see `drift_history`.
        checkable: this model answered so long ago that a check is overdue if there is none.
        answers, abstained: of the last hour.
    """

    database: str
    schema: int
    open: dict[tuple[str, str], int]
    undelivered: dict[str, int]
    check: dict[str, Any] | None
    checkable: bool
    queue: QueueState
    answers: int
    abstained: int


@dataclass(frozen=True)
class Figures:
    """A window of hours up to now, and the model's quality.

    Attributes:
        summary: see `monitoring_summary`.
        risks: newest scored answers of the window.
        history: see `drift_history`; newest: its last row as a whole.
        labelled: scored answers of the last `QUALITY_DAYS` of which it is known what they were; truncated: not of all
            labels.
    """

    summary: dict[str, Any]
    risks: list[Risk]
    history: list[dict[str, Any]]
    newest: dict[str, Any] | None
    labelled: list[LabelledRisk]
    truncated: bool


@dataclass(frozen=True)
class AlarmList:
    """One page of alarms.

    Attributes:
        more: whether there are older ones.
        repeats: number of alarms that each quiets, by id.
        acknowledged: the alarm that was asked about by id.
    """

    rows: list[dict[str, Any]]
    more: bool
    repeats: dict[int, int]
    acknowledged: dict[str, Any] | None


class MonitoringData:
    """The store's side of the page. Every method raises ApiError 503 while the store does not answer."""

    def __init__(self, log: PredictionLog, retry_after_s: int):
        self._call = StoreCalls(log, retry_after_s, "monitoring", timeout_s=_TIMEOUT_S)

    async def state(self, model: Model, now: int) -> StoreState:
        """What may be wrong at `now` (microseconds UTC)."""
        return await self._call(_state, model, now)

    async def figures(self, model: Model, now: int, hours: int) -> Figures:
        """The window of `hours` up to `now`."""
        return await self._call(_figures, model, now, hours)

    async def alarms(
        self,
        unacknowledged: bool,
        quieted: bool | None,
        after: tuple[int, int] | None,
        limit: int,
        acknowledged: int | None,
    ) -> AlarmList:
        """See `alarms_page`; `acknowledged`: id of an alarm to look up."""
        return await self._call(_alarms, unacknowledged, quieted, after, limit, acknowledged)

    async def retrainings(self, asked: str | None) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """The newest requests to train, and the one of this id."""
        return await self._call(_retrainings, asked)

    async def drift_report(self, report_id: int) -> dict[str, Any] | None:
        """See `find_drift_report`."""
        return await self._call(find_drift_report, report_id)

    async def acknowledge(self, alarm_id: int, actor: str, comment: str | None) -> dict[str, Any] | None:
        """See `acknowledge_alarm`."""
        return await self._call(acknowledge_alarm, alarm_id, actor, comment)

    async def request_retraining(self, reason: str, actor: str) -> dict[str, Any]:
        """Asks for a training by hand; the request that is open then, see `request_retraining`."""
        row, _ = await self._call(request_retraining, "manual", "manual", reason, actor)
        return row


def _state(store: Store, model: Model, now: int) -> StoreState:
    checks = drift_history(store, model.version, model.digest, 1)
    failed = {
        channel: number
        for (channel, state), number in count_deliveries(store, open_only=True).items()
        if state == FAILED
    }
    answers, abstained = count_answers(store, now - HOUR_US, now)
    return StoreState(
        database=store.engine.dialect.name,
        schema=SCHEMA_VERSION,
        open=open_alarms(store),
        undelivered=failed,
        check=checks[-1] if checks else None,
        checkable=not checks and answered_before(store, model.version, now - OVERDUE_US),
        queue=queue_state(store, now - DAY_US),
        answers=answers,
        abstained=abstained,
    )


def _figures(store: Store, model: Model, now: int, hours: int) -> Figures:
    history = drift_history(store, model.version, model.digest, WINDOWS)
    labelled, truncated = labelled_risks(store, model.version, now - QUALITY_DAYS * DAY_US, now)
    return Figures(
        summary=monitoring_summary(store, now, hours),
        risks=recent_risks(store, model.version, now - hours * HOUR_US, now),
        history=history,
        newest=find_drift_report(store, history[-1]["id"]) if history else None,
        labelled=labelled,
        truncated=truncated,
    )


def _alarms(
    store: Store,
    unacknowledged: bool,
    quieted: bool | None,
    after: tuple[int, int] | None,
    limit: int,
    acknowledged: int | None,
) -> AlarmList:
    found = alarms_page(store, unacknowledged, None, after, limit + 1, quieted)
    rows = found[:limit]
    repeats = count_repeats(store, [row["id"] for row in rows])
    return AlarmList(
        rows, len(found) > limit, repeats, None if acknowledged is None else find_alarm(store, acknowledged)
    )


def _retrainings(store: Store, asked: str | None) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    return list_retrainings(store, None, RETRAININGS), None if asked is None else find_retraining(store, asked)
