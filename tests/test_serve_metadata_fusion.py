"""Each lesion is answered by the richest model its metadata allows, as the same lesion would be alone."""

from __future__ import annotations

import numpy as np
import pytest

from modeling.bundle import load_bundle
from serve.metadata_fusion import MetadataFusionLogic, has_metadata
from tests.bundle_factory import served_bundle
from tests.tiny_bundle import tiny_bundle

LOG_PROBABILITIES = np.log(np.array([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6], [0.02, 0.98]], np.float32))
RECORDS = [
    None,
    {"age_approx": 70.0, "sex": "male"},
    {"age_approx": None, "sex": None},
    {"age_approx": 30.0, "sex": None},
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("fusion") / "bundle")


def test_the_context_follows_the_metadata(bundle):
    fused = MetadataFusionLogic(bundle).fuse(LOG_PROBABILITIES, RECORDS)
    assert [risk.context for risk in fused.risks] == ["image_only", "none", "image_only", "none"]
    assert fused.digest == bundle.sha256
    assert not has_metadata({"sex": None}) and has_metadata({"age_approx": 0.0})


def test_risk_band_and_threshold_are_the_context_models(bundle):
    models = load_bundle(bundle.bundle_uri).contexts
    for row, fused in enumerate(MetadataFusionLogic(bundle).fuse(LOG_PROBABILITIES, RECORDS).risks):
        model = models[fused.context]
        columns = (
            None if fused.context == "image_only" else {name: [RECORDS[row][name]] for name in ("age_approx", "sex")}
        )
        expected = model.predict(LOG_PROBABILITIES[row : row + 1], columns)[0]
        assert fused.class_probabilities == pytest.approx({"benign": expected[0], "malignant": expected[1]})
        assert fused.risk == pytest.approx(expected[1])
        assert fused.threshold == model.thresholds.threshold
        assert fused.band == model.thresholds.band(fused.risk)


def test_a_lesion_is_answered_alike_alone_and_in_a_batch(bundle):
    logic = MetadataFusionLogic(bundle)
    together = logic.fuse(LOG_PROBABILITIES, RECORDS).risks
    alone = [logic.fuse(LOG_PROBABILITIES[row : row + 1], [record]).risks[0] for row, record in enumerate(RECORDS)]
    assert together == alone


def test_a_bundle_without_metadata_models_answers_from_the_picture(tmp_path):
    small = tiny_bundle(tmp_path / "bundle", contexts=["image_only"])
    reference = served_bundle(tmp_path / "other").model_copy(
        update={"bundle_uri": str(small.directory), "sha256": small.digest}
    )
    logic = MetadataFusionLogic(reference)
    assert [risk.context for risk in logic.fuse(LOG_PROBABILITIES, RECORDS).risks] == ["image_only"] * 4
    assert set(logic.describe()["contexts"]) == {"image_only"}


def test_a_bundle_without_image_only_is_refused(tmp_path):
    small = tiny_bundle(tmp_path / "bundle", contexts=["none"])
    reference = served_bundle(tmp_path / "other").model_copy(
        update={"bundle_uri": str(small.directory), "sha256": small.digest}
    )
    with pytest.raises(ValueError, match="no image_only context"):
        MetadataFusionLogic(reference)
