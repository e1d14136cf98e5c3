"""`/`: pictures in, explained answers out; and what an answer's page loads: its picture and the map over it."""

from __future__ import annotations

import asyncio
import csv
import io
import re
import secrets
from collections.abc import Sequence

from fastapi import FastAPI
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response

from monitoring.prediction_log import PredictionRecord
from serve.access import caller_of, check_owner
from serve.analyse_fields import form_fields, has_figure, read_fields
from serve.analyse_samples import load_samples
from serve.arrival import received_at
from serve.backend import Backend
from serve.errors import ApiError, invalid_field
from serve.lesion import LesionRequest, Origin, parse_key, parse_metadata, parse_text
from serve.lesion_view import LesionView, standing_out, view_lesion
from serve.page_forms import read_form, text_field
from serve.page_pictures import page_jpeg
from serve.page_templates import render
from serve.prediction_service import Outcome
from serve.upload import check_batch

_KEY = re.compile(r"page-[A-Za-z0-9_-]{22}")
_MAX_NAME = 80


def new_key() -> str:
    """An idempotency key for one filled-in form: sent twice, its lesions are stored once."""
    return f"page-{secrets.token_urlsafe(16)}"


def ranked(views: Sequence[LesionView]) -> list[LesionView]:
    """Highest risk first, then those without a risk, each in the order of the upload."""
    return sorted(views, key=lambda view: (view.record.risk is None, -(view.record.risk or 0.0), view.number))


