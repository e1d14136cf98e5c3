"""The one error that the service answers with: a status and the JSON body {error, detail}."""

from __future__ import annotations


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: HTTP status.
        error: short code for programs, such as "invalid_field".
        detail: one line for people; it names the field, the value and what was expected.
        retry_after_s: sent as `Retry-After` when the same request may succeed later.
    """

    def __init__(self, status: int, error: str, detail: str, retry_after_s: int | None = None):
        super().__init__(status, error, detail, retry_after_s)
        self.status = status
        self.error = error
        self.detail = detail
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.status} {self.error}: {self.detail}"


def invalid_field(detail: str) -> ApiError:
    """422 whose detail starts with the field's name."""
    return ApiError(422, "invalid_field", detail)


def patient_erased() -> ApiError:
    """410: the patient was erased after this request came in; sent again, it is of a new visit."""
    detail = "patient_id: the patient was erased while this request was under way; nothing of it is kept"
    return ApiError(410, "patient_erased", detail)


def unavailable(detail: str, retry_after_s: int) -> ApiError:
    """503: nothing was answered or promised; the same request, with the same key, may be sent again."""
    return ApiError(503, "unavailable", detail, retry_after_s)
