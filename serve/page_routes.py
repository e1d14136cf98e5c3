"""Files that the pages load: scripts, the style sheet, pictures of samples. They hold no data."""

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

_TYPES = {".js": "text/javascript", ".css": "text/css", ".jpg": "image/jpeg", ".txt": "text/plain"}
_SAMPLES = "samples"


@dataclass(frozen=True)
class WebFile:
    """A file of `serve/web` as it is answered."""

    body: bytes
    media_type: str
    etag: str


def load_web_files() -> dict[str, WebFile]:
    """What pages load of `serve/web`, by name, wherever the package is installed; no templates."""
    files = {}
    folder = resources.files("serve").joinpath("web")
    for entry in (*folder.iterdir(), *folder.joinpath(_SAMPLES).iterdir()):
        media_type = _TYPES.get(PurePosixPath(entry.name).suffix)
        if media_type is not None:
            body = entry.read_bytes()
            files[entry.name] = WebFile(body, media_type, hashlib.sha256(body).hexdigest()[:32])
    return files


def add_page_routes(api: FastAPI) -> None:
    """`GET /static/{name}`, from memory: a name is looked up, it never becomes a path.

    Add it last: routes are tried in order, so that the others do not pay for it.
    """
    files = load_web_files()

    async def static(request: Request) -> Response:
        file = files.get(request.path_params["name"])
        if file is None:
            raise ApiError(404, "not_found", f"name: there is no such file; expected one of {', '.join(sorted(files))}")
        # Asked for again each time, and answered without a body if it is the same: a new release shows at once.
        headers = {"ETag": f'"{file.etag}"', "Cache-Control": "no-cache"}
        if matches(request.headers.get("If-None-Match"), file.etag):
            return Response(status_code=304, headers=headers)
        return Response(file.body, media_type=file.media_type, headers=headers)

    api.add_route(OPEN_PREFIX + "{name}", static, include_in_schema=False)
