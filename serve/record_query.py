"""What a request may ask of the log: a record by its id, or a page of those that pass filters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field

from serve.errors import invalid_field
from serve.lesion import parse_text, parse_time
from serve.record_api import Cursor, Limit
from store.prediction_records import PredictionFilter

PredictionId = Annotated[str, Path(pattern=r"^[!-.0-~]{1,64}$", examples=["6f1c1fd0d29f4c9ab9f04b8a0a7d7c6e"])]


class PredictionQuery(BaseModel):
    """Filters of a page of records; all given ones hold."""

    model_config = ConfigDict(
        extra="forbid",
        protected_namespaces=(),
        json_schema_extra={"examples": [{"from": "2024-05-01", "abstained": False, "limit": 20}]},
    )

    from_: str | None = Field(None, alias="from", description="received then or later; ISO 8601, UTC without offset")
    to: str | None = Field(None, description="received before; ISO 8601")
    model_version: str | None = None
    band: Literal["low", "moderate", "high"] | None = None
    abstained: bool | None = None
    context: Literal["image_only", "none", "patient"] | None = None
    institution: str | None = None
    device: str | None = None
    patient_id: str | None = Field(None, description="hashed before the log is searched")
    role: Literal["champion", "shadow"] = "champion"
    labelled: bool | None = Field(None, description="whether an expert has labelled it")
    label_state: Literal["single", "agreed", "disagreed", "adjudicated"] | None = Field(
        None, description="what its labels come to; disagreed: a third reader is needed"
    )
    min_risk: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    max_risk: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    cursor: Cursor = None
    limit: Limit = 50

    def to_filter(self, pseudonym: Any) -> PredictionFilter:
        """The store's filter.

        Args:
            pseudonym: gives a patient's HMAC.

        Raises:
            ApiError: 422 naming the field.
        """
        from_us, to_us = parse_time(self.from_, "from"), parse_time(self.to, "to")
        if from_us is not None and to_us is not None and to_us < from_us:
            raise invalid_field(f"to: {self.to!r} is before from {self.from_!r}; expected the later time")
        if self.min_risk is not None and self.max_risk is not None and self.max_risk < self.min_risk:
            raise invalid_field(f"max_risk: {self.max_risk} is below min_risk; expected at least {self.min_risk}")
        patient_id = parse_text(self.patient_id, "patient_id")
        return PredictionFilter(
            role=self.role,
            from_us=from_us,
            to_us=to_us,
            model_version=parse_text(self.model_version, "model_version"),
            band=self.band,
            abstained=self.abstained,
            context=self.context,
            institution=parse_text(self.institution, "institution"),
            device=parse_text(self.device, "device"),
            patient_hmac=None if patient_id is None else pseudonym(patient_id),
            labelled=self.labelled,
            label_state=self.label_state,
            min_risk=self.min_risk,
            max_risk=self.max_risk,
        )
