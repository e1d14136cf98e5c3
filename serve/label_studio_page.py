"""`/review/label-studio`: tasks for Label Studio to take along, and what was said there to bring back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from fastapi import FastAPI
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from serve.access import caller_of
from serve.backend import Backend
from serve.errors import ApiError, invalid_field
from serve.label_exchange import (
    MAX_ANNOTATIONS,
    MAX_DAYS,
    MAX_EXPORT_BYTES,
    MAX_SEED,
    MAX_TASKS,
    LabelExchange,
    TaskChoice,
)
from serve.page_forms import read_form, text_field
from serve.page_templates import render

LABEL_STUDIO_PATH = "/review/label-studio"
TASKS_PATH, LABELS_PATH = f"{LABEL_STUDIO_PATH}/tasks", f"{LABEL_STUDIO_PATH}/labels"

_TASK_DEFAULTS = {"tasks": "50", "days": "30", "seed": "0", "suggestion": ""}
_LABEL_DEFAULTS = {"instance": "label-studio", "names": "", "without_gone": ""}
_INSTANCE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAX_NAME, _MAX_NAMES = 255, 100
# Problems that are shown; whoever has more has one in common.
_MAX_SHOWN = 100
_PIECE_BYTES = 2**18


def add_label_studio_routes(api: FastAPI, backend: Backend) -> None:
    """`GET /review/label-studio`, `POST .../tasks`, `POST .../labels`."""
    service = backend.service
    exchange = LabelExchange(backend.log, service.settings.retry_after_s)

    def page(request: Request, status: int = 200, **given: Any) -> Response:
        shown = {"values": {}, "task_problem": "", "label_problem": "", "checked": None, "problems": [], **given}
        shown["values"] = _TASK_DEFAULTS | _LABEL_DEFAULTS | shown["values"]
        limits = {"tasks": MAX_TASKS, "days": MAX_DAYS, "seed": MAX_SEED, "annotations": MAX_ANNOTATIONS}
        synthetic = service.model.task.synthetic
        return render(
            request,
            synthetic,
            "label_studio.html",
            status,
            limits=limits | {"bytes": MAX_EXPORT_BYTES, "shown": _MAX_SHOWN},
            **shown,
        )

    async def show(request: Request) -> Response:
        return page(request)

    async def tasks(request: Request) -> Response:
        form = await read_form(request)
        entered = {name: text_field(form, name) for name in _TASK_DEFAULTS}
        try:
            wanted = TaskChoice(
                num_tasks=_number(entered["tasks"], "tasks", 1, MAX_TASKS),
                days=_number(entered["days"], "days", 1, MAX_DAYS) if entered["days"] else None,
                seed=_number(entered["seed"], "seed", 0, MAX_SEED),
                suggestion=bool(entered["suggestion"]),
            )
            made = await exchange.tasks(wanted, service.model.task, caller_of(request).name)
        except ApiError as error:
            if error.status != 422:
                raise
            return page(request, 422, task_problem=error.detail, values=entered)
        headers = {
            "Content-Disposition": f'attachment; filename="{made.name}.zip"',
            "Content-Length": str(made.num_bytes),
        }
        return StreamingResponse(_pieces(made.file), media_type="application/zip", headers=headers)

    async def labels(request: Request) -> Response:
        form = await read_form(request)
        entered = {name: text_field(form, name) for name in _LABEL_DEFAULTS}
        only_check = text_field(form, "action") == "check"
        try:
            if not _INSTANCE.fullmatch(entered["instance"]):
                expected = "1 to 64 letters, digits, dots, dashes or underscores"
                raise invalid_field(f"instance: {entered['instance'][:80]!r}; expected {expected}")
            names = read_names(entered["names"])
            data = await _file(form)
            checked = await exchange.check(data, service.model.task, entered["instance"], names)
        except ApiError as error:
            if error.status != 422:
                raise
            return page(request, 422, label_problem=error.detail, values=entered)
        left_out = bool(entered["without_gone"])
        problems = [*checked.problems, *([] if left_out else checked.gone)]
        readers = sorted({placed.label.labeller for placed in checked.labels})
        shown = {"checked": checked, "readers": readers, "values": entered, "only_check": only_check}
        if problems:
            return page(request, 422, problems=problems, **shown)
        if only_check:
            return page(request, **shown)
        counts, refused = await exchange.add(checked.labels, caller_of(request).name)
        # Erased since they were checked.
        checked.gone.extend(refused)
        return page(request, counts=counts, **shown)

    api.add_route(LABEL_STUDIO_PATH, show, ["GET"], include_in_schema=False)
    api.add_route(TASKS_PATH, tasks, ["POST"], include_in_schema=False)
    api.add_route(LABELS_PATH, labels, ["POST"], include_in_schema=False)


def read_names(text: str) -> dict[str, str]:
    """Names by annotator's number or email, of lines such as `1 = Dr Weber`.

    Raises:
        ApiError: 422 naming the line.
    """
    lines = [line.strip() for line in text.splitlines()]
    names: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        who, sign, name = (part.strip() for part in line.partition("="))
        if not (who and sign and name) or len(line) > 2 * _MAX_NAME or who in names:
            raise invalid_field(f"names: line {number} is {line[:80]!r}; expected one annotator's NUMBER = NAME")
        names[who] = name
    if len(names) > _MAX_NAMES:
        raise invalid_field(f"names: {len(names)} lines; expected at most {_MAX_NAMES}")
    return names


def _number(text: str, field: str, least: int, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise invalid_field(f"{field}: {text[:60]!r}; expected a number from {least} to {most}")
    return int(text)


async def _file(form: FormData) -> bytes:
    given = form.get("file")
    if not isinstance(given, UploadFile) or not given.filename:
        raise invalid_field("file: none was chosen; expected Label Studio's export, JSON or JSON-MIN")
    data = await given.read()
    if len(data) > MAX_EXPORT_BYTES:
        raise invalid_field(f"file: {len(data)} bytes; expected at most {MAX_EXPORT_BYTES}")
    return data


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(_PIECE_BYTES):
            yield piece
