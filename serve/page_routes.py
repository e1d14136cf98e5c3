"""The operator's page `/monitoring` and the files it loads. They hold no data: the page asks for an API key, which its
own requests then send."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePosixPath

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from serve.access import OPEN_PREFIX
from serve.errors import ApiError
from serve.etags import matches
from serve.security_headers import PAGE_POLICY

MONITORING_PATH = "/monitoring"
# The browser itself refuses to turn a string into HTML or script, should the page's own script ever try.
MONITORING_POLICY = f"{PAGE_POLICY}; require-trusted-types-for 'script'; trusted-types 'none'"

_PAGE = "monitoring.html"
_TYPES = {".js": "text/javascript", ".css": "text/css", ".jpg": "image/jpeg", ".txt": "text/plain"}
_SAMPLES = "samples"


@dataclass(frozen=True)
class WebFile:
    """A file of `serve/web` as it is answered."""

    body: bytes
    media_type: str
    etag: str


def load_web_files() -> dict[str, WebFile]:
    """The page and what pages load of `serve/web`, by name, wherever the package is installed; no templates."""
    files = {}
    folder = resources.files("serve").joinpath("web")
    for entry in (*folder.iterdir(), *folder.joinpath(_SAMPLES).iterdir()):
        media_type = "text/html" if entry.name == _PAGE else _TYPES.get(PurePosixPath(entry.name).suffix)
        if media_type is not None:
            body = entry.read_bytes()
            files[entry.name] = WebFile(body, media_type, hashlib.sha256(body).hexdigest()[:32])
    return files


def add_page_routes(api: FastAPI) -> None:
    """`GET /monitoring` and `GET /static/{name}`, from memory: a name is looked up, it never becomes a path.

    Add them last: routes are tried in order, so that the others do not pay for these.
    """
    files = load_web_files()
    page = files.pop(_PAGE)

    async def monitoring(request: Request) -> Response:
        return _answer(request, page, {"Content-Security-Policy": MONITORING_POLICY})

    async def static(request: Request) -> Response:
        file = files.get(request.path_params["name"])
        if file is None:
            raise ApiError(404, "not_found", f"name: there is no such file; expected one of {', '.join(sorted(files))}")
        return _answer(request, file, {})

    api.add_route(MONITORING_PATH, monitoring, include_in_schema=False)
    api.add_route(OPEN_PREFIX + "{name}", static, include_in_schema=False)


def _answer(request: Request, file: WebFile, headers: dict[str, str]) -> Response:
    # Asked for again each time, and answered without a body if it is the same: a new release shows at the next load.
    headers = {"ETag": f'"{file.etag}"', "Cache-Control": "no-cache", **headers}
    if matches(request.headers.get("If-None-Match"), file.etag):
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)
