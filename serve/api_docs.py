"""The `/docs` page, and what the OpenAPI document says about keys."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse

from serve.access import is_open
from serve.api import KEY_HEADER, Problem

DOCS_PATH = "/docs"
# One version, which the browser compares with these hashes: whoever changes the files at the CDN gets no page, and not
# the key that someone types into it. `openssl dgst -sha384 -binary FILE | base64` on the package from npm gives them.
_SWAGGER = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0"
_SCRIPT, _STYLE = f"{_SWAGGER}/swagger-ui-bundle.js", f"{_SWAGGER}/swagger-ui.css"
_SCRIPT_HASH = "sha384-gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9"
_STYLE_HASH = "sha384-WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I"
_START = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, layout: "BaseLayout"})'
_PAGE = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>dermray</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{_STYLE}" integrity="{_STYLE_HASH}" crossorigin="anonymous">
</head>
<body>
<div id="swagger-ui"></div>
<script src="{_SCRIPT}" integrity="{_SCRIPT_HASH}" crossorigin="anonymous"></script>
<script>{_START}</script>
</body>
</html>
"""
_START_HASH = base64.b64encode(hashlib.sha256(_START.encode()).digest()).decode()
# Swagger UI sets style attributes, and its icons are data URLs.
DOCS_POLICY = (
    f"default-src 'none'; script-src {_SCRIPT} 'sha256-{_START_HASH}'; style-src {_STYLE} 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)

_FASTAPI_ERROR = "HTTPValidationError"
_REFUSALS = {
    "401": "no live API key",
    "403": "the role of the API key is not enough",
    "429": "over the key's rate; send the same request again after Retry-After",
}


def add_docs(api: FastAPI, with_keys: bool) -> None:
    """`GET /docs`, and the OpenAPI document: with keys also their place in it and the answers of the access guard."""

    @api.get(DOCS_PATH, include_in_schema=False)
    async def docs(_: Request) -> HTMLResponse:
        return HTMLResponse(_PAGE)

    describe = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            schema = _as_answered(describe())
            api.openapi_schema = _with_keys(schema) if with_keys else schema
        return api.openapi_schema

    api.openapi = openapi


def _as_answered(schema: dict[str, Any]) -> dict[str, Any]:
    """Routes summed up by their first sentence, and without the 422 of FastAPI's own form, which none of ours has."""
    for operations in schema.get("paths", {}).values():
        for operation in operations.values():
            description = operation.get("description", "")
            operation["summary"] = re.split(r"\.(?:\s|$)", description, maxsplit=1)[0] or operation["operationId"]
            if _FASTAPI_ERROR in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    schemas = schema.get("components", {}).get("schemas", {})
    for name in (_FASTAPI_ERROR, "ValidationError"):
        schemas.pop(name, None)
    return schema


def _with_keys(schema: dict[str, Any]) -> dict[str, Any]:
    components = schema.setdefault("components", {})
    components.setdefault("schemas", {}).setdefault(
        "Problem", Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    )
    components["securitySchemes"] = {"key": {"type": "apiKey", "in": "header", "name": KEY_HEADER}}
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for path, operations in schema.get("paths", {}).items():
        if is_open(path):
            continue
        for operation in operations.values():
            operation["security"] = [{"key": []}]
            for status, description in _REFUSALS.items():
                operation["responses"].setdefault(status, {"description": description, "content": content})
    return schema
