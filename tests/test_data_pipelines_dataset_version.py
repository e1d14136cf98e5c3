"""A version is complete, named by its content, and loses nothing silently."""

import json

import h5py
import numpy as np
import pandas as pd
import pytest

from data_pipelines.dataset_version import SYNTHETIC_ATTRIBUTION, SplitSettings, prepare_version
from data_pipelines.image_dataset import open_dataset
from data_pipelines.synthetic_lesions import LesionAppearance, encode_jpeg, render_lesion
from modeling.schema import TaskSpec

TASK = TaskSpec(
    name="tiny",
    fold_group="patient_id",
    context_group="patient_id",
    label_column="target",
    label_values=["0", "1"],
    classes=["benign", "malignant"],
    malignant=["malignant"],
    columns={"age": {"minimum": 0, "maximum": 120}, "site": {"kind": "categorical"}},
    institution_column="attribution",
)
NUM_PATIENTS = 24


@pytest.fixture(scope="module")
def jpegs():
    rng = np.random.default_rng(0)
    return [encode_jpeg(render_lesion(LesionAppearance(), rng, 61)) for _ in range(8)]


class Source:
    """An HDF5 file and a CSV of three lesions for each of 24 patients, one of them malignant, that tests then break."""

    def __init__(self, folder, jpegs):
        self.folder, self.images = folder, folder / "images.hdf5"
        self.metadata = folder / "metadata.csv"
        ids = [f"ISIC_{i:07d}" for i in range(3 * NUM_PATIENTS)]
        self.table = pd.DataFrame(
            {
                "isic_id": ids,
                "patient_id": [f"IP_{i // 3:07d}" for i in range(len(ids))],
                "target": [int(i % 3 == 0) for i in range(len(ids))],
                "age": [20.0 + i for i in range(len(ids))],
                "site": "head/neck",
                "attribution": "a clinic",
            }
        )
        self.pictures = {image_id: jpegs[i % len(jpegs)] for i, image_id in enumerate(ids)}

    def prepare(self, task=TASK, out="out", lines=None, **changes) -> dict:
        self.folder.mkdir(exist_ok=True)
        self.table.to_csv(self.metadata, index=False)
        with h5py.File(self.images, "w") as file:
            for image_id, data in self.pictures.items():
                file.create_dataset(image_id, data=np.bytes_(data))
        settings = {"num_folds": 3, "gate_fraction": 0.2, "seed": 0} | changes
        decode_check = settings.pop("decode_check", True)
        say = (lambda line: None) if lines is None else lines.append
        return prepare_version(
            str(self.images),
            str(self.metadata),
            str(self.folder / out),
            task,
            SplitSettings(**settings),
            decode_check,
            say,
        )

    def quarantine(self, result) -> dict[str, str]:
        table = pd.read_csv(f"{result['dataset']}/quarantine.csv", keep_default_na=False)
        return dict(zip(table["id"], table["reason"], strict=True))


@pytest.fixture
def source(tmp_path, jpegs):
    return Source(tmp_path / "source", jpegs)


def test_a_version_opens_and_its_byte_ranges_are_the_pictures(source):
    result = source.prepare()
    version = open_dataset(source.folder / "out")
    assert version.digest == result["digest"] and result["num_rows"] == len(source.table) == len(version.lesions)
    assert result["class_counts"] == {"benign": 48, "malignant": 24} and not version.task.synthetic
    assert version.lesions["id"].is_monotonic_increasing
    own = ["id", "group", "context", "label", "fold", "offset", "size", "perceptual_hash"]
    assert list(version.lesions.columns) == [*own, "age", "site", "attribution"]
    content = source.images.read_bytes()
    for row in version.lesions.itertuples():
        assert content[row.offset : row.offset + row.size] == source.pictures[row.id]
    assert (version.lesions.groupby("group")["fold"].nunique() == 1).all()
    assert set(version.lesions["fold"]) == {-1, 0, 1, 2}


