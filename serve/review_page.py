"""`/review`: a reader says what lesions are, one after the other, without seeing what the model said before."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from serve.access import caller_of
from serve.analyse_fields import form_fields
from serve.backend import Backend
from serve.errors import invalid_field
from serve.label_routes import MAX_COMMENT_LENGTH
from serve.lesion import parse_text
from serve.lesion_view import BANDS
from serve.page_forms import read_form, text_field
from serve.page_pictures import PagePictures, picture_headers, unchanged
from serve.page_templates import render
from store.label_consensus import consensus
from store.labels import NewLabel
from store.shadow_records import is_shadow_id
from store.tables import now_us

REVIEW_PATH = "/review"
# Lesions received before are left to `export_label_tasks`.
DAYS = 30
CONFIDENCES = {"certain": 0.95, "probable": 0.8, "unsure": 0.6}
# For the eye; a thumbnail of a patient's other lesions.
_LARGE, _SMALL = 1024, 160
_DAY_US = 86_400_000_000
_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def add_review_routes(api: FastAPI, backend: Backend) -> None:
    """`GET` and `POST /review`, and the pictures of `GET /review/{id}/...`."""
    service, records = backend.service, backend.records
    pictures = PagePictures(service.settings.retry_after_s)

    def _since() -> int:
        return now_us() - DAYS * _DAY_US

    async def _lesion(prediction_id: str, why: str) -> dict[str, Any]:
        """What a reader sees of a lesion: nothing that the model or another reader said."""
        row, _ = await records.record(prediction_id)
        known = {field.column: f"{field.label} {field.unit}".strip() for field in form_fields(service.model.task)}
        # What people can say of a lesion; a photograph system's dozens of figures lead nobody.
        metadata = {label: row["metadata"].get(name) for name, label in known.items()}
        others = await records.patient_lesions(prediction_id)
        return {
            "id": prediction_id,
            "why": why,
            "received": _day(row["received_at"]),
            "metadata": {
                label: f"{value:g}" if isinstance(value, float) else value for label, value in metadata.items()
            },
            "institution": row["institution"],
            "device": row["device"],
            "others": [{**other, "received": _day(other["received_at"])} for other in others],
        }

    async def _said(prediction_id: str, reader: str) -> dict[str, Any] | None:
        """What the model and this reader said of a lesion; None before the reader has."""
        row, labels = await records.record(prediction_id)
        own = [label for label in labels if label["labeller"] == reader]
        if not own:
            return None
        (truth,) = consensus(labels)
        return {
            "id": prediction_id,
            "label": own[-1]["label"],
            "risk": row["risk"],
            "threshold": row["threshold"],
            "abstained": row["abstained"],
            "band": None if row["band"] is None else BANDS[row["band"]][0],
            "state": truth.state,
            "positive": row["risk"] is not None and row["risk"] >= (row["threshold"] or 0.0),
            "malignant": own[-1]["malignant"],
        }

    async def show(request: Request) -> Response:
        reader, query = caller_of(request).name, request.query_params
        skipped = frozenset(found for found in query.getlist("skip") if _ID.fullmatch(found))
        before = query.get("before", "")
        said = await _said(before, reader) if _ID.fullmatch(before) else None
        queue = await records.review_queue(reader, _since(), skipped)
        again = query.get("again", "")
        if _ID.fullmatch(again):
            chosen: tuple[str, str] | None = (again, "again")
        else:
            chosen = next(((item.prediction_id, item.why) for item in queue.items), None)
        task = service.model.task
        return render(
            request,
            task.synthetic,
            "review.html",
            lesion=None if chosen is None else await _lesion(*chosen),
            said=said,
            skipped=sorted(skipped),
            done=queue.done,
            left=len(queue.items),
            classes=task.classes,
            malignant=task.malignant,
            confidences=CONFIDENCES,
            max_comment=MAX_COMMENT_LENGTH,
            days=DAYS,
        )

    async def label(request: Request) -> Response:
        form = await read_form(request)
        reader, task = caller_of(request).name, service.model.task
        prediction_id, said = text_field(form, "prediction_id"), text_field(form, "label")
        skipped = [found for found in form.getlist("skip") if isinstance(found, str) and _ID.fullmatch(found)]
        if not _ID.fullmatch(prediction_id) or is_shadow_id(prediction_id):
            raise invalid_field(f"prediction_id: {prediction_id[:60]!r}; expected one of the queue")
        if text_field(form, "action") == "skip":
            return RedirectResponse(_address(skip=[*skipped, prediction_id]), 303)
        if said not in task.classes:
            raise invalid_field(f"label: {said[:60]!r}; expected one of {', '.join(task.classes)}")
        confidence = text_field(form, "confidence")
        if confidence and confidence not in CONFIDENCES:
            raise invalid_field(f"confidence: {confidence[:60]!r}; expected one of {', '.join(CONFIDENCES)}")
        new = NewLabel(
            prediction_id=prediction_id,
            label=said,
            malignant=said in task.malignant,
            labeller=reader,
            confidence=CONFIDENCES.get(confidence),
            comment=parse_text(text_field(form, "comment"), "comment", MAX_COMMENT_LENGTH, multiline=True),
            adjudication=text_field(form, "why") == "adjudication",
        )
        await records.label(new, reader)
        return RedirectResponse(_address(before=prediction_id, skip=skipped), 303)

    async def picture(request: Request) -> Response:
        prediction_id = request.path_params["prediction_id"]
        side = _SMALL if request.path_params["name"] == "small.jpg" else _LARGE
        name, suffix = await records.image_name(prediction_id)
        tag = f"{name}-{side}"
        if (known := unchanged(request, tag)) is not None:
            return known
        async with pictures.turn():
            shown = await pictures.jpeg(await records.image(prediction_id, name, suffix), side)
        return Response(shown, media_type="image/jpeg", headers=picture_headers(tag))

    api.add_route(REVIEW_PATH, show, ["GET"], include_in_schema=False)
    api.add_route(REVIEW_PATH, label, ["POST"], include_in_schema=False)
    api.add_route("/review/{prediction_id}/{name}", picture, ["GET"], include_in_schema=False)


def _address(**query: Any) -> str:
    return f"{REVIEW_PATH}?{urlencode(query, doseq=True)}"


def _day(received_at: int) -> str:
    return datetime.fromtimestamp(received_at / 1e6, UTC).date().isoformat()
