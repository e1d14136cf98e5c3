"""Tasks for Label Studio with their pictures, as one ZIP that is unpacked where Label Studio reads local files."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple

from store.label_studio import Classes, label_task, labelling_config
from store.label_tasks import LabelTask

# Below Label Studio's document root. One and the same, so that one storage of Label Studio covers all tasks.
FOLDER = "dermray"

_README = """\
Tasks for Label Studio

1. Unpack the ZIP in LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT of a Label Studio that was started with
   LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true.
2. In the project: Settings, Labeling Interface, Code: paste labelling_config.xml. Settings, Cloud Storage, Add Source
   Storage, Local files: give the folder {folder}/ below the root, once for each project; it need not be synced.
3. Import tasks.json.
4. Export the annotations as JSON or JSON-MIN, and import them on the page that this ZIP is from.

These are pictures of patients. Delete the ZIP and the folder once the annotations are imported: a patient who is erased
from the service is not erased from them.
"""


class TasksTooLargeError(Exception):
    """The pictures of the chosen tasks are too many bytes together; the message says how many are allowed."""


class ZippedTasks(NamedTuple):
    """What a ZIP holds: its name, and the tasks whose picture was found."""

    name: str
    chosen: list[LabelTask]


def write_tasks(
    file: BinaryIO,
    chosen: Sequence[LabelTask],
    picture: Callable[[str, str], bytes],
    task: Classes,
    suggestion: bool,
    max_bytes: int,
) -> ZippedTasks:
    """Writes `tasks.json`, `labelling_config.xml` and the pictures, as stored: without metadata, in their own size. The
    same tasks give the same bytes.

    Args:
        picture: the stored bytes of a hash and a suffix; one that is no longer kept (FileNotFoundError) has no task.
        max_bytes: of the pictures together.

    Raises:
        TasksTooLargeError: they are more.
    """
    content = [label_task(item, item.row["image_hash"], task, suggestion, metadata=False) for item in chosen]
    name = f"label-tasks-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]}"
    root, kept, tasks, total = f"{FOLDER}/{name}", [], [], 0
    with zipfile.ZipFile(file, "w") as archive:
        for number, item in enumerate(chosen, 1):
            suffix = item.row["suffix"]
            try:
                data = picture(item.row["image_hash"], suffix)
            except FileNotFoundError:
                # Erased since the tasks were chosen.
                continue
            total += len(data)
            if total > max_bytes:
                raise TasksTooLargeError(f"the pictures of {len(chosen)} lesions hold over {max_bytes >> 20} MiB")
            # A number: an id may hold what is no name of a file.
            path = f"{root}/pictures/{number:04d}{suffix}"
            _add(archive, path, data, zipfile.ZIP_STORED)
            kept.append(item)
            tasks.append(label_task(item, f"/data/local-files/?d={path}", task, suggestion, metadata=False))
        texts: dict[str, Any] = {
            "tasks.json": json.dumps(tasks, indent=1, allow_nan=False),
            "labelling_config.xml": labelling_config(task),
            "README.txt": _README.format(folder=FOLDER),
        }
        for file_name, text in texts.items():
            _add(archive, f"{root}/{file_name}", text.encode(), zipfile.ZIP_DEFLATED)
    return ZippedTasks(name, kept)


def _add(archive: zipfile.ZipFile, path: str, data: bytes, compression: int) -> None:
    # Of the earliest time that a ZIP can say.
    entry = zipfile.ZipInfo(path)
    entry.compress_type = compression
    # Label Studio runs as another user than who unpacks.
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, data)
