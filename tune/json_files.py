"""JSON files of a search, on disk or behind a URL."""

from __future__ import annotations

import json
import uuid
from typing import Any


def read_json(url: str) -> Any:
    """The file's value, or None where there is no file."""
    from fsspec.core import url_to_fs

    files, path = url_to_fs(url)
    return json.loads(files.cat_file(path)) if files.exists(path) else None


def write_json(url: str, value: Any) -> None:
    """Writes the file in one step: a reader, or a restart, sees the old value or the new one."""
    from fsspec.core import url_to_fs

    files, path = url_to_fs(url)
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}"
    files.pipe_file(temporary, json.dumps(value, indent=1, default=float).encode())
    files.mv(temporary, path)


def remove(url: str) -> None:
    """Deletes the file where there is one."""
    from fsspec.core import url_to_fs

    files, path = url_to_fs(url)
    if files.exists(path):
        files.rm(path)
