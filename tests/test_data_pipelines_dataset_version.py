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
    expected = ["id", "group", "context", "label", "fold", "offset", "size", "age", "site", "attribution"]
    assert list(version.lesions.columns) == expected
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
    assert not (source.folder / "out").exists() or not list((source.folder / "out").iterdir())


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
