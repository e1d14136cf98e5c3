"""The routes of whoever watches the service: alarms, their acknowledgement, figures of the last hours."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from serve.access import caller_of
from serve.label_routes import MAX_COMMENT_LENGTH
from serve.lesion import parse_text
from serve.paging import decode_cursor, encode_cursor
from serve.record_api import (
    BODY_PROBLEMS,
    READ_PROBLEMS,
    AcknowledgeRequest,
    Alarm,
    AlarmPage,
    Cursor,
    Limit,
    MonitoringSummary,
)
from serve.records import RecordService
from serve.times import utc


class AlarmQuery(BaseModel):
    """Filters of a page of alarms."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"unacknowledged": True}]})

    unacknowledged: bool = Field(False, description="only those that no one has acknowledged")
    kind: str | None = Field(None, examples=["missed_cancer"])
    quieted: bool | None = Field(None, description="only those that repeat an earlier one; false: only the others")
    cursor: Cursor = None
    limit: Limit = 50


class SummaryQuery(BaseModel):
    """The window of a summary; it ends now."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"hours": 24}]})

    hours: int = Field(24, ge=1, le=720)


def add_alarm_routes(api: FastAPI, records: RecordService) -> None:
    """`GET /v1/alarms`, `POST /v1/alarms/{id}/acknowledge` and `GET /v1/monitoring/summary`."""

    @api.get("/v1/alarms", operation_id="list_alarms", responses=READ_PROBLEMS)
    async def alarms(query: Annotated[AlarmQuery, Query()]) -> AlarmPage:
        """Alarms, newest first, page by page."""
        after = decode_cursor(query.cursor, int)
        kind = parse_text(query.kind, "kind")
        rows = await records.alarms(query.unacknowledged, kind, after, query.limit + 1, query.quieted)
        last = rows[query.limit - 1] if len(rows) > query.limit else None
        return AlarmPage(
            items=[Alarm.of(row) for row in rows[: query.limit]],
            next_cursor=None if last is None else encode_cursor(last["raised_at"], last["id"]),
        )

    @api.post("/v1/alarms/{alarm_id}/acknowledge", operation_id="acknowledge_alarm", responses=BODY_PROBLEMS)
    async def acknowledge(
        request: Request,
        alarm_id: Annotated[int, Path(ge=1, le=2**63 - 1)],
        body: AcknowledgeRequest | None = None,
    ) -> Alarm:
        """Says that someone has seen an alarm, and those that it quiets; the first to do so stays on record."""
        comment = parse_text(body and body.comment, "comment", MAX_COMMENT_LENGTH, multiline=True)
        return Alarm.of(await records.acknowledge(alarm_id, caller_of(request).name, comment))

    @api.get("/v1/monitoring/summary", operation_id="get_summary", responses=READ_PROBLEMS)
    async def summary(query: Annotated[SummaryQuery, Query()]) -> MonitoringSummary:
        """Figures of the last hours: predictions, abstentions, times, drift, alarms, labels."""
        figures = await records.summary(query.hours)
        per_hour = [{**entry, "start": utc(entry["start_us"])} for entry in figures["per_hour"]]
        drift = [
            {**row, "window_start": utc(row["window_start"]), "window_end": utc(row["window_end"])}
            for row in figures["drift"]
        ]
        window = {"start": utc(figures["start_us"]), "end": utc(figures["end_us"])}
        return MonitoringSummary.model_validate({**figures, **window, "per_hour": per_hour, "drift": drift})
