"""Each data test sees the trap it was made for, and a clean data set passes them all."""

import cv2
import h5py
import numpy as np
import pandas as pd
import pytest

from data_pipelines.data_checks import CheckLimits, run_checks, telling_columns
from data_pipelines.dataset_version import SplitSettings, prepare_version
from data_pipelines.image_dataset import open_dataset
from data_pipelines.synthetic_lesions import LesionAppearance, encode_jpeg, render_lesion
from modeling.schema import TaskSpec

NUM_PATIENTS, PER_PATIENT = 60, 4
TASK = TaskSpec(
    name="checked",
    fold_group="patient_id",
    context_group="patient_id",
    label_column="target",
    label_values=["0", "1"],
    classes=["benign", "malignant"],
    malignant=["malignant"],
    columns={"age": {"minimum": 0, "maximum": 120}, "size_mm": {"minimum": 0}, "site": {"kind": "categorical"}},
)


@pytest.fixture(scope="module")
def tiles():
    found = []
    for seed in range(NUM_PATIENTS * PER_PATIENT):
        rng = np.random.default_rng(seed)
        looks = LesionAppearance(diameter_mm=rng.uniform(3, 9), irregularity=rng.uniform(), veil=rng.uniform())
        found.append(render_lesion(looks, rng, 61))
    return found


class Data:
    def __init__(self, folder, tiles):
        rng = np.random.default_rng(0)
        count = len(tiles)
        self.folder = folder
        self.tiles = list(tiles)
        self.table = pd.DataFrame(
            {
                "isic_id": [f"ISIC_{i:07d}" for i in range(count)],
                "patient_id": [f"IP_{i // PER_PATIENT:03d}" for i in range(count)],
                "target": (np.arange(count) % PER_PATIENT == 0).astype(int),
                "age": rng.uniform(20, 80, count).round(),
                "size_mm": rng.uniform(1, 9, count),
                "site": rng.choice(["head/neck", "torso"], count),
            }
        )

    def check(self, **settings):
        self.folder.mkdir(exist_ok=True)
        images, metadata = self.folder / "images.hdf5", self.folder / "metadata.csv"
        with h5py.File(images, "w") as file:
            for image_id, tile in zip(self.table["isic_id"], self.tiles, strict=True):
                file[image_id] = np.bytes_(encode_jpeg(tile))
        self.table.to_csv(metadata, index=False)
        split = SplitSettings(3, 0.25, 0)
        out = str(self.folder / "out")
        task = settings.pop("task", TASK)
        decode = settings.pop("decode_check", True)
        made = prepare_version(str(images), str(metadata), out, task, split, decode, lambda line: None)
        self.version = open_dataset(made["dataset"])
        header = list(self.table.columns)
        verdicts = run_checks(self.version, header, CheckLimits(**settings), lambda done, total: None)
        return {verdict.check: (verdict.verdict, verdict.detail) for verdict in verdicts}


@pytest.fixture
def data(tmp_path, tiles):
    return Data(tmp_path / "data", tiles)


def not_ok(verdicts):
    return {check for check, (verdict, _) in verdicts.items() if verdict != "ok"}


def test_a_clean_data_set_passes_everything(data):
    assert not_ok(data.check()) == set()


def test_values_out_of_range_warn_and_many_of_them_fail(data):
    data.table.loc[5, "age"] = 700
    verdict, detail = data.check()["ranges"]
    assert verdict == "warn" and "ISIC_0000005: age = 700" in detail
    data.table.loc[10:30, "age"] = 700
    assert data.check()["ranges"][0] == "fail"


def test_pictures_that_do_not_decode_are_counted_and_many_of_them_fail(data):
    for number in range(1, 13):
        image_id = f"ISIC_999{number:04d}"
        data.table = pd.concat([data.table, data.table.tail(1).assign(isic_id=image_id)], ignore_index=True)
        data.tiles.append(np.zeros((4, 4, 3), np.uint8))
        if number == 1:
            assert data.check()["images"] == ("warn", "1 undecodable; 0.41% of rows lost")
    assert data.check()["images"] == ("fail", "12 undecodable; 4.76% of rows lost")


def test_a_column_with_many_gaps_warns_and_an_empty_one_fails(data):
    data.table.loc[::3, "age"] = np.nan
    verdict, detail = data.check()["missing values"]
    assert verdict == "warn" and "age 33%" in detail
    data.table["age"] = np.nan
    assert data.check()["missing values"] == ("fail", "columns without a single value: age")


def test_a_gap_that_only_benign_lesions_have_is_a_trap(data):
    """ISIC 2024: no malignant lesion lacks its site."""
    data.table.loc[(data.table["target"] == 0) & (data.table.index % 2 == 0), "site"] = np.nan
    verdicts = data.check()
    assert verdicts["missing by label"][0] == "warn"
    assert "site (0.0% of malignant, 33.3% of benign)" in verdicts["missing by label"][1]


def test_a_known_leak_in_the_file_is_named_and_kept_out(data):
    data.table["iddx_full"] = "Benign"
    assert data.check()["leak columns"] == ("ok", "present and kept out of the features: iddx_full")


