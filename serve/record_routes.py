"""The routes that read the log: pages of records, one record, its picture."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Header, Query, Request
from fastapi.responses import Response

from serve.access import check_owner
from serve.etags import matches
from serve.paging import decode_cursor, encode_cursor
from serve.record_api import (
    ITEM_PROBLEMS,
    READ_PROBLEMS,
    DatasetUse,
    Label,
    LabelledPrediction,
    LoggedPrediction,
    PredictionPage,
    Truth,
)
from serve.record_query import PredictionId, PredictionQuery
from serve.records import RecordService
from store.label_consensus import consensus

_CONTENT_TYPES = {".jpg": "image/jpeg", ".png": "image/png"}
_PICTURE = {
    200: {
        "description": "the stored picture",
        "content": {
            media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in _CONTENT_TYPES.values()
        },
    },
    304: {"description": "the picture is the one of If-None-Match"},
}


def add_record_routes(api: FastAPI, records: RecordService) -> None:
    """`GET /v1/predictions`, `GET /v1/predictions/{id}` and its `/image`."""

    @api.get("/v1/predictions", operation_id="list_predictions", responses=READ_PROBLEMS)
    async def predictions(query: Annotated[PredictionQuery, Query()]) -> PredictionPage:
        """Records, newest first, page by page."""
        wanted = query.to_filter(records.pseudonym)
        # One more than asked for tells whether there is a next page.
        rows = await records.page(wanted, decode_cursor(query.cursor, str), query.limit + 1)
        items = [LoggedPrediction(**LoggedPrediction.fields_of(row, row["labelled"])) for row in rows[: query.limit]]
        last = rows[query.limit - 1] if len(rows) > query.limit else None
        return PredictionPage(
            items=items, next_cursor=None if last is None else encode_cursor(last["received_at"], last["id"])
        )

    @api.get("/v1/predictions/{prediction_id}", operation_id="get_prediction", responses=ITEM_PROBLEMS)
    async def prediction(request: Request, prediction_id: PredictionId) -> LabelledPrediction:
        """One record with its labels. A caller sees its own, but no shadow's: nobody promoted that model."""
        row, labels = await records.record(prediction_id)
        check_owner(request, row["caller"], f"prediction_id {prediction_id!r}", row["role"] == "shadow")
        fields = LoggedPrediction.fields_of(row, bool(labels))
        used_in = [DatasetUse(**use._asdict()) for use in await records.used_in(prediction_id)]
        shown = [Label.of(label) for label in labels]
        truth = next(map(Truth.of, consensus(labels)), None)
        return LabelledPrediction(**fields, labels=shown, truth=truth, used_in=used_in)

    @api.get(
        "/v1/predictions/{prediction_id}/image",
        operation_id="get_image",
        response_class=Response,
        responses=_PICTURE | ITEM_PROBLEMS,
    )
    async def image(
        prediction_id: PredictionId,
        if_none_match: Annotated[str | None, Header(description="ETag of a picture that the client has")] = None,
    ) -> Response:
        """The picture as it was stored, for review."""
        name, suffix = await records.image_name(prediction_id)
        # Kept by the browser only, and asked for again each time: it may be erased.
        headers = {"ETag": f'"{name}"', "Cache-Control": "private, no-cache"}
        if matches(if_none_match, name):
            return Response(status_code=304, headers=headers)
        headers |= {
            "Content-Disposition": f'inline; filename="{name}{suffix}"',
            "X-Content-Type-Options": "nosniff",
        }
        data = await records.image(prediction_id, name, suffix)
        return Response(data, media_type=_CONTENT_TYPES.get(suffix, "application/octet-stream"), headers=headers)
