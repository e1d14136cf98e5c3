"""The synthetic data set: the official format, the traps, the shifts, and a signal where it is meant to be."""

import csv
from pathlib import Path

import h5py
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from data_pipelines.dataset_version import SYNTHETIC_ATTRIBUTION
from data_pipelines.synthetic_dataset import SHIFTS, TEST_COLUMNS, TRAIN_COLUMNS, Shift, draw_latents, write_sample
from modeling.preprocessing import decode_image, image_quality
from modeling.schema import LEAK_COLUMNS


def sample(folder: Path, seed: int = 0, shift: Shift = SHIFTS["none"], patients: int = 14):
    return write_sample(folder, patients, 6.0, 0.15, seed, shift, lambda line: None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    return folder, sample(folder)


def test_columns_are_the_official_ones_in_order(plain):
    folder, _ = plain
    with open(folder / "train-metadata.csv", encoding="utf-8") as file:
        train = next(csv.reader(file))
    with open(folder / "test-metadata.csv", encoding="utf-8") as file:
        test = next(csv.reader(file))
    assert train == list(TRAIN_COLUMNS) and len(train) == 55
    assert test == list(TEST_COLUMNS) and len(test) == 44
    # The official files: the test columns with target second, then ten that exist in training only.
    assert train[:2] == ["isic_id", "target"] and train[2:45] == test[1:] and len(train[45:]) == 10
    assert set(train[45:]) <= LEAK_COLUMNS


def test_every_row_has_its_picture_of_an_official_size(plain):
    folder, table = plain
    with h5py.File(folder / "train-image.hdf5") as images:
        assert sorted(images) == sorted(table["isic_id"])
        for image_id in list(images)[:10]:
            height, width, _ = decode_image(images[image_id][()]).shape
            assert height == width and 61 <= height <= 239


def test_it_says_synthetic_wherever_it_may_be_read(plain):
    folder, table = plain
    assert (table["attribution"] == SYNTHETIC_ATTRIBUTION).all()
    assert "Synthetic" in (folder / "SYNTHETIC.txt").read_text()


def test_the_official_traps_are_there(tmp_path):
    table = sample(tmp_path, patients=150)
    malignant = table["target"] == 1
    assert table.loc[malignant, "lesion_id"].notna().all() and table.loc[~malignant, "lesion_id"].isna().mean() > 0.9
    missing_site = table["anatom_site_general"].isna()
    assert missing_site.any() and not (missing_site & malignant).any()
    assert (table["sex"].isna().groupby(table["patient_id"]).nunique() == 1).all()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_patients(tmp_path, plain):
    folder, table = plain
    again = sample(tmp_path / "again")
    other = sample(tmp_path / "other", seed=1)
    assert (folder / "train-metadata.csv").read_bytes() == (tmp_path / "again/train-metadata.csv").read_bytes()
    with h5py.File(folder / "train-image.hdf5") as first, h5py.File(tmp_path / "again/train-image.hdf5") as second:
        assert all(first[key][()] == second[key][()] for key in again["isic_id"])
    assert not set(table["patient_id"]) & set(other["patient_id"])
    assert not set(table["isic_id"]) & set(other["isic_id"])


def test_the_camera_shift_blurs_tints_and_ages(tmp_path, plain):
    folder, table = plain
    shifted = sample(tmp_path, shift=SHIFTS["camera"])

    def quality(place):
        with h5py.File(place / "train-image.hdf5") as images:
            figures = [image_quality(decode_image(images[key][()])) for key in list(images)[:40]]
        return {name: np.median([row[name] for row in figures]) for name in figures[0]}

    before, after = quality(folder), quality(tmp_path)
    assert after["blur"] < before["blur"] - 0.1  # sensor grain, painted after the blur, keeps some variance
    assert after["blue"] / after["red"] > 1.15 * before["blue"] / before["red"]
    assert shifted["age_approx"].mean() > table["age_approx"].mean() + 8


def test_picture_and_metadata_each_hold_what_the_other_lacks_and_the_patient_hides_part_of_both():
    """Logistic regression on what each side sees; every step must add something."""
    latents = draw_latents(1500, 8.0, 0.06, np.random.default_rng(0))
    shared = np.stack([latents.size, latents.border, latents.colour], axis=1)
    seen = shared + latents.offset[:, None]
    picture, columns = np.c_[seen, latents.veil], np.c_[seen, latents.history]
    half = latents.patient % 2 == 0

    def auc(features):
        model = LogisticRegression().fit(features[half], latents.target[half])
        return roc_auc_score(latents.target[~half], model.decision_function(features[~half]))

    fused = auc(np.c_[picture, latents.history])
    relative = auc(np.c_[shared, latents.veil, latents.history])
    assert auc(columns) + 0.01 < auc(picture) < fused - 0.03
    assert relative > fused + 0.01
    assert 0.04 < latents.target.mean() < 0.08
