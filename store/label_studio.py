"""Label Studio's formats: tasks as it imports them, its labelling config, annotations as it exports them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol
from xml.sax.saxutils import quoteattr

from store.label_tasks import LabelTask

IMAGE, CLASS, COMMENT = "lesion", "class", "comment"
"""Names of the controls in the labelling config, and so in the annotations."""


class Classes(Protocol):
    """What experts can say of a lesion, and which of it is cancer; a `TaskSpec` says both.

    Attributes:
        synthetic: the pictures were generated, which the labelling interface says.
    """

    classes: Sequence[str]
    malignant: Collection[str]
    synthetic: bool


def labelling_config(task: Classes) -> str:
    """The labelling interface (XML) of a project for this task's classes."""
    choices = "\n".join(f"    <Choice value={quoteattr(name)}/>" for name in task.classes)
    notice = '  <Header value="Synthetic data: not for diagnosis"/>\n' if task.synthetic else ""
    return (
        "<View>\n"
        f"{notice}"
        f'  <Image name="{IMAGE}" value="$image" zoom="true" zoomControl="true"/>\n'
        f'  <Choices name="{CLASS}" toName="{IMAGE}" choice="single" required="true">\n'
        f"{choices}\n"
        "  </Choices>\n"
        f'  <TextArea name="{COMMENT}" toName="{IMAGE}" maxSubmissions="1" placeholder="Comment"/>\n'
        "</View>\n"
    )


def label_task(chosen: LabelTask, image: str, task: Classes, suggestion: bool, metadata: bool) -> dict[str, Any]:
    """One task: the picture's address, the prediction's id and, where asked for, the model's suggestion and metadata.

    Never the patient's pseudonym, the caller or the institution.
    """
    row = chosen.row
    data: dict[str, Any] = {
        "image": image,
        "prediction_id": row["id"],
        "received_at": (datetime.fromtimestamp(row["received_at"] // 1_000_000, UTC)).isoformat(),
        "model_version": row["model_version"],
        "selected_by": chosen.selected_by,
    }
    if metadata:
        data["metadata"] = {name: value for name, value in row["metadata"].items() if value is not None}
    suggested = suggested_class(row, task) if suggestion else None
    if suggested is None:
        return {"data": data}
    result = {"from_name": CLASS, "to_name": IMAGE, "type": "choices", "value": {"choices": [suggested]}}
    prediction = {"model_version": row["model_version"], "score": row["risk"], "result": [result]}
    return {"data": data, "predictions": [prediction]}


def suggested_class(row: Mapping[str, Any], task: Classes) -> str | None:
    """What the model says: the likeliest malignant class at or above the threshold, the likeliest other one below it;
    None where it abstained. The likeliest class of all would hardly ever be malignant."""
    risk, threshold = row["risk"], row["threshold"]
    if row["abstained"] or risk is None or threshold is None:
        return None
    names = [name for name in task.classes if (name in task.malignant) == (risk >= threshold)]
    probabilities = row["class_probabilities"] or {}
    return max(names, key=lambda name: probabilities.get(name, 0.0))


class Annotation(NamedTuple):
    """One annotation as its export has it, unchecked: whatever JSON can hold, None where it says nothing.

    Attributes:
        number: its id, which is unique in one Label Studio.
        task: the id of its task there.
        choices: of the control for the class.
        completed_by: the annotator's number or email.
        updated_at: ISO 8601; of creation where it was never changed.
    """

    number: Any
    task: Any
    prediction_id: Any
    cancelled: bool
    choices: Any
    comment: Any
    completed_by: Any
    updated_at: Any


def annotations(content: Any) -> Iterator[Annotation]:
    """The annotations of a JSON or JSON-MIN export, in its order; drafts and the model's predictions are none.

    Raises:
        ValueError: not such an export.
    """
    if not isinstance(content, list):
        raise ValueError(f"expected a JSON list of tasks, as Label Studio exports it; found {type(content).__name__}")
    for place, item in enumerate(content):
        if isinstance(item, dict) and isinstance(item.get("annotations"), list):
            data = item.get("data") if isinstance(item.get("data"), dict) else {}
            for given in item["annotations"]:
                yield _of_json(given if isinstance(given, dict) else {}, data, item.get("id"))
        elif isinstance(item, dict) and "annotation_id" in item:
            yield _of_json_min(item)
        else:
            raise ValueError(f"entry {place}: neither a task with annotations (JSON) nor an annotation (JSON-MIN)")


def _of_json(given: dict[str, Any], data: dict[str, Any], task: Any) -> Annotation:
    results = given.get("result") if isinstance(given.get("result"), list) else []

    def value(name: str, kind: str, key: str) -> Any:
        for item in results:
            if isinstance(item, dict) and item.get("from_name") == name and item.get("type") == kind:
                return item["value"].get(key) if isinstance(item.get("value"), dict) else None
        return None

    by = given.get("completed_by")
    return Annotation(
        number=given.get("id"),
        task=task,
        prediction_id=data.get("prediction_id"),
        cancelled=bool(given.get("was_cancelled")),
        choices=value(CLASS, "choices", "choices"),
        comment=value(COMMENT, "textarea", "text"),
        completed_by=(by.get("email") or by.get("id")) if isinstance(by, dict) else by,
        updated_at=given.get("updated_at") or given.get("created_at"),
    )


def _of_json_min(item: dict[str, Any]) -> Annotation:
    choices = item.get(CLASS)
    return Annotation(
        number=item["annotation_id"],
        task=item.get("id"),
        prediction_id=item.get("prediction_id"),
        cancelled=bool(item.get("was_cancelled")),
        # A single choice is written as text, several as {"choices": [...]}.
        choices=choices.get("choices") if isinstance(choices, dict) else choices,
        comment=item.get(COMMENT),
        completed_by=item.get("annotator"),
        updated_at=item.get("updated_at") or item.get("created_at"),
    )