def add_analyse_routes(api: FastAPI, backend: Backend) -> None:
    """`GET` and `POST /`, `GET /results/{key}`, its `.csv`, and the pictures of `GET /results/{id}/...`."""
    service, records = backend.service, backend.records
    samples = load_samples()

    def form_page(request: Request, status: int = 200, **given: object) -> Response:
        task = service.model.task
        fields = form_fields(task)
        shown = {"key": new_key(), "problem": "", "values": {}, "refused": [], **given}
        return render(
            request,
            task.synthetic,
            "analyse.html",
            status,
            fields=fields,
            figure=has_figure(fields),
            samples=samples,
            limits=service.limits,
            **shown,
        )

    async def show(request: Request) -> Response:
        return form_page(request)

    async def analyse(request: Request) -> Response:
        form = await read_form(request, service.limits.max_batch_images)
        key = text_field(form, "key")
        if not _KEY.fullmatch(key):
            raise invalid_field(f"key: {key[:60]!r}; expected the form's own, load the page again")
        files = [item for item in form.getlist("images") if isinstance(item, UploadFile) and item.filename]
        fields = form_fields(service.model.task)
        entered = {field.column: text_field(form, field.column) for field in fields}
        try:
            pictures = [(str(item.filename), await item.read()) for item in files]
            sample = samples.get(text_field(form, "sample"))
            metadata: dict[str, float | str] = read_fields(form, fields)
            if not pictures and sample is not None:
                pictures = [(sample.title, sample.picture)]
                known = {field.column for field in fields}
                metadata = {name: value for name, value in sample.metadata.items() if name in known} | metadata
            if not pictures:
                raise invalid_field("pictures: none was chosen; choose at least one picture, or a sample")
            outcomes = await _score(request, pictures, metadata, text_field(form, "patient_id"), key)
        except ApiError as error:
            if error.status not in (413, 415, 422):
                raise
            return form_page(request, error.status, problem=error.detail, values=entered)
        names = [name[:_MAX_NAME] for name, _ in pictures]
        refused = [
            (name, outcome.detail)
            for name, outcome in zip(names, outcomes, strict=True)
            if isinstance(outcome, ApiError)
        ]
        stored = {i: outcome[0] for i, outcome in enumerate(outcomes) if not isinstance(outcome, ApiError)}
        if not stored:
            return form_page(request, 422, problem="; ".join(detail for _, detail in refused), values=entered)
        return _result(request, key, len(pictures), stored, dict(enumerate(names)), refused)

    async def _score(
        request: Request, pictures: Sequence[tuple[str, bytes]], metadata: dict, patient_id: str, key: str
    ) -> list[Outcome]:
        model = service.model
        check_batch([data for _, data in pictures], service.limits)
        cleaned = parse_metadata(metadata or None, model.task)
        compared = len(pictures) > 1 and "patient" in model.contexts
        named = parse_text(patient_id, "patient_id")
        # Lesions are compared under a patient; whoever gave none gets one that nobody else has.
        origin = Origin(patient_id=named or (key if len(pictures) > 1 else None))
        caller, came = caller_of(request).name, received_at(request)
        lesions = [
            LesionRequest(data, cleaned, origin, parse_key(f"{key}/{index}"), caller, received_at=came)
            for index, (_, data) in enumerate(pictures)
        ]
        return await service.predict(lesions, "/", patient=compared)

    def _result(
        request: Request,
        key: str,
        number: int,
        stored: dict[int, PredictionRecord],
        names: dict[int, str],
        refused: Sequence[tuple[str, str]],
    ) -> Response:
        model = service.model
        views = [view_lesion(record, index + 1, model) for index, record in stored.items()]
        ducklings = standing_out([view.record for view in views])
        ordered = ranked(views)
        return render(
            request,
            model.task.synthetic,
            "result.html",
            key=key,
            number=number,
            views=ordered,
            first=ordered[0],
            names={view.number: names.get(view.number - 1, "") for view in views},
            ducklings={view.number: why for view, why in zip(views, ducklings, strict=True)},
            refused=refused,
            malignant=model.task.malignant,
        )

    async def _stored(request: Request, key: str) -> tuple[int, dict[int, PredictionRecord]]:
        number = request.query_params.get("n", "1")
        if not _KEY.fullmatch(key) or not number.isdecimal() or not 1 <= int(number) <= service.limits.max_batch_images:
            raise ApiError(404, "not_found", "results: there are none at this address")
        keys = [f"{key}/{index}" for index in range(int(number))]
        found = await service.find(caller_of(request).name, keys)
        stored = {index: record for index, record in enumerate(found) if record is not None}
        if not stored:
            raise ApiError(404, "not_found", "results: there are none at this address, or they were erased")
        return int(number), stored

    async def results(request: Request) -> Response:
        key = request.path_params["key"]
        number, stored = await _stored(request, key)
        return _result(request, key, number, stored, {}, [])

    async def table(request: Request) -> Response:
        key = request.path_params["key"]
        _, stored = await _stored(request, key)
        views = ranked([view_lesion(record, index + 1, service.model) for index, record in stored.items()])
        why = standing_out([view.record for view in views])
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["rank", "picture", "prediction_id", "risk", "band", "abstained", "reasons", "stands_out"])
        for rank, (view, differs) in enumerate(zip(views, why, strict=True), 1):
            record = view.record
            shown = [record.risk, record.band, record.abstained, "; ".join(record.reasons), "; ".join(differs)]
            writer.writerow([rank if record.risk is not None else "", view.number, record.id, *shown])
        headers = {"Content-Disposition": f'attachment; filename="{key}.csv"'}
        return Response(text.getvalue(), media_type="text/csv", headers=headers)

    async def _picture(request: Request) -> bytes:
        prediction_id = request.path_params["prediction_id"]
        row, _ = await records.record(prediction_id)
        check_owner(request, row["caller"], f"prediction_id {prediction_id!r}", row["role"] == "shadow")
        return await records.image(prediction_id, *await records.image_name(prediction_id))

    async def picture(request: Request) -> Response:
        return await _shown(await _picture(request))

    async def evidence(request: Request) -> Response:
        return await _shown((await service.explain(await _picture(request), "overlay", None)).png)

    api.add_route("/", show, ["GET"], include_in_schema=False)
    api.add_route("/", analyse, ["POST"], include_in_schema=False)
    api.add_route("/results/{key}", results, ["GET"], include_in_schema=False)
    api.add_route("/results/{key}/table.csv", table, ["GET"], include_in_schema=False)
    api.add_route("/results/{prediction_id}/picture.jpg", picture, ["GET"], include_in_schema=False)
    api.add_route("/results/{prediction_id}/evidence.jpg", evidence, ["GET"], include_in_schema=False)


async def _shown(data: bytes) -> Response:
    return Response(await asyncio.to_thread(page_jpeg, data), media_type="image/jpeg")
