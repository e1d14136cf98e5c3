"""Who calls: the name that the log, the audit trail and the limits know a request by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from starlette.requests import Request

Role = Literal["caller", "reviewer", "approver", "admin"]


@dataclass(frozen=True)
class Caller:
    """The name of an API key, or "anonymous", and what it may do."""

    name: str
    role: Role


# Where no keys are asked for: only on loopback, by whoever may log in there.
ANONYMOUS = Caller("anonymous", "admin")


def caller_of(request: Request) -> Caller:
    """Who sent this request, as the access guard around all routes found out."""
    return request.scope.get("dermray.caller", ANONYMOUS)
