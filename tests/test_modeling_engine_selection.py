"""No engine that disagrees with torch is ever chosen; among the others the choice follows the timings."""

from __future__ import annotations

import numpy as np
import pytest

from modeling.engine_candidates import candidates_for
from modeling.engine_interface import EngineOutput
from modeling.engine_parity import ParityLimits, differences
from modeling.engine_selection import choose, measure_candidates
from modeling.engine_set import (
    Candidate,
    CandidateReport,
    EngineSet,
    device_key,
    engine_set_path,
    engine_sets,
    find_engine_set,
)
from modeling.engine_timing import BUCKETS
from modeling.engines import create_engine
from modeling.recorded_answers import measure_parity
from tests.tiny_bundle import tiny_bundle

CPU = {"engine": "onnxruntime", "options": {"threads": 1}}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def wrong_bundle(tmp_path_factory):
    """Its ONNX graph answers half a logit off what torch said."""
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "wrong", onnx_bias=0.5)


def test_default_candidates_agree_and_each_bucket_gets_one(bundle):
    engine_set = measure_candidates(bundle, candidates_for(None, BUCKETS), rounds=2)
    assert engine_set.passed and engine_set.bundle_digest == bundle.digest
    assert set(engine_set.chosen) == {1, 8, 32}
    exact = [report for report in engine_set.candidates if report.candidate.precision == "fp32"]
    # Where the processor computes in bfloat16, that is tried too, and nothing here shows what it costs.
    assert exact and not any(report.passed for report in engine_set.candidates if report not in exact)
    for report in exact:
        assert report.passed and report.parity.probability < 1e-5
        assert all(ms > 0 for ms in report.ms_per_image.values())
        assert set(report.images_per_second) == {1, 8, 32} and all(v > 0 for v in report.images_per_second.values())
    create_engine(bundle, engine_set.choice).warm_up(8)


def test_a_network_off_by_half_a_logit_is_refused_with_its_figures(wrong_bundle):
    engine_set = measure_candidates(wrong_bundle, candidates_for(None, BUCKETS), rounds=1)
    assert not engine_set.passed and engine_set.chosen == {}
    assert "logit differs by 0.5, limit 0.01" in engine_set.candidates[0].reason
    assert engine_set.candidates[0].ms_per_image == {}
    with pytest.raises(ValueError, match="no engine of bundle .* passed"):
        assert engine_set.choice


def test_a_broken_candidate_does_not_stop_the_others(bundle):
    said = []
    candidates = [Candidate(name="broken", choice={"engine": "abacus"}), Candidate(name="cpu", choice=CPU)]
    engine_set = measure_candidates(bundle, candidates, rounds=1, say=said.append)
    # What a replica holds its engine to when it starts.
    assert 0 <= engine_set.choice.pop("max_delta_p") < 1e-5
    assert {name: engine_set.choice[name] for name in CPU} == CPU
    assert "unknown engine 'abacus'" in engine_set.candidates[0].reason
    assert said[0].startswith("broken: refused: ") and said[1] == "cpu: the same model"


class _Fake:
    """Answers correctly except where told otherwise."""

    def __init__(self, reference, spoil):
        self.name, self.reference, self.spoil = "fake", reference, spoil

    def run(self, images, with_cam=False):
        rows = [int(np.flatnonzero((self.reference["images"] == image).all(axis=(1, 2, 3)))[0]) for image in images]
        logits, embedding = self.reference["logits"][rows].copy(), self.reference["embedding"][rows].copy()
        cam = np.zeros((len(rows), logits.shape[1], 2, 2), np.float32)
        return self.spoil(logits, embedding, cam)


def _wrong_only_in_batches(logits, embedding, cam):
    logits[1:, 0] += 0.25
    return EngineOutput(logits, embedding, cam)


def _not_finite(logits, embedding, cam):
    logits[0] = np.nan
    return EngineOutput(logits, embedding, cam)


