"""A table's pictures that should not be trusted keep their score and are listed beside it, also after a restart."""

from __future__ import annotations

import csv
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from data_pipelines import table_scoring
from data_pipelines.batch_scoring import QUALITY_COLUMNS, ScoredImages
from modeling.bundle import load_bundle, write_manifest
from modeling.metadata_fusion import BoosterConfig, FusionConfig, fit_context_model
from modeling.preprocessing import UndecodableImageError, decode_image, image_quality, resize
from modeling.schema import TaskSpec
from ray_jobs import score_dataset
from tests.bundle_factory import blank_image, lesion_image, lesion_rule
from tests.tiny_bundle import SIZE, expected_outputs, tiny_bundle, tiny_task

PICTURES = {
    "ISIC_0": lesion_image(0),
    "ISIC_1": blank_image(),
    "ISIC_2": b"no picture",
    "ISIC_3": lesion_image(3),
    "ISIC_4": blank_image(255),
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with pictures, metadata and a bundle; the network runs in process instead of in Ray Data's actors."""
    with h5py.File(tmp_path / "images.hdf5", "w") as file:
        for name, data in PICTURES.items():
            file[name] = np.void(data)
    table = pd.DataFrame({"isic_id": list(PICTURES), "age_approx": 50, "sex": "male"})
    table.to_csv(tmp_path / "metadata.csv", index=False)

    def stream_scores(images, rows, onnx_path, input_size, options):
        # As in the file's order, two by two; a broken picture is a black row without figures.
        for start in range(0, len(rows), 2):
            part, errors = np.arange(start, min(start + 2, len(rows))), {}
            pixels = np.zeros((len(part), SIZE, SIZE, 3), np.uint8)
            quality = {name: np.full(len(part), np.nan) for name in QUALITY_COLUMNS}
            for position, row in enumerate(part):
                try:
                    image = decode_image(PICTURES[rows.ids[row]])
                except UndecodableImageError as error:
                    errors[position] = str(error)
                    continue
                pixels[position] = resize(image, SIZE)
                for name, value in image_quality(image).items():
                    quality[name][position] = value
            logits, embedding = expected_outputs(pixels)
            log_probabilities = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            log_probabilities[list(errors)] = np.nan
            distance = None if options.distance is None else options.distance(embedding)
            if distance is not None:
                distance[list(errors)] = np.nan
            yield ScoredImages(part, log_probabilities, None, quality if options.with_quality else {}, errors, distance)

    monkeypatch.setattr(table_scoring, "stream_scores", stream_scores)
    monkeypatch.setattr(score_dataset, "connect_ray", lambda: None)
    return tmp_path


def score(files, bundle, **fields):
    return score_dataset.run(
        score_dataset.ScoreDatasetConfig(
            images=str(files / "images.hdf5"),
            metadata=str(files / "metadata.csv"),
            **{"out": str(files / "scores.csv")} | fields,
            model=str(bundle.directory),
        )
    )


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def test_refused_pictures_keep_a_number_and_are_listed_with_reasons(files):
    bundle = tiny_bundle(files / "bundle", abstention=lesion_rule())
    line = score(files, bundle)
    assert (line["rows"], line["quarantined"], line["abstained"]) == (4, 1, 2)
    table = pd.read_csv(files / "scores.csv")
    assert table["isic_id"].tolist() == ["ISIC_0", "ISIC_1", "ISIC_3", "ISIC_4"]
    assert list(table.columns) == ["isic_id", "target"] and table["target"].between(0, 1).all()
    listed = rows_of(files / "scores.abstained.csv")
    # The undecodable one has no figures at all: it is quarantined, not abstained from.
    assert set(listed) == {"ISIC_1", "ISIC_4"} and set(rows_of(files / "scores.quarantine.csv")) == {"ISIC_2"}
    assert {"too_dark", "low_contrast"} <= set(listed["ISIC_1"]["reasons"].split())
    assert "too_bright" in listed["ISIC_4"]["reasons"].split()
    assert "brightness 0, expected at least" in listed["ISIC_1"]["detail"]


def test_a_model_without_a_rule_abstains_from_nothing_and_an_old_list_goes(files):
    (files / "scores.abstained.csv").write_text("id,reasons,detail\nISIC_9,blurred,x\n")
    line = score(files, tiny_bundle(files / "bundle"))
    assert (line["rows"], line["abstained"]) == (4, 0)
    assert not (files / "scores.abstained.csv").exists()


def test_what_an_earlier_attempt_refused_is_still_listed(files, monkeypatch):
    bundle = tiny_bundle(files / "bundle", abstention=lesion_rule())
    whole, first = score(files, bundle), rows_of(files / "scores.abstained.csv")
    stream = table_scoring.stream_scores
    monkeypatch.setattr("data_pipelines.score_parts.PART_ROWS", 1)

    def cut_off(*arguments):
        yield next(stream(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(table_scoring, "stream_scores", cut_off)
    with pytest.raises(KeyboardInterrupt):
        score(files, bundle)
    monkeypatch.setattr(table_scoring, "stream_scores", stream)
    assert score(files, bundle) == whole
    assert rows_of(files / "scores.abstained.csv") == first


def test_no_scores_appear_before_their_lists_and_a_failed_list_costs_no_scoring(files, monkeypatch, capsys):
    bundle = tiny_bundle(files / "bundle", abstention=lesion_rule())
    old = "id,reasons,detail\nISIC_9,blurred,x\n"
    (files / "scores.abstained.csv").write_text(old)
    replace = Path.replace

    def full(path, target):
        if Path(target).name == "scores.abstained.csv":
            raise OSError("no space left")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        score(files, bundle)
    assert not (files / "scores.csv").exists() and (files / "scores.abstained.csv").read_text() == old
    monkeypatch.setattr(Path, "replace", replace)
    score(files, bundle)
    assert "5 of 5 images were scored by an earlier attempt" in capsys.readouterr().err
    assert set(rows_of(files / "scores.abstained.csv")) == {"ISIC_1", "ISIC_4"} and (files / "scores.csv").exists()
    assert not list(files.glob(".scores*"))


def test_a_list_that_another_output_of_the_stem_shares_is_not_lost_without_a_word(files, capsys):
    careful, careless = tiny_bundle(files / "careful", abstention=lesion_rule()), tiny_bundle(files / "careless")
    score(files, careful)
    score(files, careful, out=str(files / "scores.parquet"))
    assert "is shared with" not in capsys.readouterr().err
    score(files, careless, out=str(files / "scores.parquet"))
    shared = f"{files}/scores.abstained.csv is shared with scores.csv; from now on it is about scores.parquet alone"
    assert shared in capsys.readouterr().err and not (files / "scores.abstained.csv").exists()


def ugly_duckling_bundle(directory, rule):
    """A bundle whose trees read little but how malignant a picture looks beside the patient's others."""
    task = TaskSpec.model_validate(tiny_task().model_dump() | {"context_group": "patient_id"})
    bundle = tiny_bundle(directory, contexts=["image_only", "patient"], task=task.model_dump(), abstention=rule)
    rng = np.random.default_rng(0)
    patients, scores = np.repeat(np.arange(100), 3), rng.normal(2.0, 1.5, 300)
    image = np.stack([-np.logaddexp(0, scores), scores - np.logaddexp(0, scores)], axis=1)
    others = (scores.reshape(100, 3).sum(axis=1)[patients] - scores) / 2
    model, _ = fit_context_model(
        "patient",
        task,
        image,
        {"age_approx": np.full(300, 50.0), "sex": np.full(300, "male", object)},
        (scores + rng.normal(size=300) > others).astype(int),
        patients.astype(str),
        patients % 3,
        FusionConfig(boosters=(BoosterConfig(num_bags=1, feature_fraction=1.0),), num_boost_round=40),
        [0.5, 0.5],
        [0.5, 0.5],
        0,
    )
    model.save(bundle.directory / "contexts" / "patient")
    write_manifest(bundle.directory, bundle.manifest.model_dump(exclude={"files"}))
    return load_bundle(bundle.directory)


def test_a_refused_picture_moves_no_other_lesion_of_its_patient_and_keeps_its_own_number(files):
    def risks(bundle, ids):
        # Equal metadata: only the pictures tell a patient's lesions apart.
        table = pd.DataFrame({"isic_id": ids, "patient_id": "p", "age_approx": 50, "sex": "male"})
        table.to_csv(files / "metadata.csv", index=False)
        assert score(files, bundle)["context"] == "patient"
        return pd.read_csv(files / "scores.csv").set_index("isic_id")["target"]

    careful = ugly_duckling_bundle(files / "careful", lesion_rule())
    careless = ugly_duckling_bundle(files / "careless", None)
    lesions = ["ISIC_0", "ISIC_3"]
    for refused in ("ISIC_1", "ISIC_4"):
        alone, beside = risks(careful, lesions), risks(careful, [*lesions, refused])
        assert beside[lesions].tolist() == alone.tolist()
        trusting = risks(careless, [*lesions, refused])
        assert beside[refused] == trusting[refused]
    assert np.abs(trusting[lesions] - alone).max() > 0.05


def test_a_context_that_rows_lack_the_group_for_is_refused_before_a_picture_is_read(files, monkeypatch):
    bundle = ugly_duckling_bundle(files / "bundle", None)
    table = pd.DataFrame({"isic_id": list(PICTURES), "patient_id": "p", "age_approx": 50, "sex": "male"})
    table.loc[3, "patient_id"] = None
    table.to_csv(files / "metadata.csv", index=False)
    assert score(files, bundle)["context"] == "image_only"

    def kept_index(*arguments):
        raise AssertionError("pictures were looked up")

    monkeypatch.setattr(table_scoring, "kept_index", kept_index)
    with pytest.raises(ValueError, match="context = 'patient': patient_id is empty in some rows"):
        score(files, bundle, context="patient")


def test_scores_of_a_remote_file_that_was_replaced_are_not_taken_for_the_new_ones(tmp_path):
    class Site(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *arguments):
            """Nothing to the test's output."""

    path = tmp_path / "images.hdf5"
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/images.hdf5"
        folders = []
        for content, changed in ((b"first", 1000), (b"first", 1000), (b"other", 2000)):
            path.write_bytes(content)
            os.utime(path, (changed, changed))
            folders.append(score_dataset.parts_folder(tmp_path / "out.csv", "d" * 64, url, str(tmp_path / "none.csv")))
        server.shutdown()
    assert folders[0] == folders[1] != folders[2]
