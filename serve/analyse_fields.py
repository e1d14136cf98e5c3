"""The short form beside a picture: age, sex, body site and size, under the names that the model's task has for them."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.datastructures import FormData

from modeling.schema import TaskSpec
from serve.errors import invalid_field
from serve.page_forms import text_field

# ISIC 2024's values of `anatom_site_general`, which the body figure knows.
BODY_SITES = (
    "head/neck",
    "anterior torso",
    "posterior torso",
    "upper extremity",
    "lower extremity",
    "palms/soles",
    "oral/genital",
)
SEXES = ("female", "male")
_SITE_COLUMN = "anatom_site_general"
# Names in the data sets that we know; the first one that the task has is asked for.
_AGE, _SEX, _SIZE = ("age_approx", "age"), ("sex",), ("clin_size_long_diam_mm",)


@dataclass(frozen=True)
class Field:
    """One field of the form.

    Attributes:
        column: of the task, and the field's name.
        label: what people read.
        options: to choose from; empty: a number.
        minimum, maximum: of a number; None: no bound.
        unit: of a number.
    """

    column: str
    label: str
    options: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    unit: str = ""


def form_fields(task: TaskSpec) -> list[Field]:
    """The fields that this model uses, of the four that people can answer."""
    fields = []

    def number(names: tuple[str, ...], label: str, unit: str) -> None:
        name = next((name for name in names if name in task.columns), None)
        if name is not None:
            spec = task.columns[name]
            fields.append(Field(name, label, (), spec.minimum, spec.maximum, unit))

    number(_AGE, "Age", "years")
    if _SEX[0] in task.columns:
        fields.append(Field(_SEX[0], "Sex", tuple(task.columns[_SEX[0]].categories or SEXES)))
    site = task.site_column
    if site is not None:
        known = task.columns[site].categories or (BODY_SITES if site == _SITE_COLUMN else ())
        if known:
            fields.append(Field(site, "Body site", tuple(known)))
    number(_SIZE, "Longest diameter", "mm")
    return fields


def has_figure(fields: list[Field]) -> bool:
    """Whether the body figure's regions are the choices of the body site."""
    return any(set(BODY_SITES) <= set(field.options) for field in fields)


def read_fields(form: FormData, fields: list[Field]) -> dict[str, float | str]:
    """What was filled in, by column; ranges are left to `parse_metadata`.

    Raises:
        ApiError: 422 for a number that is none.
    """
    values: dict[str, float | str] = {}
    for field in fields:
        text = text_field(form, field.column)
        if not text:
            continue
        if field.options:
            values[field.column] = text
            continue
        try:
            values[field.column] = float(text.replace(",", "."))
        except ValueError as error:
            raise invalid_field(f"{field.label}: {text[:60]!r}; expected a number of {field.unit}") from error
    return values