def test_every_row_is_either_usable_or_in_the_quarantine_with_its_reason(source, jpegs):
    ids = source.table["isic_id"].tolist()
    source.pictures[ids[1]] = jpegs[0][: len(jpegs[0]) // 2]
    source.pictures[ids[2]] = b"GIF89a, or so it says"
    source.pictures[ids[4]] = b"\xff\xd8\xff\xd9"
    del source.pictures[ids[5]]
    source.pictures["ISIC_9999999"] = jpegs[0]
    source.table.loc[7, "age"] = 400.0
    result = source.prepare()
    expected = {
        ids[1]: "undecodable",
        ids[2]: "undecodable",
        ids[4]: "undecodable",
        ids[5]: "image_missing",
        "ISIC_9999999": "metadata_missing",
        ids[7]: "out_of_range",
    }
    assert source.quarantine(result) == expected
    kept = set(open_dataset(result["dataset"]).lesions["id"])
    assert kept == set(ids) - set(expected)
    assert result["num_quarantined"] == 6
    report = json.loads(open(f"{result['dataset']}/report.json").read())
    assert report["quarantined"]["undecodable"] == 3
    assert sum(part["rows"] for part in report["splits"].values()) == len(kept)


def test_without_the_decode_check_only_the_index_is_read(source):
    source.pictures["ISIC_0000001"] = b"not a picture"
    assert source.prepare(decode_check=False)["num_quarantined"] == 0


def test_the_same_input_is_the_same_version_and_is_not_written_again(source):
    first = source.prepare()
    lines = []
    written = (source.folder / "out" / first["digest"][:12] / "lesions.parquet").stat().st_mtime_ns
    assert source.prepare(lines=lines) == first
    assert (source.folder / "out" / first["digest"][:12] / "lesions.parquet").stat().st_mtime_ns == written
    assert any("nothing to do" in line for line in lines)


def test_one_changed_byte_label_or_setting_is_another_version(source, jpegs):
    digests = [source.prepare()["digest"], source.prepare(seed=1)["digest"], source.prepare(num_folds=4)["digest"]]
    digests.append(source.prepare(task=TASK.model_copy(update={"malignant": ["benign"]}))["digest"])
    changed = bytearray(source.pictures["ISIC_0000003"])
    changed[-20] ^= 1
    source.pictures["ISIC_0000003"] = bytes(changed)
    digests.append(source.prepare()["digest"])
    source.table.loc[4, "target"] = 1
    last = source.prepare()
    digests.append(last["digest"])
    assert len(set(digests)) == 6
    assert len(list((source.folder / "out").glob("*/dataset.json"))) == 6
    assert open_dataset(source.folder / "out").digest == last["digest"]


def test_the_same_data_at_another_place_reuses_the_version_and_points_to_the_new_place(source, tmp_path):
    first = source.prepare()
    source.folder = source.folder.rename(tmp_path / "moved")
    source.images, source.metadata = source.folder / "images.hdf5", source.folder / "metadata.csv"
    with pytest.raises(ValueError, match="does not exist any more"):
        open_dataset(source.folder / "out")
    assert source.prepare()["digest"] == first["digest"]
    assert open_dataset(source.folder / "out").images_path == str(source.images)


def test_data_that_says_it_is_synthetic_cannot_become_a_real_data_set(source):
    source.table.loc[3, "attribution"] = SYNTHETIC_ATTRIBUTION
    assert source.prepare()["synthetic"]
    assert open_dataset(source.folder / "out").task.synthetic


def test_a_version_cut_off_half_written_is_written_again(source):
    result = source.prepare()
    folder = source.folder / "out" / result["digest"][:12]
    (folder / "dataset.json").unlink()
    (folder / "lesions.parquet").write_bytes(b"half")
    assert source.prepare() == result
    assert len(open_dataset(folder).lesions) == len(source.table)
    assert not list((source.folder / "out").glob(".*"))


def test_a_class_with_fewer_groups_than_folds_is_named(source):
    source.table["target"] = [int(i in (0, 1, 2)) for i in range(len(source.table))]
    with pytest.raises(ValueError, match="class 'malignant' has [01] groups outside the gate split"):
        source.prepare()
    # No version; what was checked is kept for an attempt with other folds.
    assert not list((source.folder / "out").glob("[!.]*"))


def test_a_gate_split_without_a_class_is_said_aloud(source):
    source.table.loc[source.table["patient_id"].isin(gate_patients(source)), "target"] = 0
    lines = []
    source.prepare(lines=lines)
    assert any("holds no row of class ['malignant']" in line for line in lines)


def gate_patients(source) -> set[str]:
    lesions = open_dataset(source.prepare(out="before")["dataset"]).lesions
    return set(lesions.loc[lesions["fold"] == -1, "group"])


def test_files_that_do_not_belong_together_are_one_clear_line(source, jpegs):
    source.pictures = {f"other_{i}": jpegs[0] for i in range(5)}
    with pytest.raises(ValueError, match="none of the 72 ids .* 'ISIC_0000000'"):
        source.prepare()


def test_a_table_without_a_usable_row_says_why(source):
    source.table["target"] = 7
    with pytest.raises(ValueError, match="no usable row; quarantined: label_unknown 72"):
        source.prepare()


def test_pictures_that_all_fail_say_why(source):
    source.pictures = dict.fromkeys(source.pictures, b"not a picture")
    with pytest.raises(ValueError, match="no usable row is left .* undecodable 72"):
        source.prepare()


def test_leaving_institutions_out_makes_each_a_fold_and_the_report_shows_them(source):
    source.table["attribution"] = [["Wien", "Basel", "Sydney"][i // 3 % 3] for i in range(len(source.table))]
    lines = []
    result = source.prepare(fold_by="attribution", lines=lines)
    version = open_dataset(result["dataset"])
    assert result["num_folds"] == 3 and version.num_folds == 3
    report = json.loads(open(f"{result['dataset']}/report.json").read())
    assert list(report["splits"]) == ["gate", "Basel", "Sydney", "Wien"]
    for fold, name in enumerate(["Basel", "Sydney", "Wien"]):
        part, rows = report["splits"][name], version.lesions[version.lesions["fold"] == fold]
        assert part["institutions"] == {name: len(rows)} and part["malignant"] == rows["label"].sum()
        assert part["patients"] == rows["context"].nunique() == part["groups"]
        assert any(line.startswith(f"{name}: {len(rows)} rows, {part['malignant']} malignant") for line in lines)
    assert result["digest"] != source.prepare()["digest"]


def test_a_patient_of_two_institutions_cannot_be_left_out_of_both(source):
    source.table["attribution"] = [["Wien", "Basel"][i % 2] for i in range(len(source.table))]
    with pytest.raises(ValueError, match=r"groups span two folds, e\.g\. 'IP_\d+' lies in 'Basel' and 'Wien'"):
        source.prepare(fold_by="attribution")
    with pytest.raises(ValueError, match="fold_by = 'clinic': expected a column that the task names"):
        source.prepare(fold_by="clinic")


def test_folds_by_lesion_that_part_a_patient_are_refused_where_patients_are_compared(source):
    """Held out lesions would reach training as what the patient's other lesions are compared with."""
    source.table["lesion_id"] = source.table["isic_id"]
    by_lesion = TASK.model_copy(update={"fold_group": "lesion_id"})
    with pytest.raises(ValueError, match=r"context_group = 'patient_id': \d+ groups span two folds, e\.g\. 'IP_\d+'"):
        source.prepare(by_lesion)
    without = by_lesion.model_copy(update={"context_group": None})
    assert source.prepare(without)["num_rows"] == len(source.table)


@pytest.mark.parametrize("layout", ["chunked", "variable length"])
def test_layouts_without_byte_ranges_make_the_same_version_table(source, layout):
    plain = open_dataset(source.prepare(out="plain")["dataset"]).lesions
    with h5py.File(source.images, "w") as file:
        for image_id, data in source.pictures.items():
            value = np.frombuffer(data, np.uint8)
            if layout == "chunked":
                file.create_dataset(image_id, data=value, chunks=(64,), compression="gzip")
            else:
                file.create_dataset(image_id, (), h5py.vlen_dtype(np.uint8))[()] = value
    arguments = (str(source.images), str(source.metadata), str(source.folder / "other"), TASK)
    result = prepare_version(*arguments, SplitSettings(3, 0.2, 0), True, lambda line: None)
    other = open_dataset(result["dataset"]).lesions
    assert (other["offset"] == -1).all() and result["num_quarantined"] == 0
    byte_ranges = ["offset", "size"]
    assert other.drop(columns=byte_ranges).equals(plain.drop(columns=byte_ranges))


def test_a_file_cut_short_loses_only_the_pictures_that_are_gone(source):
    source.prepare()
    content = source.images.read_bytes()
    version = open_dataset(source.folder / "out")
    last = version.lesions.loc[version.lesions["offset"].idxmax()]
    source.images.write_bytes(content[: last["offset"] + 10])
    arguments = (str(source.images), str(source.metadata), str(source.folder / "cut"), TASK)
    # HDF5 refuses a file that is shorter than its own header says: nothing is lost silently.
    with pytest.raises(ValueError, match="cannot be read as HDF5.*truncated file"):
        prepare_version(*arguments, SplitSettings(3, 0.2, 0), True, lambda line: None)


def test_labels_that_are_not_there_are_quarantined(source):
    source.table["target"] = source.table["target"].astype(float)
    source.table.loc[[3, 8], "target"] = np.nan
    result = source.prepare()
    assert source.quarantine(result) == {"ISIC_0000003": "label_missing", "ISIC_0000008": "label_missing"}
    assert result["num_rows"] == len(source.table) - 2


def test_an_attempt_that_was_killed_goes_on_and_leaves_nothing_behind(source, monkeypatch):
    from data_pipelines import image_check

    monkeypatch.setattr(image_check, "PART_ROWS", 16)
    expected = source.prepare(out="unbroken")
    decoded = []
    original = image_check._decode_part

    def killed(*call):
        if len(decoded) == 2:
            raise KeyboardInterrupt
        decoded.append(call[-1])
        return original(*call)

    monkeypatch.setattr(image_check, "_decode_part", killed)
    monkeypatch.setattr(image_check.os, "sched_getaffinity", lambda pid: {0})
    with pytest.raises(KeyboardInterrupt):
        source.prepare()
    monkeypatch.setattr(image_check, "_decode_part", lambda *call: decoded.append(call[-1]) or original(*call))
    result = source.prepare()
    assert sorted(decoded) == [0, 16, 32, 48, 64]
    assert result["digest"] == expected["digest"]
    plain, resumed = (open_dataset(source.folder / out).lesions for out in ("unbroken", "out"))
    assert plain.equals(resumed)
    assert not list((source.folder / "out").glob(".preparing-*"))
