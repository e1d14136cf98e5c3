"""Requests that no one would think of: strategies on top of the OpenAPI document, and what must hold for any answer."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import quote

from hypothesis import strategies as st
from schemathesis import APIOperation, Case, GenerationMode, Response
from schemathesis.checks import (
    CheckContext,
    content_type_conformance,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.bundle_factory import blank_image, lesion_image

_SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}
_TRACEBACK = re.compile(r"Traceback|File \"|\.py\b|sqlalchemy|pydantic", re.IGNORECASE)
MULTIPART = "multipart/form-data"

_REAL = [lesion_image(seed, suffix=suffix) for seed in range(4) for suffix in (".jpg", ".png", ".webp")]
_REAL += [blank_image(), lesion_image(9, size=16)]


def one_error_shape(_: CheckContext, response: Response, case: Case) -> None:
    """{error, detail} with a line for people, and nothing of the service's inside."""
    if response.status_code < 400 or case.operation.path == "/readyz":
        return
    body = response.json()
    assert set(body) == {"error", "detail"}, body
    assert re.fullmatch(r"[a-z_]+", body["error"]), body
    detail = body["detail"]
    assert detail and detail.isprintable() and len(detail) < 4000, body
    assert not _TRACEBACK.search(detail), body


def has_security_headers(_: CheckContext, response: Response, case: Case) -> None:
    """What browsers are told, on every answer."""
    for name, value in _SECURITY_HEADERS.items():
        assert response.headers[name] == [value], name
    assert "default-src 'none'" in response.headers["content-security-policy"][0]
    assert "cache-control" in response.headers and "x-dermray-notice" in response.headers


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
    one_error_shape,
    has_security_headers,
]


@st.composite
def _damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(_REAL)))
    for at, value in draw(st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=4)):
        data[at % len(data)] = value
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


images = st.one_of(st.sampled_from(_REAL), st.sampled_from(_REAL), _damaged(), st.binary(max_size=64))

_awkward_text = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", " ", "\0", "a\0b", "\r\n", "..", "%00", "\u202e", "é" * 300, "𝔘", "null", "9" * 40, "-1"]),
)
_awkward_number = st.sampled_from(
    ["-1", "0", "1", "201", str(2**63 - 1), str(2**63), "9" * 400, "1e999", "nan", "inf", "-0", "1_0", "٣", "0x10", ""]
)
_times = st.sampled_from(
    ["2024-05-01", "2024-05-01T09:30:00Z", "1969-12-31", "9999-12-31T23:59:59-23:59", "0001-01-01", "2024-W18-3", "24"]
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
# Fields of the tiny bundle's task, with values that fit and values that do not.
_metadata = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "age_approx": st.sampled_from([0, 60, 60.5, None, 400, -1, 10**400, "60", True]),
            "sex": st.sampled_from(["female", "male", None, "", "x\0", 1]),
            "unknown": st.none(),
        },
    ),
    _json,
)
_no_json = st.sampled_from(["{", "[" * 5000, "NaN", '{"a":1,"a":2}', '"\\ud800"', "1" * 5000, ""])
_good_record = st.none() | st.just({"age_approx": 60, "sex": "female"})
# What a field takes; the rest of what it gets is awkward.
_good: dict[str, st.SearchStrategy[Any]] = {
    "patient_id": st.sampled_from(["1", "a/b", "Ünï"]),
    "acquired_at": st.just("2024-05-01T09:30:00+02:00"),
    "labelled_at": st.just("2024-05-01"),
    "view": st.sampled_from(["overlay", "map", "side_by_side"]),
    "target_class": st.sampled_from(["benign", "malignant"]),
    "label": st.sampled_from(["benign", "malignant"]),
    "trigger": st.sampled_from(["manual", "drift", "schedule", "new_labels"]),
    "confidence": st.floats(0, 1),
    "model_version": st.just("7"),
}
_text = st.sampled_from(["clinic", "Dr Weber", "é"])


