"""Renders the pages: Jinja2 templates of `serve/web`, with what every page shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from functools import cache
from typing import Any

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse

from serve.access import ANONYMOUS, PAGE_ROLES, Caller, caller_of, page_of
from serve.page_access import session_of
from serve.sessions import CSRF_FIELD
from serve.times import moment

NAVIGATION = (
    ("/", "Analyse"),
    ("/review", "Review"),
    ("/monitoring", "Monitoring"),
    ("/models", "Models"),
    ("/about", "About"),
)


@cache
def environment() -> jinja2.Environment:
    """The templates; text that is put in is escaped, and a name that is missing is an error."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("serve", "web"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    templates.filters |= {"interval": interval, "iso": iso, "minute": minute, "json_text": json_text}
    templates.filters["window_name"] = window_name
    return templates


def interval(metrics: Mapping[str, Any], name: str) -> str:
    """A metric of a context's `metrics.json` with its 95 % interval, or a dash where it was not measured."""
    metric = metrics.get(name)
    if isinstance(metric, Mapping):
        value, bounds = metric.get("value"), metric
    else:
        value, bounds = metric, metrics.get("intervals", {}).get(name, {})
    if value is None:
        return "–"
    low, high = bounds.get("low"), bounds.get("high")
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def navigation_of(caller: Caller) -> list[tuple[str, str]]:
    """The pages that someone may open; of whoever has not signed in, all: signing in is the way to them."""

    def is_open(target: str) -> bool:
        role = PAGE_ROLES.get(page_of(target) or "")
        return role is None or caller.name == ANONYMOUS.name or caller.may(role)

    return [(target, name) for target, name in NAVIGATION if is_open(target)]


def iso(microseconds: int) -> str:
    """A stored time, microseconds since the epoch, as ISO 8601 in UTC, to the second."""
    return f"{moment(microseconds):%Y-%m-%dT%H:%M:%SZ}"


def minute(microseconds: int) -> str:
    """The same for people, to the minute."""
    return f"{moment(microseconds):%Y-%m-%d %H:%M}"


def json_text(value: Any) -> str:
    """JSON to be read."""
    return json.dumps(value, indent=1, ensure_ascii=False)


def window_name(row: Mapping[str, Any]) -> str:
    """A drift report's window for people: a day, or from when to when."""
    start, end = moment(row["window_start"]), moment(row["window_end"])
    if end - start == timedelta(days=1) and start.hour == start.minute == start.second == 0:
        return f"{start:%Y-%m-%d}"
    return f"{start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC"


def render(request: Request, synthetic: bool, template: str, status: int = 200, **context: Any) -> HTMLResponse:
    """A page.

    Args:
        synthetic: the model was trained on generated lesions, which every page says.
        context: what the template shows.
    """
    caller = caller_of(request)
    shown = {
        "path": request.url.path,
        "navigation": navigation_of(caller),
        "signed_in": None if caller.name == ANONYMOUS.name else caller,
        "csrf_field": CSRF_FIELD,
        "csrf_token": session_of(request).csrf_token,
        "synthetic": synthetic,
        **context,
    }
    return HTMLResponse(environment().get_template(template).render(shown), status)
