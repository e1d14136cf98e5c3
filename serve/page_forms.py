"""Forms of the pages: read once, and only if they come from a page of this session."""

from __future__ import annotations

import hmac

from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import FormData
from starlette.requests import Request

from serve.errors import ApiError, invalid_field
from serve.page_access import session_of
from serve.reason import Reason
from serve.sessions import CSRF_FIELD

_MAX_FIELDS = 100
_REASON: TypeAdapter[str] = TypeAdapter(Reason)


async def read_form(request: Request, max_files: int = 1) -> FormData:
    """The fields of a page's form.

    Raises:
        ApiError: 403 `foreign_form` for a form without this session's token: another site's, or older than the session.
    """
    form = await request.form(max_files=max_files, max_fields=_MAX_FIELDS)
    given = form.get(CSRF_FIELD)
    if not isinstance(given, str) or not hmac.compare_digest(given.encode(), session_of(request).csrf_token.encode()):
        raise ApiError(403, "foreign_form", f"{CSRF_FIELD}: not this session's; load the page again and send it again")
    return form


def text_field(form: FormData, name: str) -> str:
    """A text field without blanks around it; "" where it is missing or is a file."""
    value = form.get(name)
    return value.strip() if isinstance(value, str) else ""


def reason_field(form: FormData) -> str:
    """The field `reason` of a decision.

    Raises:
        ApiError: 422, it is blank, too long, or no plain text.
    """
    text = text_field(form, "reason")
    try:
        return _REASON.validate_python(text)
    except ValidationError as error:
        raise invalid_field(f"reason: {text[:60]!r}; expected 1 to 1000 characters of plain text") from error