def _mostly(good: st.SearchStrategy[Any], *other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Seven in eight values are good: of a request with more than one wrong field only the first is looked at."""
    return st.integers(0, 7).flatmap(lambda number: good if number else st.one_of(other))


@st.composite
def _form(draw: st.DrawFn, fields: list[str]) -> dict[str, Any]:
    """A multipart body as arguments of `requests`: mostly the route's own fields, seldom one missing or unknown."""
    parts: list[tuple[str, Any]] = []
    many = "images" in fields
    files = draw(st.lists(images, min_size=1, max_size=3 if many else 1) if draw(st.integers(0, 9)) else st.just([]))
    names = st.sampled_from(["a.jpg", "é.png", "a"])
    parts += [("images" if many else "image", (draw(names), data)) for data in files]
    records = st.lists(_good_record, min_size=len(files), max_size=len(files)) if many else _good_record
    bad_records = st.lists(_good_record | _metadata, min_size=len(files), max_size=len(files)) if many else _metadata
    metadata = _mostly(records.map(json.dumps), bad_records.map(json.dumps), _no_json, _awkward_text)
    for name in fields:
        if name not in ("image", "images") and draw(st.booleans() | st.just(name == "patient_id")):
            values = metadata if name == "metadata" else _mostly(_good.get(name, _text), _times, _awkward_text)
            parts.append((name, (None, draw(values).encode("utf-8", "surrogatepass"))))
    if draw(st.integers(0, 9)) == 9:
        parts.append((draw(st.sampled_from(["image", "Metadata", "x\0", "é"])), (None, b"1")))
    return {"files": parts}


def _raw_form(data: bytes) -> dict[str, Any]:
    return {"data": data, "headers": {"Content-Type": f"{MULTIPART}; boundary=b"}}


_broken = st.binary(max_size=80).flatmap(
    lambda part: st.sampled_from([part, b"--b\r\n" + part + b"\r\n--b--\r\n"]).map(_raw_form)
)


Sent = tuple[Case, dict[str, Any]]


# Names of path parameters.
GIVEN_OUT = ("prediction_id", "submission_id", "retrain_id", "alarm_id", "version")


class Known:
    """Ids and cursors that the service gave out, to come back with: without them a fuzz sees little but 404."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def learn(self, response: Response) -> None:
        """Keeps what an answer names."""
        if response.status_code >= 300 or response.headers["content-type"] != ["application/json"]:
            return
        body = response.json()
        items = body if isinstance(body, list) else [body, *body.get("items", []), *body.get("lesions", [])]
        for item in items:
            for name in ("prediction_id", "submission_id", "retrain_id", "next_cursor"):
                if isinstance(item.get(name), str):
                    self.add(name, item[name])
            if "acknowledged_at" in item:
                self.add("alarm_id", str(item["id"]))

    def add(self, name: str, value: str) -> None:
        found = self._found.setdefault(name, [])
        if value not in found:
            found.append(value)

    def values(self, name: str) -> st.SearchStrategy[str]:
        """One of those known when it is drawn; what is drawn itself is a number, the same in every run."""
        name = "next_cursor" if name == "cursor" else name
        return st.integers(0, 2**16).map(lambda at: found[at % len(found)] if (found := self._found.get(name)) else "0")


def _parameter(name: str, known: Known) -> st.SearchStrategy[str]:
    values = known.values(name)
    if name == "cursor":
        at = st.integers(0, 64)
        values |= st.builds(
            lambda text, at, new: text[:at] + new + text[at + 1 :], values, at, st.sampled_from("Aa=\0é-")
        )
    other = (_times, _awkward_number, _awkward_text)
    return _mostly(values, *other) if name == "cursor" or name in GIVEN_OUT else st.one_of(other)


@st.composite
def _own_case(draw: st.DrawFn, operation: APIOperation, known: Known) -> Case:
    path, query = ({}, {})
    for parameter in operation.path_parameters:
        text = draw(
            _parameter(parameter.name, known).filter(lambda text: "/" not in text and text not in ("", ".", ".."))
        )
        path[parameter.name] = quote(text.encode("utf-8", "surrogatepass"), safe="")
    if operation.query:
        # One at a time, mostly: of several wrong ones only the first is looked at.
        for name in draw(st.lists(st.sampled_from([parameter.name for parameter in operation.query]), max_size=2)):
            query[name] = draw(_parameter(name, known)).encode("utf-8", "surrogatepass")
    headers = {}
    if "Idempotency-Key" in operation.headers and draw(st.booleans()):
        headers["Idempotency-Key"] = draw(st.sampled_from(["a", "b", "", "ü", "k" * 201, "a b"]))
    if "if-none-match" in operation.headers and draw(st.booleans()):
        headers["If-None-Match"] = draw(st.sampled_from(["*", '"', 'W/"x"', ","]))
    return operation.Case(path_parameters=path, query=query, headers=headers)


def _json_body(fields: list[str], known: Known) -> st.SearchStrategy[dict[str, Any]]:
    """An object of the route's fields, with NaN and lone surrogates too, or something else; as arguments of
    `requests`."""
    values = {
        name: _mostly(_good.get(name, known.values(name) if name.endswith("_id") else _text), _json, _awkward_text)
        for name in fields
    }
    required = {name: values.pop(name) for name in ("prediction_id", "label", "reason") if name in fields}
    bodies = _mostly(
        st.fixed_dictionaries(required, optional=values).map(lambda body: json.dumps(body).encode()),
        st.sampled_from(
            [b"", b"null", b"{", b"[" * 5000, b"9" * 5000, b'"\xff"', b'{"reason": "\\ud800"}', b"\xff\xfe{"]
        ),
    )
    return bodies.map(lambda body: {"data": body, "headers": {"Content-Type": "application/json"}})


def _properties(body: Any) -> list[str]:
    return list(body.optimized_schema.get("properties", ()))


def sent_to(operation: APIOperation, known: Known) -> st.SearchStrategy[Sent]:
    """Cases of a route, right and wrong by the document or made of what is known, and what `Case.call` is given on top
    of them."""
    cases = st.one_of(
        operation.as_strategy(generation_mode=GenerationMode.POSITIVE),
        operation.as_strategy(generation_mode=GenerationMode.NEGATIVE),
        *[_own_case(operation, known)] * 2,
    )
    plain, own = st.tuples(cases, st.just({})), _own_case(operation, known)
    for body in operation.body:
        if body.media_type == MULTIPART:
            form = st.tuples(own, _form(_properties(body)))
            return st.one_of(plain, form, form, form, form, st.tuples(own, _broken))
        body_of_own = st.tuples(own, _json_body(_properties(body), known))
        return st.one_of(plain, body_of_own, body_of_own)
    return plain
