"""Answers in words: what a person is told to do, how sure that is, and which lesion is the odd one out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from modeling.abstention import REASONS
from modeling.tested_risks import TestedRisks
from monitoring.prediction_log import PredictionRecord
from serve.lesion_view import BANDS, REASON_ADVICE, standing_out, view_lesion
from serve.served_model import ServedModel
from serve.settings import ModelReference


@pytest.fixture
def model():
    risks = np.linspace(0.001, 0.999, 1000)
    tested = TestedRisks(risks, np.arange(1000) >= 500)
    reference = ModelReference(bundle_uri="x", sha256="0" * 64, version="3")
    return ServedModel(reference, "d", None, 64, {}, None, ["none", "patient"], 0.02, {"none": tested})


def record(**fields) -> PredictionRecord:
    return PredictionRecord(**{"model_version": "3", "context": "none", "risk": 0.1, "band": "high"} | fields)


def test_a_risk_is_told_as_a_multiple_of_the_average_and_in_counted_lesions(model):
    view = view_lesion(record(), 1, model)
    assert (view.times, view.headline, view.next_step) == ("5", *BANDS["high"])
    assert (view.similar.number, view.similar.malignant) == (100, 0)
    assert view_lesion(record(risk=0.001), 1, model).times == "less than 0.1"
    rare = dataclasses.replace(model, average_risk=0.0005)
    times = [view_lesion(record(risk=risk), 1, rare).times for risk in (0.0006, 0.004976, 0.06, 0.51)]
    assert times == ["1.2", "10", "120", "1,000"]
    assert view_lesion(record(risk=0.9), 1, model).similar.malignant == 100


def test_answers_of_another_model_are_not_compared_with_this_one_s_tests(model):
    view = view_lesion(record(model_version="2"), 1, model)
    assert view.times_average is None and view.similar is None and view.headline == BANDS["high"][0]


def test_a_picture_without_an_answer_is_no_all_clear_and_says_what_to_do(model):
    view = view_lesion(record(risk=None, band=None, abstained=True, reasons=["blurred"]), 1, model)
    assert "no all-clear" in view.next_step and view.advice == (REASON_ADVICE["blurred"],)
    assert view.probabilities == [] and view.times_average is None
    assert not any(words in view.headline + view.next_step for words in ("Low priority", "Nothing to do"))


def test_every_reason_of_the_model_has_its_advice():
    assert set(REASON_ADVICE) == set(REASONS)


def patient(number: int = 12) -> list[PredictionRecord]:
    rng = np.random.default_rng(0)
    return [
        record(
            risk=r,
            image_score=r,
            brightness=b,
            red=0.6 + e,
            green=0.5,
            blue=0.4,
            metadata={"clin_size_long_diam_mm": s},
        )
        for r, b, e, s in zip(
            rng.uniform(0.01, 0.03, number),
            rng.uniform(0.5, 0.6, number),
            rng.uniform(-0.02, 0.02, number),
            rng.uniform(2, 4, number),
            strict=True,
        )
    ]


def test_the_odd_one_out_is_named_with_what_is_odd_about_it():
    lesions = patient()
    assert standing_out(lesions) == [()] * 12
    lesions[4] = lesions[4].model_copy(update={"brightness": 0.1, "metadata": {"clin_size_long_diam_mm": 15.0}})
    found = standing_out(lesions)
    assert found[4] == ("darker than this patient's others", "larger than this patient's others")
    assert [index for index, why in enumerate(found) if why] == [4]


def test_few_lesions_or_lesions_all_alike_compare_nothing():
    lesions = patient(4)
    lesions[0] = lesions[0].model_copy(update={"brightness": 0.01})
    assert standing_out(lesions) == [()] * 4
    same = [record(brightness=0.5)] * 9 + [record(brightness=0.1)]
    assert standing_out(same) == [()] * 10


def test_lesions_without_an_answer_are_compared_by_what_they_have():
    lesions = patient()
    lesions[2] = lesions[2].model_copy(update={"risk": None, "band": None, "abstained": True, "brightness": 0.05})
    assert standing_out(lesions)[2] == ("darker than this patient's others",)
