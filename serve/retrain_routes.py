"""Asking for a training: the routes record and show, the job `retrain` does the work."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import FastAPI, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict

from monitoring.prediction_log import PredictionLog
from serve.access import caller_of
from serve.api import PROBLEMS, Problem
from serve.errors import ApiError
from serve.paging import decode_cursor, encode_cursor
from serve.record_api import READ_PROBLEMS, Cursor, Limit
from serve.store_calls import StoreCalls
from serve.training_api import RetrainAccepted, Retraining, RetrainingPage, RetrainOrder
from store.retraining import find_retraining, list_retrainings, request_retraining

_ID = re.compile(r"[0-9a-f]{32}")


class RetrainQuery(BaseModel):
    """A page of requests to train."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"limit": 20}]})

    cursor: Cursor = None
    limit: Limit = 20


def add_retrain_routes(api: FastAPI, log: PredictionLog, retry_after_s: int) -> None:
    """`POST /v1/retrain`, `GET /v1/retrain` and `GET /v1/retrain/{id}`: they record and show, the job works."""
    records = StoreCalls(log, retry_after_s, "retraining", threads=1)
    bad = {status: PROBLEMS[status] for status in (400, 408, 413, 422)}
    open_already = {"model": RetrainAccepted, "description": "a request of this trigger is open: this one"}

    @api.post("/v1/retrain", operation_id="request_retraining", status_code=202, responses={200: open_already, **bad})
    async def retrain(request: Request, response: Response, order: RetrainOrder) -> RetrainAccepted:
        """Asks for a training. One request per trigger is open at a time; asking again answers with that one."""
        name = caller_of(request).name
        row, new = await records(request_retraining, order.trigger, order.trigger, order.reason, name)
        url = f"/v1/retrain/{row['id']}"
        response.status_code = 202 if new else 200
        response.headers["Location"] = url
        return RetrainAccepted(retrain_id=row["id"], state=row["state"], status_url=url)

    @api.get("/v1/retrain", operation_id="list_retrainings", responses=READ_PROBLEMS)
    async def retrainings(query: Annotated[RetrainQuery, Query()]) -> RetrainingPage:
        """Requests to train, newest first, page by page."""
        rows = await records(list_retrainings, decode_cursor(query.cursor, str), query.limit + 1)
        last = rows[query.limit - 1] if len(rows) > query.limit else None
        return RetrainingPage(
            items=[Retraining.of(row) for row in rows[: query.limit]],
            next_cursor=None if last is None else encode_cursor(last["requested_at"], last["id"]),
        )

    @api.get(
        "/v1/retrain/{retrain_id}",
        operation_id="get_retraining",
        responses={404: {"model": Problem, "description": "no such request"}},
    )
    async def retraining(retrain_id: Annotated[str, Path(description="as POST /v1/retrain answered")]) -> Retraining:
        """State of a request to train, and the candidate that came of it."""
        row = await records(find_retraining, retrain_id) if _ID.fullmatch(retrain_id) else None
        if row is None:
            raise ApiError(404, "not_found", "retrain_id: no such request")
        return Retraining.of(row)
