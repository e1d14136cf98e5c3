"""`/models`: the champion and the candidates side by side, and the decisions about them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from serve.access import caller_of
from serve.backend import Backend
from serve.model_decisions import ModelDecisions
from serve.models_view import context_views, engine_rows, rule_rows
from serve.page_forms import read_form, reason_field, text_field
from serve.page_templates import render
from serve.rule_words import rule_words
from serve.times import moment
from store.candidates import CANDIDATE, is_one_of
from store.model_facts import Facts

MODELS_PATH = "/models"
MAX_MODELS = 50
MAX_DECISIONS = 50
# Candidates that are shown in full; older ones stand in the list.
_IN_FULL = 4

_ACTIONS = {
    "approve": "approved",
    "reject": "rejected",
    "promote": "made the champion",
    "rollback": "made the champion again",
    "ask_rollback": "asked to go back from it",
    "promotion_refused": "refused by the gate",
    "rollback_refused": "could not go back from it",
    "approval_refused": "could not approve: asked for its training",
    "deployed": "swapped into the service",
}


def add_models_routes(api: FastAPI, backend: Backend, decisions: ModelDecisions) -> None:
    """`GET /models`; `POST /models/{version}/approve` and `/reject`, `POST /models/rollback`."""
    service = backend.service

    async def _current(rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The champion on record, else what the service serves."""
        champion, served = await decisions.champion(), service.model
        version = served.reference.version if champion is None else champion.model_version
        digests = [row["digest"] for row in rows if row["model_version"] == version]
        if version == served.reference.version:
            digests.append(served.digest)
        digest = digests[0] if digests else None
        facts = Facts({}, {})
        if digest is not None:
            facts = (await decisions.facts({digest}))[digest]
        if not facts.report and digest == served.digest:
            # Deployed by its folder: no job has told the store of it.
            contexts = (await service.model_card())["contexts"]
            report = {
                name: {"gate": context["metrics"].get("gate", {}), "subgroups": _subgroups(context["metrics"])}
                for name, context in contexts.items()
            }
            facts = facts._replace(report=report)
        return {"version": version, "digest": digest, "facts": facts, "champion": champion}

    async def show(request: Request) -> Response:
        rows = await decisions.candidates(MAX_MODELS)
        current = await _current(rows)
        waiting = await decisions.waiting_rollback()
        others = [row for row in rows if row["model_version"] != current["version"]]
        wanted = request.query_params.get("version")
        in_full = [row for row in others if row["state"] == CANDIDATE][:_IN_FULL]
        in_full = [row for row in others if row in in_full or row["model_version"] == wanted]
        facts = await decisions.facts({row["digest"] for row in in_full})
        asked = [await decisions.requesters(row["model_version"], row["digest"]) for row in in_full]
        name = caller_of(request).name
        champion = current["champion"]
        return render(
            request,
            service.model.task.synthetic,
            "models.html",
            current={
                "version": current["version"],
                "digest": current["digest"],
                "is_champion": champion is not None,
                "since": None if champion is None else moment(champion.decision["decided_at"]),
                "by": None if champion is None else champion.decision["approver"],
                "reason": None if champion is None else champion.decision["reason"],
                "previous": None if champion is None else champion.previous,
                # On its own: whom it was compared with when it was a candidate itself is history.
                "contexts": context_views(current["facts"]._replace(gate=None), Facts({}, {})),
                "engines": {device: engine_rows(found) for device, found in current["facts"].engines.items()},
            },
            served=service.model.reference.version,
            waiting=None if waiting is None else waiting | {"at": moment(waiting["decided_at"])},
            candidates=[
                _candidate(row, facts[row["digest"]], current, is_one_of(name, by), name)
                for row, by in zip(in_full, asked, strict=True)
            ],
            others=[{**row, "made": moment(row["created_at"]), "in_full": row in in_full} for row in others],
            history=[_decision(row) for row in await decisions.history(MAX_DECISIONS)],
            max_reason=1000,
        )

    async def approve(request: Request) -> Response:
        form = await read_form(request)
        version, reason = request.path_params["version"], reason_field(form)
        await decisions.approve(version, caller_of(request).name, reason)
        return RedirectResponse(f"{MODELS_PATH}#model-{version}", 303)

    async def reject(request: Request) -> Response:
        form = await read_form(request)
        version, reason = request.path_params["version"], reason_field(form)
        await decisions.reject(version, caller_of(request).name, reason)
        return RedirectResponse(f"{MODELS_PATH}#history", 303)

    async def rollback(request: Request) -> Response:
        form = await read_form(request)
        reason = reason_field(form)
        await decisions.ask_rollback(text_field(form, "model_version"), caller_of(request).name, reason)
        return RedirectResponse(MODELS_PATH, 303)

    api.add_route(MODELS_PATH, show, ["GET"], include_in_schema=False)
    api.add_route("/models/rollback", rollback, ["POST"], include_in_schema=False)
    api.add_route("/models/{version}/approve", approve, ["POST"], include_in_schema=False)
    api.add_route("/models/{version}/reject", reject, ["POST"], include_in_schema=False)


def _subgroups(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    return metrics.get("clinical", {}).get("subgroups", [])


def _candidate(row: dict[str, Any], facts: Facts, current: dict[str, Any], is_own: bool, person: str) -> dict[str, Any]:
    """What the template shows of a candidate in full; `is_own`: this person asked for its training."""
    # Differences from an earlier champion say nothing of today's.
    outdated = facts.gate is not None and facts.gate["champion_version"] not in (None, current["version"])
    rules = [] if facts.gate is None else rule_rows(facts.gate)
    return {
        "state": row["state"],
        "version": row["model_version"],
        "digest": row["digest"],
        "made": moment(row["created_at"]),
        "requested_by": row["requested_by"],
        "dataset_digest": row["dataset_digest"],
        "approvals": [{**found, "at": moment(found["decided_at"])} for found in row["approvals"]],
        "is_own": is_own,
        "approved_here": is_one_of(person, [found["approver"] for found in row["approvals"]]),
        "outdated": outdated,
        "contexts": context_views(facts._replace(gate=None) if outdated else facts, current["facts"]),
        "engines": {device: engine_rows(found) for device, found in facts.engines.items()},
        "gate": facts.gate,
        "judged": None if facts.judged_at is None else moment(facts.judged_at),
        "rules": rules,
        "failed": [rule for rule in rules if not rule.passed],
    }


def _decision(row: dict[str, Any]) -> dict[str, Any]:
    detail = row["detail"]
    failed = [rule_words(found["rule"]) for found in detail.get("results", []) if not found["passed"]]
    return {
        "at": moment(row["at"]),
        "what": _ACTIONS[row["action"]],
        "version": row["model_version"],
        "person": row["person"],
        "reason": row["reason"] or "; ".join(dict.fromkeys(failed)),
    }
