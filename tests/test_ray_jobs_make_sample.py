"""The job writes what it says, its flags reach the generator, and mistakes are one line."""

import json
import sys

import pandas as pd
import pytest

from data_pipelines.image_dataset import open_dataset
from data_pipelines.synthetic_dataset import SHIFTS
from ray_jobs import prepare_dataset
from ray_jobs.job import REPO_ROOT, parse_config, run_job
from ray_jobs.make_sample import MakeSampleConfig, run


def make(monkeypatch, capsys, *flags: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["make_sample", *flags])
    run_job("make_sample", MakeSampleConfig, run)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_out_patients_and_seed_are_what_the_files_hold(tmp_path, monkeypatch, capsys):
    flags = ["--num-patients", "5", "--lesions-per-patient", "3", "--prevalence", "0.2"]
    first = make(monkeypatch, capsys, "--out", str(tmp_path / "a"), *flags, "--seed", "1", "--num-test-patients", "2")
    other = make(monkeypatch, capsys, "--out", str(tmp_path / "b"), *flags, "--seed", "2")
    table = pd.read_csv(first["metadata"])
    assert first["synthetic"] is True and first["num_rows"] == len(table)
    assert table["patient_id"].nunique() == 5 and first["num_malignant"] == table["target"].sum()
    assert not set(table["patient_id"]) & set(pd.read_csv(other["metadata"])["patient_id"])
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "SYNTHETIC.txt", "test-image.hdf5", "test-metadata.csv", "train-image.hdf5", "train-metadata.csv",
    ]  # fmt: skip
    assert len(list((tmp_path / "b").iterdir())) == 3


def test_a_shift_is_a_name_or_its_fields():
    file = REPO_ROOT / "configs/make_sample.yaml"
    assert parse_config(MakeSampleConfig, [], file).shift == SHIFTS["none"]
    assert parse_config(MakeSampleConfig, ["--shift", "camera"], file).shift == SHIFTS["camera"]
    own = parse_config(
        MakeSampleConfig, ["--shift.blur", "2", "--shift.age-years", "-10", "--shift.red", "0.9"], file
    ).shift
    assert (own.blur, own.age_years, own.red, own.green) == (2.0, -10.0, 0.9, 1.0)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--shift", "night"], "shift = 'night': expected one of ['none', 'camera']"),
        (["--shift.blur", "-1"], "shift.blur = -1:"),
        (["--shift.hue", "1"], "unknown config key 'shift.hue'"),
        (["--num-patients", "0"], "num_patients = 0"),
        (["--prevalence", "1.5"], "prevalence = 1.5"),
        (["--patients", "5"], "unknown config key 'patients'"),
    ],
)
def test_mistakes_are_one_line(flags, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_sample", *flags])
    with pytest.raises(SystemExit) as exit_:
        run_job("make_sample", MakeSampleConfig, run)
    lines = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2 and len(lines) == 1 and says in lines[0]


def test_the_demo_s_sample_becomes_its_data_set_with_every_class_in_every_fold(tmp_path):
    """Same patients, labels and folds as in the demo, with fewer lesions for speed."""
    sample = parse_config(MakeSampleConfig, [], REPO_ROOT / "configs/demo/make_sample.yaml")
    small = {"out": str(tmp_path / "sample"), "num_patients": 40, "lesions_per_patient": 6.0, "prevalence": 0.2}
    result = run(sample.model_copy(update=small))
    flags = ["--images", result["images"], "--metadata", result["metadata"], "--out", str(tmp_path / "data")]
    config = parse_config(prepare_dataset.PrepareDatasetConfig, flags, REPO_ROOT / "configs/demo/prepare_dataset.yaml")
    assert prepare_dataset.run(config)["num_quarantined"] == 0
    lesions = open_dataset(tmp_path / "data").lesions
    assert (lesions.groupby("fold")["label"].nunique() == 2).all()
