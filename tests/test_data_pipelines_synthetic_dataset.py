"""The synthetic data set: the official format, the traps, the shifts, and a signal where it is meant to be."""

import csv
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from data_pipelines.dataset_version import SYNTHETIC_ATTRIBUTION
from data_pipelines.metadata_table import read_metadata
from data_pipelines.synthetic_dataset import SHIFTS, Shift, write_sample
from data_pipelines.synthetic_metadata import TEST_COLUMNS, TRAIN_COLUMNS, build_metadata
from data_pipelines.synthetic_patients import draw_latents
from modeling.preprocessing import decode_image, image_quality
from modeling.schema import LEAK_COLUMNS
from ray_jobs.job import REPO_ROOT, parse_config
from ray_jobs.prepare_dataset import PrepareDatasetConfig

REAL_RANGES = {
    "age_approx": (5, 85),
    "clin_size_long_diam_mm": (1.0, 28.4),
    "tbp_lv_A": (-2.5, 48.2),
    "tbp_lv_Bext": (9.2, 48.4),
    "tbp_lv_Lext": (17.7, 98.6),
    "tbp_lv_deltaL": (-38.8, -1.0),
    "tbp_lv_areaMM2": (0.43, 334.2),
    "tbp_lv_eccentricity": (0.02, 0.98),
    "tbp_lv_nevi_confidence": (0, 100),
    "tbp_lv_norm_border": (0.58, 10),
    "tbp_lv_norm_color": (0, 10),
    "tbp_lv_symm_2axis": (0.05, 0.98),
    "tbp_lv_symm_2axis_angle": (0, 175),
}


def sample(folder: Path, seed: int = 0, shift: Shift = SHIFTS["none"], patients: int = 14, tested: int = 0):
    return write_sample(folder, patients, 6.0, 0.15, seed, shift, lambda line: None, tested)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    return folder, sample(folder, tested=3)


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


def test_the_test_files_hold_other_patients_and_no_label(plain):
    folder, table = plain
    test = pd.read_csv(folder / "test-metadata.csv")
    assert test["patient_id"].nunique() == 3 and not set(test["patient_id"]) & set(table["patient_id"])
    with h5py.File(folder / "test-image.hdf5") as images:
        assert set(images) == set(test["isic_id"])


def test_it_says_synthetic_wherever_it_may_be_read(plain):
    folder, table = plain
    assert (table["attribution"] == SYNTHETIC_ATTRIBUTION).all()
    assert "Synthetic" in (folder / "SYNTHETIC.txt").read_text()


def metadata(patients: int = 800) -> pd.DataFrame:
    """The table alone: enough rows for shares, without painting them."""
    rng = np.random.default_rng(4)
    return build_metadata(draw_latents(patients, 6.0, 0.15, rng), rng, "0004")


def test_the_official_traps_are_there():
    table = metadata()
    malignant = table["target"] == 1
    assert table.loc[malignant, "lesion_id"].notna().all() and table.loc[~malignant, "lesion_id"].isna().mean() > 0.9
    missing_site = table["anatom_site_general"].isna()
    assert missing_site.any() and not (missing_site & malignant).any()
    assert (table.loc[missing_site, "tbp_lv_location"] == "Unknown").all()
    assert (table["sex"].isna().groupby(table["patient_id"]).nunique() == 1).all()
    assert (table["iddx_full"].str.startswith("Malignant") == malignant).all()
    assert table.loc[table["iddx_3"] == "Melanoma Invasive", "mel_thick_mm"].notna().all()
    # Site-dependent prevalence and rare positives, but some.
    rate = malignant.groupby(table["anatom_site_general"]).mean()
    assert rate["head/neck"] == rate.max() and 0.1 < malignant.mean() < 0.2


def test_every_measured_value_lies_within_the_real_table_s_range(tmp_path):
    """Full-table minima and maxima of ISIC 2024; a generator that leaves them would be caught by validation."""
    table = metadata()
    table.to_csv(tmp_path / "train-metadata.csv", index=False)
    task = parse_config(PrepareDatasetConfig, [], REPO_ROOT / "configs/prepare_dataset.yaml").task
    usable, quarantine = read_metadata(tmp_path / "train-metadata.csv", task, require_labels=True)
    assert quarantine == [] and len(usable) == len(table)
    for name, (low, high) in REAL_RANGES.items():
        assert table[name].dropna().between(low, high).all(), name


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_patients(tmp_path, plain):
    folder, table = plain
    again = sample(tmp_path / "again", tested=3)
    other = sample(tmp_path / "other", seed=1)
    assert (folder / "train-metadata.csv").read_bytes() == (tmp_path / "again/train-metadata.csv").read_bytes()
    with h5py.File(folder / "train-image.hdf5") as first, h5py.File(tmp_path / "again/train-image.hdf5") as second:
        assert all(first[key][()] == second[key][()] for key in again["isic_id"])
    assert not set(table["patient_id"]) & set(other["patient_id"])
    assert not set(table["isic_id"]) & set(other["isic_id"])


def test_patients_of_far_apart_seeds_have_different_ids(tmp_path):
    """Ids start with the whole seed and have fixed digits after it, so 1, 10001 and 100010 cannot meet."""
    ids = [set(sample(tmp_path / str(seed), seed=seed, patients=4)["patient_id"]) for seed in (1, 10, 10_001, 100_010)]
    assert len(set.union(*ids)) == 16


def test_real_pictures_are_never_overwritten(tmp_path):
    (tmp_path / "train-image.hdf5").write_bytes(b"a real collection")
    with pytest.raises(ValueError, match="not a synthetic sample"):
        sample(tmp_path)
    assert (tmp_path / "train-image.hdf5").read_bytes() == b"a real collection"


def test_a_sample_can_be_written_again_over_itself(tmp_path):
    sample(tmp_path, seed=1, patients=4)
    table = sample(tmp_path, seed=2, patients=4)
    with h5py.File(tmp_path / "train-image.hdf5") as images:
        assert set(images) == set(table["isic_id"])


def test_the_camera_shift_blurs_tints_and_ages(tmp_path, plain):
    folder, table = plain
    shifted = sample(tmp_path, shift=SHIFTS["camera"])

    def quality(place):
        with h5py.File(place / "train-image.hdf5") as images:
            figures = [image_quality(decode_image(images[key][()])) for key in list(images)[:40]]
        return {name: np.median([row[name] for row in figures]) for name in figures[0]}

    before, after = quality(folder), quality(tmp_path)
    assert after["blur"] < before["blur"] - 0.4
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
