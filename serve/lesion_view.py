"""A stored answer in words: how risky, how sure, what to do, and which of a patient's lesions stands out and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modeling.tested_risks import SimilarRisks
from monitoring.prediction_log import PredictionRecord
from serve.served_model import ServedModel

BANDS = {
    "low": (
        "Low priority",
        "Nothing to do now. Photograph it again in three months, and show it to a doctor if it grows, changes colour "
        "or shape, itches or bleeds.",
    ),
    "moderate": (
        "Should be seen by a doctor",
        "Have a doctor look at it within the next weeks. Do not wait for it to change.",
    ),
    "high": (
        "Should be seen soon",
        "Show it to a dermatologist soon, within days rather than weeks.",
    ),
}
# What to do about a picture that is not scored.
REASON_ADVICE = {
    "too_dark": "The picture is too dark. Take it again in daylight or under a lamp.",
    "too_bright": "The picture is too bright. Avoid the flash and direct sun.",
    "low_contrast": "The picture is flat, as behind fog. Clean the lens and take it again.",
    "high_contrast": "Light and shadow are too hard. Take it again in even light.",
    "blurred": "The picture is blurred. Hold still, tap on the lesion to focus, and take it again.",
    "noisy": "The picture is grainy. Take it again in better light.",
    "unusual_colour": "The colours are not those of skin in white light. Use daylight or a white lamp.",
    "unlike_training": "The picture is unlike those that the model knows. Retake it closer, with the lesion in the "
    "middle and some skin around it. If it is right as it is, a person has to judge it.",
}
CONTEXTS = {
    "image_only": "the picture alone",
    "none": "the picture and what you said about it",
    "patient": "the picture, what you said about it, and this patient's other lesions",
}
# With fewer lesions of a patient nothing is usual for that patient.
MIN_LESIONS = 5
# A modified z-score beyond which a value is an outlier (Iglewicz and Hoaglin 1993).
OUTLIER = 3.5
_TO_SIGMA = 0.6745


@dataclass(frozen=True)
class LesionView:
    """What a page shows of one stored lesion.

    Attributes:
        record: as it is stored.
        number: its place in the upload, from 1.
        headline: the risk band in words, or that there is no risk. The words are of urgency: a band starts at the
            threshold that finds so many cancers, which can lie below the average risk.
        next_step: what to do.
        times_average: the risk over that of an average lesion; None when abstained.
        similar: tested lesions with nearly this risk; None when abstained, or of a model tested on too few.
        basis: what the risk rests on.
        advice: for each reason to abstain, what to do.
        standing_out: in which way it differs from the patient's others.
    """

    record: PredictionRecord
    number: int
    headline: str
    next_step: str
    times_average: float | None
    similar: SimilarRisks | None
    basis: str
    advice: tuple[str, ...]
    standing_out: tuple[str, ...] = ()

    @property
    def times(self) -> str:
        """`times_average` for people: two digits, and no more than what they mean."""
        assert self.times_average is not None
        if self.times_average < 0.1:
            return "less than 0.1"
        rounded = float(f"{self.times_average:.2g}")
        return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"

    @property
    def probabilities(self) -> list[tuple[str, float]]:
        """Classes by probability, likeliest first; none when abstained."""
        if self.record.abstained or not self.record.class_probabilities:
            return []
        return sorted(self.record.class_probabilities.items(), key=lambda item: -item[1])


def view_lesion(record: PredictionRecord, number: int, model: ServedModel) -> LesionView:
    """One answer in words. `model` speaks for its own answers only: for those of another version the comparison with
    tested lesions is left out."""
    basis = CONTEXTS[record.context]
    if record.abstained or record.risk is None:
        advice = tuple(REASON_ADVICE.get(reason, f"The model refused it: {reason}.") for reason in record.reasons)
        step = "This is no all-clear. Take the picture again as below, or have a doctor look at the lesion."
        return LesionView(record, number, "No answer for this picture", step, None, None, basis, advice)
    headline, step = BANDS[record.band or "low"]
    same = record.model_version == model.reference.version
    times = record.risk / model.average_risk if same and model.average_risk > 0 else None
    tested = model.tested.get(record.context) if same else None
    similar = None if tested is None else tested.similar(record.risk)
    return LesionView(record, number, headline, step, times, similar, basis, ())


def _figures(record: PredictionRecord) -> dict[str, float | None]:
    """What is compared between a patient's lesions; each is higher where `_WORDS` says so."""
    size = record.metadata.get("clin_size_long_diam_mm")
    odds = record.risk is not None and 0 < record.risk < 1
    return {
        "risk": math.log(record.risk / (1 - record.risk)) if odds else None,
        "score": record.image_score,
        "darkness": None if record.brightness is None else -record.brightness,
        "redness": math.log(record.red / record.green) if record.red and record.green else None,
        "size": size if isinstance(size, int | float) else None,
    }


_WORDS = {
    "risk": ("a higher risk", None),
    "score": ("looks more like cancer", None),
    "darkness": ("darker", "lighter"),
    "redness": ("redder", "less red"),
    "size": ("larger", "smaller"),
}


def standing_out(records: Sequence[PredictionRecord]) -> list[tuple[str, ...]]:
    """For each of a patient's lesions, how it differs from the others ("ugly duckling"); empty for one that does not.

    A figure stands out by its modified z-score, 0.6745 (x - median) / MAD; with fewer than `MIN_LESIONS` that have the
    figure, or when more than half have the same value, it compares nothing.
    """
    figures = [_figures(record) for record in records]
    found: list[list[str]] = [[] for _ in records]
    for name, (higher, lower) in _WORDS.items():
        values = np.array([np.nan if row[name] is None else row[name] for row in figures], np.float64)
        known = np.isfinite(values)
        if known.sum() < MIN_LESIONS:
            continue
        median = np.median(values[known])
        spread = np.median(np.abs(values[known] - median))
        if spread <= 0:
            continue
        for index in np.flatnonzero(known):
            score = _TO_SIGMA * (values[index] - median) / spread
            words = higher if score > OUTLIER else lower if score < -OUTLIER else None
            if words is not None:
                found[index].append(f"{words} than this patient's others")
    return [tuple(words) for words in found]