@pytest.mark.parametrize("kind", ["numeric", "categorical"])
def test_a_column_that_gives_the_label_away_fails(data, kind):
    target = data.table["target"]
    noise = np.random.default_rng(1).normal(0, 0.05, len(target))
    telling = {"numeric": 3 - target + noise, "categorical": target.map({0: "x", 1: "y"})}
    data.table["code"] = telling[kind]
    spec = TASK.columns["age" if kind == "numeric" else "site"]
    task = TASK.model_copy(update={"columns": {**TASK.columns, "code": spec}})
    verdict, detail = data.check(task=task)["unknown leaks"]
    assert verdict == "fail" and "code (AUC 1.000)" in detail
    assert "age" not in detail


TARGET = np.tile([1, 0, 0, 0], 60)


@pytest.mark.parametrize(
    ("copy", "lowest"),
    [
        (TARGET, 1.0),
        (-1000.0 * TARGET, 1.0),
        (np.array(["m", "b"])[1 - TARGET], 1.0),
        # Noisy copies: a tenth of the labels flipped, a wide spread added, half of the values lost.
        (np.where(np.arange(240) % 13 == 0, 1 - TARGET, TARGET), 0.9),
        (TARGET + np.random.default_rng(2).normal(0, 0.4, 240), 0.93),
        (np.where(np.arange(240) % 5 == 0, np.nan, TARGET), 1.0),
        # A diagnosis code: malignant ones lie between benign ones, so that its order tells little.
        (np.where(TARGET == 1, 3, np.arange(240) % 2 * 5), 1.0),
    ],
    ids=["copy", "scaled", "category", "flipped", "noisy", "gaps", "code"],
)
def test_a_renamed_copy_of_the_label_is_flagged_by_its_auc_alone(copy, lowest):
    columns = {"renamed": copy, "age": np.random.default_rng(3).integers(20, 80, 240)}
    found = telling_columns(pd.DataFrame(columns), columns, TARGET == 1, 0.9)
    assert list(found) == ["renamed"] and lowest <= found["renamed"] <= 1.0


def test_a_column_that_nearly_gives_the_label_away_warns(data):
    data.table["code"] = data.table["target"] + np.random.default_rng(2).normal(0, 0.4, len(data.table))
    task = TASK.model_copy(update={"columns": {**TASK.columns, "code": TASK.columns["size_mm"]}})
    data.table["code"] = data.table["code"].clip(lower=0)
    verdict, detail = data.check(task=task, decode_check=False)["unknown leaks"]
    assert verdict == "warn" and "is it known before the diagnosis? code (AUC 0.9" in detail


def test_too_few_malignant_rows_leave_leaks_unchecked_and_say_so(data):
    data.table["target"] = (data.table.index % 20 == 0).astype(int)
    verdict, detail = data.check(decode_check=False)["unknown leaks"]
    assert (verdict, detail) == ("warn", "not checked: 12 malignant and 228 benign rows; expected 20 of each")


def test_a_constant_column_warns(data):
    data.table["age"], data.table["site"] = 50.0, "torso"
    data.table.loc[3, "site"] = np.nan
    verdicts = data.check(decode_check=False)
    assert verdicts["constant columns"] == ("warn", "the same value in every row: age, site")


def test_a_rare_category_is_not_a_leak_by_chance(data):
    data.table["site"] = [f"site {i}" for i in range(len(data.table))]
    assert data.check()["unknown leaks"][0] == "ok"


def test_few_malignant_lesions_in_a_split_warn_and_none_fail(data):
    verdict, detail = data.check(min_malignant=1000)["label balance"]
    assert verdict == "warn" and "60 of 240 rows malignant (25.00%)" in detail
    gate = data.version.lesions.loc[data.version.lesions["fold"] == -1, "group"].unique()
    data.table.loc[data.table["patient_id"].isin(gate), "target"] = 0
    assert data.check()["label balance"][0] == "fail"


def test_the_same_picture_in_two_splits_fails_with_both_ids(data):
    data.check()
    folds = data.version.lesions.set_index("id")["fold"]
    first = folds.index[folds == 0][0]
    second, third = folds.index[folds == 1][0], folds.index[folds == 0][1]
    number = {image_id: row for row, image_id in enumerate(data.table["isic_id"])}
    copy = cv2.resize(cv2.convertScaleAbs(data.tiles[number[first]], alpha=0.95), (80, 80))
    data.tiles[number[second]] = copy
    # Within a fold a copy is no leak.
    data.tiles[number[third]] = copy
    verdict, detail = data.check()["near-duplicates across splits"]
    assert verdict == "fail" and second in detail and (first in detail or third in detail)
    assert "2 pairs show the same" in detail


def test_without_hashes_the_search_for_duplicates_says_that_it_did_not_run(data):
    verdicts = data.check(decode_check=False)
    assert verdicts["near-duplicates across splits"] == ("warn", "not checked: prepared with decode_check = false")
