"""`/`: pictures in, explained answers out; and what an answer's page loads: its picture and the map over it."""

from __future__ import annotations

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
from serve.page_pictures import PagePictures, picture_headers, unchanged
from serve.page_templates import render
from serve.prediction_service import Outcome
from serve.upload import check_batch

_KEY = re.compile(r"page-[A-Za-z0-9_-]{22}")
_NUMBER = re.compile(r"[1-9][0-9]{0,3}")
_MAX_NAME = 80
_NO_RECORD = "no answer is stored: it was refused, or erased"


def new_key() -> str:
    """An idempotency key for one filled-in form: sent twice, its lesions are stored once."""
    return f"page-{secrets.token_urlsafe(16)}"


def ranked(views: Sequence[LesionView]) -> list[LesionView]:
    """Highest risk first, then those without a risk, each in the order of the upload."""
    return sorted(views, key=lambda view: (view.record.risk is None, -(view.record.risk or 0.0), view.number))


def add_analyse_routes(api: FastAPI, backend: Backend) -> None:
    """`GET` and `POST /`, `GET /results/{key}`, its `.csv`, and the pictures of `GET /results/{id}/...`."""
    service, records = backend.service, backend.records
    samples, pictures = load_samples(), PagePictures(service.settings.retry_after_s)

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
        entered = {
            name: text_field(form, name) for name in (*(field.column for field in fields), "patient_id", "sample")
        }
        try:
            chosen = [(str(item.filename), await item.read()) for item in files]
            sample = samples.get(text_field(form, "sample"))
            metadata: dict[str, float | str] = read_fields(form, fields)
            if not chosen and sample is not None:
                chosen = [(sample.title, sample.picture)]
                known = {field.column for field in fields}
                metadata = {name: value for name, value in sample.metadata.items() if name in known} | metadata
            if not chosen:
                raise invalid_field("pictures: none was chosen; choose at least one picture, or a sample")
            outcomes = await _score(request, chosen, metadata, text_field(form, "patient_id"), key)
        except ApiError as error:
            if error.status not in (413, 415, 422):
                raise
            return form_page(request, error.status, problem=error.detail, values=entered)
        names = [name[:_MAX_NAME] for name, _ in chosen]
        refused = [
            (name, outcome.detail)
            for name, outcome in zip(names, outcomes, strict=True)
            if isinstance(outcome, ApiError)
        ]
        stored = {i: outcome[0] for i, outcome in enumerate(outcomes) if not isinstance(outcome, ApiError)}
        if not stored:
            return form_page(request, 422, problem="; ".join(detail for _, detail in refused), values=entered)
        return _result(request, key, len(chosen), stored, dict(enumerate(names)), refused)

    async def _score(
        request: Request, chosen: Sequence[tuple[str, bytes]], metadata: dict, patient_id: str, key: str
    ) -> list[Outcome]:
        model = service.model
        check_batch([data for _, data in chosen], service.limits)
        cleaned = parse_metadata(metadata or None, model.task)
        compared = len(chosen) > 1 and "patient" in model.contexts
        named = parse_text(patient_id, "patient_id")
        # Lesions are compared under a patient; whoever gave none gets one that nobody else has.
        origin = Origin(patient_id=named or (key if len(chosen) > 1 else None))
        caller, came = caller_of(request).name, received_at(request)
        lesions = [
            LesionRequest(data, cleaned, origin, parse_key(f"{key}/{index}"), caller, received_at=came)
            for index, (_, data) in enumerate(chosen)
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

    async def _stored(request: Request) -> tuple[str, int, dict[int, PredictionRecord], list[tuple[str, str]]]:
        """Key, number of pictures, the records by index, and (picture, why) for those without one."""
        key, number = request.path_params["key"], request.query_params.get("n", "1")
        if not _KEY.fullmatch(key) or not _NUMBER.fullmatch(number) or int(number) > service.limits.max_batch_images:
            raise ApiError(404, "not_found", "results: there are none at this address")
        keys = [f"{key}/{index}" for index in range(int(number))]
        rows = enumerate(await records.of_keys(caller_of(request).name, keys))
        stored = {index: PredictionRecord.from_row(row) for index, row in rows if row is not None}
        if not stored:
            raise ApiError(404, "not_found", "results: there are none at this address, or they were erased")
        missing = [index for index in range(int(number)) if index not in stored]
        return key, int(number), stored, [(f"Picture {index + 1}", _NO_RECORD) for index in missing]

    async def results(request: Request) -> Response:
        key, number, stored, missing = await _stored(request)
        return _result(request, key, number, stored, {}, missing)

    async def table(request: Request) -> Response:
        key, _, stored, missing = await _stored(request)
        views = ranked([view_lesion(record, index + 1, service.model) for index, record in stored.items()])
        why = standing_out([view.record for view in views])
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["rank", "picture", "prediction_id", "risk", "band", "abstained", "reasons", "stands_out"])
        for rank, (view, differs) in enumerate(zip(views, why, strict=True), 1):
            record = view.record
            shown = [record.risk, record.band, record.abstained, "; ".join(record.reasons), "; ".join(differs)]
            writer.writerow([rank if record.risk is not None else "", view.number, record.id, *shown])
        for name, why_not in missing:
            writer.writerow(["", name.removeprefix("Picture "), "", "", "", "", why_not, ""])
        headers = {"Content-Disposition": f'attachment; filename="{key}.csv"'}
        return Response(text.getvalue(), media_type="text/csv", headers=headers)

    async def _name(request: Request) -> tuple[str, str, str]:
        """Id of the request's record, if it is for this caller to see, and the name and suffix of its picture."""
        prediction_id = request.path_params["prediction_id"]
        row, _ = await records.record(prediction_id)
        check_owner(request, row["caller"], f"prediction_id {prediction_id!r}", row["role"] == "shadow")
        return prediction_id, *await records.image_name(prediction_id)

    async def picture(request: Request) -> Response:
        prediction_id, name, suffix = await _name(request)
        if (known := unchanged(request, name)) is not None:
            return known
        async with pictures.turn():
            shown = await pictures.jpeg(await records.image(prediction_id, name, suffix))
        return Response(shown, media_type="image/jpeg", headers=picture_headers(name))

    async def evidence(request: Request) -> Response:
        prediction_id, name, suffix = await _name(request)
        # Of the model of now, whichever the answer came from.
        tag = f"{name}-{service.model.digest}"
        if (known := unchanged(request, tag)) is not None:
            return known
        async with pictures.turn():
            data = await records.image(prediction_id, name, suffix)
            explained = await service.explain(data, "overlay", None, stored=True)
            shown = await pictures.jpeg(explained.png)
        return Response(shown, media_type="image/jpeg", headers=picture_headers(f"{name}-{explained.digest}"))

    api.add_route("/", show, ["GET"], include_in_schema=False)
    api.add_route("/", analyse, ["POST"], include_in_schema=False)
    api.add_route("/results/{key}", results, ["GET"], include_in_schema=False)
    api.add_route("/results/{key}/table.csv", table, ["GET"], include_in_schema=False)
    api.add_route("/results/{prediction_id}/picture.jpg", picture, ["GET"], include_in_schema=False)
    api.add_route("/results/{prediction_id}/evidence.jpg", evidence, ["GET"], include_in_schema=False)
