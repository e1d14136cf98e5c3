"""What Label Studio makes of tasks, without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def annotated(
    tasks: Sequence[dict[str, Any]],
    choice: str = "malignant",
    by: int | str = 1,
    at: str = "2024-06-01T00:00:00Z",
    first: int = 100,
) -> list[dict[str, Any]]:
    """What Label Studio exports once an annotator has gone through the tasks.

    Ids of tasks are 11 and up, those of annotations `first` and up.
    """
    out = []
    for number, task in enumerate(tasks):
        results = [{"from_name": "class", "to_name": "lesion", "type": "choices", "value": {"choices": [choice]}}]
        given = {"id": first + number, "completed_by": by, "result": results, "was_cancelled": False}
        given |= {"created_at": at, "updated_at": at}
        out.append({"id": 11 + number, "data": task["data"], "annotations": [given]})
    return out
