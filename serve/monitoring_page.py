"""`/monitoring`: whether the service can be trusted today; its alarms, figures and trainings, and the forms about them.

The page consists of parts, each of which is also answered alone, so that the page renews them one by one.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlencode

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from serve.access import Caller, caller_of
from serve.backend import Backend
from serve.drift_view import drift_view
from serve.errors import ApiError
from serve.label_routes import MAX_COMMENT_LENGTH
from serve.lesion import parse_text
from serve.monitoring_data import QUALITY_DAYS, Figures, Model, MonitoringData
from serve.monitoring_status import HEADLINES, ReplicaState, findings, worst
from serve.page_forms import read_form, reason_field, text_field
from serve.page_templates import render
from serve.paging import decode_cursor, encode_cursor
from serve.quality_view import quality_views
from serve.traffic_view import MIN_RISKS, risk_views, traffic_plot
from store.alarm_topics import SEVERITIES
from store.risk_samples import MAX_LABELS, SAMPLED_RISKS
from store.tables import now_us

logger = logging.getLogger("ray.serve")

MONITORING_PATH = "/monitoring"
WINDOWS = {24: "24 hours", 72: "3 days", 168: "7 days"}
SHOWN = {"open": "Open", "all": "All", "quieted": "Quieted"}
# Setting of the address, name, what it shows, and what to do where there is no address.
TOOLS = (
    ("ray_dashboard", "Ray dashboard", "Nodes, replicas, jobs, logs", "At port 8265 of the head:", "ray start --head"),
    (
        *("mlflow", "MLflow", "Trainings and model versions", "Start it with"),
        "mlflow ui --backend-store-uri sqlite:///var/mlflow.db --port 5000",
    ),
    (
        *("evidently", "Evidently", "Drift reports in full", "Start it with"),
        "evidently ui --workspace var/drift/workspace --port 8001",
    ),
    (
        *("grafana", "Grafana", "Figures of all replicas over time", "Import deploy/grafana/dermray.json, over"),
        "prometheus --config.file=deploy/prometheus/prometheus.yml",
    ),
)
_CONTEXTS = {
    "image_only": "the picture alone",
    "none": "picture and metadata",
    "patient": "picture, metadata and the patient's other lesions",
}
_PER_PAGE = 25
# The nodes are asked for their state; one that hangs is a finding, and holds up no page.
_NODES_S = 2.0
_ALARM_ID = re.compile(r"[1-9][0-9]{0,17}")
_RETRAINING_ID = re.compile(r"[0-9a-f]{32}")

Found = TypeVar("Found")


@dataclass(frozen=True)
class Query:
    """What the page's address asks for.

    Attributes:
        hours: window of the figures; show: which alarms, of `SHOWN`; after: cursor of a page of them.
        acknowledged, asked: an alarm and a request to train about which something is told.
    """

    hours: int = 24
    show: str = "open"
    after: str | None = None
    acknowledged: int | None = None
    asked: str | None = None

    @classmethod
    def of(cls, request: Request) -> Query:
        """What is not among the choices is as if it were not there; but for a damaged cursor."""
        given = request.query_params
        hours, show = given.get("hours", ""), given.get("show", "")
        acknowledged, asked = given.get("acknowledged", ""), given.get("asked", "")
        return cls(
            hours=next((known for known in WINDOWS if str(known) == hours), 24),
            show=show if show in SHOWN else "open",
            after=given.get("after"),
            acknowledged=int(acknowledged) if _ALARM_ID.fullmatch(acknowledged) else None,
            asked=asked if _RETRAINING_ID.fullmatch(asked) else None,
        )

    def address(self, part: str = "", **changes: Any) -> str:
        """This page, or one part of it, with these changes; what is told once is not told again."""
        wanted = {"hours": self.hours, "show": self.show, "after": self.after, **changes}
        usual = {"hours": 24, "show": "open"}
        text = urlencode({key: value for key, value in wanted.items() if value is not None and value != usual.get(key)})
        return f"{MONITORING_PATH}{'/' + part if part else ''}{'?' + text if text else ''}"


def add_monitoring_routes(api: FastAPI, backend: Backend) -> None:
    """`GET /monitoring`, its parts, a drift report's file, and the forms of alarms and trainings."""
    service, log = backend.service, backend.log
    data = MonitoringData(log, service.settings.retry_after_s)

    def _model() -> Model:
        return Model(service.model.reference.version, service.model.digest)

    async def _nodes() -> dict[str, str] | None:
        try:
            async with asyncio.timeout(_NODES_S):
                return await service.readiness()
        except TimeoutError:
            logger.warning("the nodes did not say within %g s how they are", _NODES_S)
            return None

    async def _card() -> dict[str, Any] | None:
        try:
            async with asyncio.timeout(_NODES_S):
                return await service.model_card()
        except Exception as error:
            logger.warning("the nodes did not describe the model: %r", error)
            return None

    async def _now(_query: Query, _caller: Caller) -> dict[str, Any]:
        now, model = now_us(), _model()
        waiting = asyncio.to_thread(lambda: (log.spool.pending(), log.spool.damaged()))
        state, nodes, spooled, card = await asyncio.gather(_or_none(data.state(model, now)), _nodes(), waiting, _card())
        replica = ReplicaState(nodes, *spooled)
        found = findings(model, replica, state, now)
        level = worst(found)
        return {
            "as_of": now,
            "findings": found,
            "level": level,
            "headline": HEADLINES[level],
            "state": state,
            "replica": replica,
            "engine": None if card is None else card["engine"],
            "engine_fallback": None if card is None else card.get("engine_fallback"),
            "version": model.version,
            "open_count": 0 if state is None else sum(state.open.values()),
            "open_alarms": [] if state is None else _by_severity(state.open),
        }

    async def _figures(query: Query, _caller: Caller) -> dict[str, Any]:
        now, model = now_us(), service.model
        figures, card = await asyncio.gather(_or_none(data.figures(_model(), now, query.hours)), _card())
        shown = {"as_of": now, "figures": figures, "version": model.reference.version, "windows": WINDOWS}
        shown["answered"] = figures is not None
        if figures is None:
            return shown
        gate = {name: found["metrics"].get("gate", {}) for name, found in (card or {}).get("contexts", {}).items()}
        views = await asyncio.to_thread(_views, figures, model.tested, gate)
        return {
            **shown,
            **views,
            "has_reference": bool(model.tested),
            "percent_average": 100 * model.average_risk,
            "contexts": _CONTEXTS,
            "min_risks": MIN_RISKS,
            "max_risks": SAMPLED_RISKS,
            "max_labels": MAX_LABELS,
            "quality_days": QUALITY_DAYS,
            "problems": backend.problems.counts(query.hours).most_common(12),
            "counting_since": round(max(backend.problems.began_s * 1e6, now - query.hours * 3_600_000_000)),
        }

    async def _alarms(query: Query, caller: Caller) -> dict[str, Any]:
        after = decode_cursor(query.after, int)
        quieted = True if query.show == "quieted" else False if query.show == "open" else None
        unacknowledged = query.show == "open"
        listed = await _or_none(data.alarms(unacknowledged, quieted, after, _PER_PAGE, query.acknowledged))
        last = listed.rows[-1] if listed is not None and listed.more else None
        return {
            "answered": listed is not None,
            "alarms": listed,
            "older": None if last is None else encode_cursor(last["raised_at"], last["id"]),
            "filters": SHOWN,
            "reader": caller.name,
            "max_comment": MAX_COMMENT_LENGTH,
        }

    async def _retraining(query: Query, caller: Caller) -> dict[str, Any]:
        allowed = caller.may("approver")
        listed = await _or_none(data.retrainings(query.asked)) if allowed else None
        requests, asked = listed or (None, None)
        answered = not allowed or listed is not None
        shown = {"may_train": allowed, "requests": requests, "asked": asked, "reader": caller.name}
        return {"answered": answered, **shown}

    parts = {"now": _now, "alarms": _alarms, "figures": _figures, "retraining": _retraining}

    async def show(request: Request) -> Response:
        query, caller = Query.of(request), caller_of(request)
        found = await asyncio.gather(*(part(query, caller) for part in parts.values()))
        shown = {key: value for part in found for key, value in part.items()}
        synthetic, links = service.model.task.synthetic, backend.links.model_dump()
        return render(
            request, synthetic, "monitoring.html", query=query, links=links, tools=TOOLS, alone=False, **shown
        )

    async def part(request: Request) -> Response:
        name, query = request.path_params["part"], Query.of(request)
        if name not in parts:
            raise ApiError(404, "not_found", f"monitoring: there is no part {name[:60]!r}")
        if "hx-request" not in request.headers:
            return RedirectResponse(f"{query.address()}#{name}", 303)
        shown = await parts[name](query, caller_of(request))
        if not shown.get("answered", True):
            # What the page shows is older, and worth more than nothing.
            raise service.unavailable("the store does not answer")
        synthetic = service.model.task.synthetic
        return render(request, synthetic, f"_monitoring_{name}.html", query=query, alone=True, **shown)

    async def report(request: Request) -> Response:
        given = request.path_params["report"].removesuffix(".json")
        row = await data.drift_report(int(given)) if _ALARM_ID.fullmatch(given) else None
        if row is None:
            raise ApiError(404, "not_found", f"drift report: there is none of id {given[:60]!r}")
        return JSONResponse(row, headers={"Content-Disposition": f'attachment; filename="drift-{row["id"]}.json"'})

    async def acknowledge(request: Request) -> Response:
        form = await read_form(request)
        given = request.path_params["alarm_id"]
        comment = parse_text(text_field(form, "comment"), "comment", MAX_COMMENT_LENGTH, multiline=True)
        name = caller_of(request).name
        row = await data.acknowledge(int(given), name, comment) if _ALARM_ID.fullmatch(given) else None
        if row is None:
            raise ApiError(404, "not_found", f"alarm: there is none of id {given[:60]!r}")
        return RedirectResponse(f"{Query.of(request).address(acknowledged=row['id'])}#alarms", 303)

    async def retrain(request: Request) -> Response:
        form = await read_form(request)
        caller = caller_of(request)
        if not caller.may("approver"):
            detail = f"session: role of the API key is {caller.role}; asking for a training needs approver or higher"
            raise ApiError(403, "forbidden", detail)
        reason = reason_field(form)
        row = await data.request_retraining(reason, caller.name)
        return RedirectResponse(f"{Query.of(request).address(asked=row['id'])}#retraining", 303)

    api.add_route(MONITORING_PATH, show, ["GET"], include_in_schema=False)
    api.add_route("/monitoring/retrain", retrain, ["POST"], include_in_schema=False)
    api.add_route("/monitoring/{part}", part, ["GET"], include_in_schema=False)
    api.add_route("/monitoring/drift/{report}", report, ["GET"], include_in_schema=False)
    api.add_route("/monitoring/alarms/{alarm_id}/acknowledge", acknowledge, ["POST"], include_in_schema=False)


def _by_severity(alarms: dict[tuple[str, str], int]) -> list[tuple[str, int]]:
    """Numbers of open alarms, the most urgent severity first."""
    numbers = Counter[str]()
    for (_, severity), number in alarms.items():
        numbers[severity] += number
    return [(severity, numbers[severity]) for severity in reversed(SEVERITIES) if numbers[severity]]


def _views(figures: Figures, tested: Any, gate: dict[str, Any]) -> dict[str, Any]:
    """Charts and tables; some tens of milliseconds."""
    return {
        "traffic": traffic_plot(figures.summary),
        "risks": risk_views(figures.risks, tested),
        "drift": drift_view(figures.history),
        "quality": quality_views(figures.labelled, figures.newest, gate),
    }


async def _or_none(reading: Awaitable[Found]) -> Found | None:
    """What was read, or None while the store does not answer: the page says so, and shows what else is known."""
    try:
        return await reading
    except ApiError as error:
        if error.status != 503:
            raise
        return None
