"""The route by which experts say what a lesion was."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from serve.access import caller_of
from serve.api import Problem
from serve.errors import invalid_field
from serve.lesion import parse_past_time, parse_text
from serve.prediction_service import PredictionService
from serve.record_api import BODY_PROBLEMS, Label, LabelRequest
from serve.records import RecordService
from store.labels import NewLabel
from store.shadow_records import SHADOW_SUFFIX, is_shadow_id

MAX_COMMENT_LENGTH = 2000


def add_label_routes(api: FastAPI, service: PredictionService, records: RecordService) -> None:
    """`POST /v1/labels`."""
    answers = {
        200: {"model": Label, "description": "the labeller's latest label says the same; nothing was stored"},
        409: {"model": Problem, "description": "an adjudication by someone who has read this lesion"},
    }

    @api.post("/v1/labels", operation_id="add_label", status_code=201, responses=answers | BODY_PROBLEMS)
    async def label(request: Request, response: Response, body: LabelRequest) -> Label:
        """Stores an expert's label of a prediction.

        A labeller's later label supersedes the earlier one, which is kept. A malignant label on a prediction below its
        threshold raises an alarm, once per prediction. An adjudication settles what two readers see differently; it
        comes from a third, and may rest on more than the picture.
        """
        task, caller = service.model.task, caller_of(request).name
        if body.label not in task.classes:
            raise invalid_field(f"label: {body.label!r}; expected one of {', '.join(task.classes)}")
        if is_shadow_id(body.prediction_id):
            answered = body.prediction_id.removesuffix(SHADOW_SUFFIX)
            raise invalid_field(f"prediction_id: {body.prediction_id!r} answered nobody; expected {answered!r}")
        new = NewLabel(
            prediction_id=body.prediction_id,
            label=body.label,
            malignant=body.label in task.malignant,
            labeller=parse_text(body.labeller, "labeller") or caller,
            labelled_at=parse_past_time(body.labelled_at, "labelled_at"),
            confidence=body.confidence,
            comment=parse_text(body.comment, "comment", MAX_COMMENT_LENGTH, multiline=True),
            adjudication=body.adjudication,
        )
        added = await records.label(new, caller)
        if not added.is_new:
            response.status_code = 200
        return Label.of(added.row)
