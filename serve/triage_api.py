"""What the triage of a patient answers, as models."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.api import PREDICTION_EXAMPLE, Prediction, Problem


class RankedLesion(Prediction):
    """A lesion's answer and its place among the patient's.

    The rank is that of the risk, 1 = highest; lesions of equal risk share the best of their ranks.
    """

    index: int = Field(description="place of its picture in the request, from 0")
    rank: int | None = Field(description="1 = highest risk; null when abstained: a person has to look")


class RefusedLesion(Problem):
    """A lesion that could not be scored, and why."""

    index: int = Field(description="place of its picture in the request, from 0")


class Triage(BaseModel):
    """A patient's lesions in the order in which to look at them."""

    model_config = ConfigDict(
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {
                    "model_version": "3",
                    "context": "patient",
                    "lesions": [{**PREDICTION_EXAMPLE, "context": "patient", "index": 1, "rank": 1}],
                    "refused": [
                        {"error": "unsupported_media_type", "detail": "image: not a JPEG, PNG or WebP file", "index": 0}
                    ],
                }
            ]
        },
    )

    model_version: str
    context: Literal["patient"] = "patient"
    lesions: list[RankedLesion] = Field(
        description="those without a rank first, since nobody has judged them; then by falling risk"
    )
    refused: list[RefusedLesion] = Field(description="pictures or metadata that are wrong themselves")
