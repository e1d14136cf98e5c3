"""Risks on the gate split: as training measures them, computed once, and resumed after a kill."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import score_parts, table_scoring
from data_pipelines.gate_scoring import find_version, gate_risks, trained_on, why_not_scored
from data_pipelines.image_reader import JoinedFiles
from modeling.metrics import risk, roc_auc
from tests.gate_lesions import bundle_of, make_lesions, stream_in_process
from tests.tiny_bundle import tiny_task


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    return make_lesions(tmp_path_factory.mktemp("lesions") / "raw")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, version):
    return bundle_of(tmp_path_factory.mktemp("bundle") / "tiny", version, contexts=["image_only", "none"])


@pytest.fixture
def calls(monkeypatch):
    made: list[int] = []
    monkeypatch.setattr(table_scoring, "stream_scores", stream_in_process(made))
    return made


def scored(bundle, version, folder, said=None):
    return gate_risks(bundle, version, folder, 1, lambda: None, (said if said is not None else []).append)


def test_every_context_gets_the_risk_that_the_model_gives(bundle, version, tmp_path, calls):
    risks = scored(bundle, version, tmp_path)
    assert set(risks) == {"image_only", "none"} and calls == [len(version.gate_positions)]
    lesions = version.lesions.iloc[version.gate_positions]
    assert roc_auc(lesions["label"], risks["image_only"]) > 0.95
    # One lesion by hand.
    from data_pipelines.lesion_pictures import read_pictures
    from modeling.onnxruntime_engine import OnnxRuntimeEngine

    logits = OnnxRuntimeEngine(bundle.onnx_path).run(read_pictures(version, version.gate_positions[3:4], 16)).logits
    logits = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    columns = {name: [lesions[name].iloc[3]] for name in ("age_approx", "sex")}
    expected = risk(bundle.contexts["none"].predict(logits, columns), bundle.task)
    assert risks["none"][3] == pytest.approx(expected[0], abs=1e-6)


def test_pictures_that_labels_added_are_read_from_their_own_file(bundle, version, tmp_path, calls):
    expected = scored(bundle, version, tmp_path / "one")
    first, size = str(version.images_path), Path(version.images_path).stat().st_size
    shutil.copy(first, tmp_path / "added.hdf5")
    lesions = version.lesions.copy()
    lesions.loc[version.gate_positions[::2], "offset"] += size
    joined = replace(version, lesions=lesions, images_path=JoinedFiles(first, size, str(tmp_path / "added.hdf5")))
    found = scored(bundle, joined, tmp_path / "two")
    assert all((found[name] == expected[name]).all() for name in expected)


def test_a_second_run_reads_what_was_kept_and_no_id_is_in_it(bundle, version, tmp_path, calls):
    first, said = scored(bundle, version, tmp_path), []
    again = scored(bundle, version, tmp_path, said)
    assert len(calls) == 1 and "are known" in said[0]
    assert all((first[name] == again[name]).all() for name in first)
    (file,) = tmp_path.glob("*.*")
    content = file.read_bytes()
    assert b"ISIC" not in content and b"P00" not in content
    file.write_bytes(content[: len(content) // 2])
    repaired = scored(bundle, version, tmp_path)
    assert len(calls) == 2 and (repaired["none"] == first["none"]).all()


def test_a_killed_run_goes_on(bundle, version, tmp_path, monkeypatch):
    monkeypatch.setattr(score_parts, "PART_ROWS", 50)
    whole = stream_in_process()

    def cut_off(*arguments):
        yield next(whole(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(table_scoring, "stream_scores", cut_off)
        scored(bundle, version, tmp_path)
    calls: list[int] = []
    monkeypatch.setattr(table_scoring, "stream_scores", stream_in_process(calls))
    resumed = scored(bundle, version, tmp_path)
    assert calls == [len(version.gate_positions) - 50]
    assert (resumed["none"] == scored(bundle, version, tmp_path / "other")["none"]).all()
    assert not list(tmp_path.glob("*.parts"))


def test_a_version_is_found_by_its_digest_wherever_the_folder_points(version, tmp_path):
    make_lesions(tmp_path / "raw", extra=0)
    newer = make_lesions(tmp_path / "raw2", extra=40)
    root = tmp_path / "dataset"
    older = next(path for path in root.iterdir() if path.name == version.digest[:12])
    for place in (root, older, newer.path):
        assert find_version(place, version.digest).digest == version.digest
        assert find_version(place, newer.digest).path.name == newer.digest[:12]
        assert find_version(place, "f" * 64) is None
    # Patients keep their side, so the older model saw nothing of the newer gate split.
    assert len(newer.gate_positions) > len(version.gate_positions)
    assert not trained_on(version, newer).any()


def test_gate_lesions_that_trained_the_other_model_are_found(version):
    from dataclasses import replace

    renamed = version.lesions.copy()
    train = version.training_positions
    # What happens when a patient is given a new id: the pictures change sides.
    renamed.loc[train[:5], "fold"] = -1
    renamed.loc[train[:5], "group"] = [f"new-{index}" for index in range(5)]
    seen = trained_on(version, replace(version, lesions=renamed))
    assert seen.sum() == 5 and renamed.iloc[replace(version, lesions=renamed).gate_positions][seen].index.tolist() == (
        sorted(train[:5].tolist())
    )


def test_a_gate_patient_of_whom_one_picture_trained_under_another_id_is_left_out_whole(version):
    """As of labelled lesions whose patient stood under a pseudonym then, and is found in the base data now."""
    from dataclasses import replace

    now = version.lesions.copy()
    one, *others = version.training_positions[:3]
    now.loc[[one, *others], "fold"] = -1
    now.loc[[one, *others], "group"] = "patient"
    before = replace(version, lesions=version.lesions.drop(index=others).reset_index(drop=True))
    after = replace(version, lesions=now)
    seen = trained_on(before, after)
    assert after.gate_positions[seen].tolist() == sorted([one, *others])


def test_what_cannot_be_scored_says_why(bundle, version, tmp_path):
    from dataclasses import replace

    assert why_not_scored(bundle, version) == ""
    assert "reads pictures" in why_not_scored(bundle, replace(version, images_path=None))
    without = replace(version, lesions=version.lesions.drop(columns=["sex"]))
    assert why_not_scored(bundle, without) == "it reads sex, which the data set lacks"
    patients = bundle_of(tmp_path / "patients", version, contexts=["image_only", "patient"])
    assert "lesions of one patient_id" in why_not_scored(patients, replace(version, task=tiny_task()))


def test_a_picture_that_cannot_be_read_is_one_clear_line(bundle, version, tmp_path, monkeypatch):
    def broken(images, rows, onnx_path, input_size, options):
        for part in stream_in_process()(images, rows, onnx_path, input_size, options):
            part.errors = {0: "truncated"} if part.row[0] == 0 else {}
            part.log_probabilities[list(part.errors)] = np.nan
            yield part

    monkeypatch.setattr(table_scoring, "stream_scores", broken)
    name = version.lesions["id"].iloc[version.gate_positions[0]]
    with pytest.raises(ValueError, match=f"gate image {name}: truncated"):
        scored(bundle, version, tmp_path)


def test_pictures_that_were_added_to_a_version_are_scored_too(bundle, version, tmp_path, calls):
    """Half of the byte ranges lie in a file of the version's own, as after prepare_dataset --add-labels."""
    alone = scored(bundle, version, tmp_path / "alone")
    images, size = version.images_path, Path(version.images_path).stat().st_size
    lesions = version.lesions.copy()
    lesions.loc[version.gate_positions[::2], "offset"] += size
    joined = replace(version, images_path=JoinedFiles(images, size, shutil.copy(images, tmp_path)), lesions=lesions)
    both = scored(bundle, joined, tmp_path / "joined")
    assert len(calls) == 2 and all((both[name] == alone[name]).all() for name in alone)