def test_an_error_that_shows_only_in_batches_is_seen(bundle):
    parity = measure_parity(_Fake(bundle.parity(), _wrong_only_in_batches), bundle.parity(), batches=(1, 8))
    assert parity.logit == pytest.approx(0.25)
    assert measure_parity(_Fake(bundle.parity(), _wrong_only_in_batches), bundle.parity(), (1,)).logit == 0
    assert parity.batches > 0.01  # which refuses an engine of any precision
    assert "batches differs" in differences(parity, ParityLimits(), float32=False)[0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_not_finite, "logits holds values that are not finite"),
        (lambda logits, embedding, cam: EngineOutput(logits, embedding, None), "cam has shape None"),
        (lambda logits, embedding, cam: EngineOutput(logits[:, :1], embedding, cam), r"logits has shape \(8, 1\)"),
    ],
)
def test_malformed_outputs_are_refused(bundle, spoil, message):
    with pytest.raises(ValueError, match=message):
        measure_parity(_Fake(bundle.parity(), spoil), bundle.parity(), batches=(8,))


def _report(name, ms, rates=None, passed=True):
    rates = {bucket: 1000 / value for bucket, value in ms.items()} if rates is None else rates
    candidate = Candidate(name=name, choice=CPU)
    return CandidateReport(candidate=candidate, passed=passed, ms_per_image=ms, images_per_second=rates)


def test_throughput_is_the_whole_devices_and_latency_one_runs():
    reports = [_report("one thread", {1: 3.0}, {1: 600}), _report("two threads", {1: 2.0}, {1: 500})]
    assert choose(reports, (1,), "throughput") == {1: "one thread"}
    assert choose(reports, (1,), "latency") == {1: "two threads"}


def test_the_choice_is_made_per_bucket_and_never_falls_on_a_refused_engine():
    reports = [
        _report("a", {1: 1.0, 8: 3.0}),
        _report("b", {1: 2.0, 8: 2.0}),
        _report("fast but wrong", {}, passed=False),
    ]
    assert choose(reports, (1, 8), "throughput") == {1: "a", 8: "b"}


def test_a_choice_per_bucket_can_be_built_and_read(bundle):
    reports = [_report("a", {1: 1.0, 8: 3.0}), _report("b", {1: 2.0, 8: 2.0})]
    engine_set = _engine_set(bundle.digest, "cpu", {1: "a", 8: "b"}).model_copy(update={"candidates": reports})
    assert engine_set.summary == "a up to 1, b up to 8"
    assert engine_set.choice == {"buckets": {"1": CPU, "8": CPU}}
    create_engine(bundle, engine_set.choice).warm_up(8)
    assert _engine_set(bundle.digest, "cpu", {1: "a", 8: "a"}).summary == "a"


def _engine_set(digest, device, chosen):
    return EngineSet(
        bundle_digest=digest,
        device=device,
        cores=2,
        created_at="2026-01-01T00:00:00+00:00",
        objective="throughput",
        limits=ParityLimits(),
        candidates=[_report("cpu", {1: 1.0}), _report("other", {1: 1.0})],
        chosen=chosen,
    )


def test_sets_are_kept_per_bundle_and_device(tmp_path):
    digest = "a" * 64
    here, elsewhere = _engine_set(digest, device_key(), {1: "cpu"}), _engine_set(digest, "gpu", {1: "other"})
    for engine_set in (here, elsewhere):
        engine_set.save(tmp_path)
    assert find_engine_set(tmp_path, digest) == here
    assert find_engine_set(tmp_path, digest, "gpu") == elsewhere
    assert find_engine_set(tmp_path, digest, "tpu") is None
    assert find_engine_set(tmp_path, "b" * 64) is None
    assert len(engine_sets(tmp_path, digest)) == 2
    assert here.save(tmp_path) == engine_set_path(tmp_path, digest, device_key())
    assert len(engine_sets(tmp_path, digest)) == 2


def test_a_damaged_or_foreign_set_is_refused(tmp_path):
    path = _engine_set("a" * 64, "cpu", {1: "cpu"}).save(tmp_path)
    with pytest.raises(ValueError, match="belongs to bundle aaaa"):
        find_engine_set(tmp_path, "a" * 16 + "b" * 48, "cpu")
    path.write_text("{")
    with pytest.raises(ValueError, match="run export_engine again"):
        find_engine_set(tmp_path, "a" * 64, "cpu")
