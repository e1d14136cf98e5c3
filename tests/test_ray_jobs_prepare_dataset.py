"""The job as an engineer runs it: one JSON line last on success, one clear line and exit 2 on a user's mistake."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml

from data_pipelines.synthetic_dataset import SHIFTS, write_sample
from data_pipelines.synthetic_metadata import TEST_COLUMNS, build_metadata
from data_pipelines.synthetic_patients import draw_latents
from ray_jobs.job import REPO_ROOT, parse_config, read_yaml, run_job
from ray_jobs.prepare_dataset import PrepareDatasetConfig, run


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    table = write_sample(folder, 30, 4.0, 0.2, 0, SHIFTS["none"], lambda line: None)
    return folder, table


def test_the_default_config_takes_a_synthetic_sample_and_marks_it(sample, tmp_path):
    folder, table = sample
    files = ["--images", f"{folder}/train-image.hdf5", "--metadata", f"{folder}/train-metadata.csv"]
    done = subprocess.run(
        [sys.executable, "-m", "ray_jobs.prepare_dataset", *files, "--num-folds", "3"],
        cwd=REPO_ROOT,
        env=os.environ | {"DERMRAY_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["num_rows"] == len(table) and result["num_quarantined"] == 0
    assert result["class_counts"]["malignant"] == table["target"].sum()
    # The default config describes real ISIC 2024 data; the rows themselves say that they are not.
    assert result["synthetic"] is True
    assert (tmp_path / "datasets/isic2024/LATEST").read_text().strip() == result["digest"][:12]
    assert "decode check" in done.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--images", "/nowhere/x.hdf5"], "images file /nowhere/x.hdf5 does not exist"),
        (["--metadata", "/nowhere/x.csv"], "metadata file /nowhere/x.csv does not exist"),
        (["--num-folds", "1"], "num_folds = 1: Input should be greater than or equal to 2"),
        (["--fold-count", "3"], "unknown config key 'fold_count'"),
        (["--num-folds", "20"], "class 'malignant' has"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(flags, says, sample, tmp_path, monkeypatch, capsys):
    folder, _ = sample
    files = {"--images": f"{folder}/train-image.hdf5", "--metadata": f"{folder}/train-metadata.csv"}
    files |= dict(zip(flags[::2], flags[1::2], strict=True))
    monkeypatch.setenv("DERMRAY_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["prepare_dataset", *(part for pair in files.items() for part in pair)])
    with pytest.raises(SystemExit) as exit_:
        run_job("prepare_dataset", PrepareDatasetConfig, run)
    written = capsys.readouterr()
    last = written.err.strip().splitlines()[-1]
    assert exit_.value.code == 2 and written.out == ""
    assert last.startswith("prepare_dataset: error:") and says in last


def as_a_user(flags, monkeypatch, capsys):
    """Exit code and last line of stderr."""
    monkeypatch.setattr(sys, "argv", ["prepare_dataset", *flags])
    with pytest.raises(SystemExit) as exit_:
        run_job("prepare_dataset", PrepareDatasetConfig, run)
    written = capsys.readouterr()
    assert written.out == "" and "Traceback" not in written.err
    return exit_.value.code, written.err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "leak",
    ["tbp_lv_dnn_lesion_confidence", "iddx_full", "iddx_1", "mel_thick_mm", "lesion_id", "dx_type", "diagnosis"],
)
def test_a_leak_among_the_columns_is_refused_by_name(leak, sample, tmp_path, monkeypatch, capsys):
    settings = read_yaml(REPO_ROOT / "configs/prepare_dataset.yaml")
    settings["task"]["columns"][leak] = {"kind": "categorical"}
    file = tmp_path / "leak.yaml"
    file.write_text(yaml.safe_dump(settings))
    files = ["--images", "null", "--metadata", f"{sample[0]}/train-metadata.csv", "--out", str(tmp_path / "out")]
    code, line = as_a_user(["--config", str(file), *files], monkeypatch, capsys)
    assert code == 2 and not (tmp_path / "out").exists()
    assert line.startswith("prepare_dataset: error: task: columns") and f"['{leak}'] leak the label" in line


@pytest.mark.parametrize("kind", ["numeric", "categorical"])
def test_a_renamed_copy_of_the_label_fails_the_check_in_one_line(kind, tmp_path, monkeypatch, capsys):
    latents = draw_latents(60, 6.0, 0.2, np.random.default_rng(0))
    table = build_metadata(latents, np.random.default_rng(1), "0001")
    copies = {"numeric": 40 - 3.0 * latents.target, "categorical": np.array(list("ab"))[latents.target]}
    table["score_v2"] = copies[kind]
    table.to_csv(tmp_path / "train-metadata.csv", index=False)
    settings = read_yaml(REPO_ROOT / "configs/prepare_dataset.yaml") | {"images": None, "num_folds": 2}
    settings["task"]["columns"]["score_v2"] = {"kind": kind}
    file = tmp_path / "copy.yaml"
    file.write_text(yaml.safe_dump(settings))
    flags = ["--metadata", str(tmp_path / "train-metadata.csv"), "--out", str(tmp_path / "out"), "--check"]
    code, line = as_a_user(["--config", str(file), *flags], monkeypatch, capsys)
    assert code == 2 and "data tests failed" in line
    assert "one column alone gives the label: score_v2 (AUC 1.000)" in line and "nevi" not in line


def test_cancers_of_one_patient_alone_cannot_be_spread_over_folds(tmp_path, monkeypatch, capsys):
    latents = draw_latents(40, 6.0, 0.2, np.random.default_rng(0))
    table = build_metadata(latents, np.random.default_rng(1), "0001")
    table["target"] = (table["patient_id"] == "IP_000100003").astype(int)
    table.to_csv(tmp_path / "train-metadata.csv", index=False)
    flags = ["--images", "null", "--metadata", str(tmp_path / "train-metadata.csv"), "--out", str(tmp_path / "out")]
    code, line = as_a_user(["--config", str(REPO_ROOT / "configs/prepare_dataset.yaml"), *flags], monkeypatch, capsys)
    assert code == 2 and line.startswith("prepare_dataset: error: class 'malignant' has")
    assert "groups outside the gate split; expected at least 5 (num_folds)" in line


def test_both_shipped_tasks_describe_the_official_columns():
    """Binary with patients and seven classes with lesions run through the same code."""
    isic = parse_config(PrepareDatasetConfig, [], REPO_ROOT / "configs/prepare_dataset.yaml")
    ham = parse_config(PrepareDatasetConfig, [], REPO_ROOT / "configs/ham10000/prepare_dataset.yaml")
    assert isic.task.contexts == ["image_only", "none", "patient"] and ham.task.contexts == ["image_only", "none"]
    assert ham.task.num_classes == 7 and np.count_nonzero(ham.task.malignant_mask) == 3
    demo = read_yaml(REPO_ROOT / "configs/demo/prepare_dataset.yaml")["task"]
    assert set(demo["columns"]) <= set(isic.task.columns) and demo["synthetic"] is True


def test_every_default_column_is_in_the_official_test_layout():
    isic = parse_config(PrepareDatasetConfig, [], REPO_ROOT / "configs/prepare_dataset.yaml")
    assert set(isic.task.columns) <= set(TEST_COLUMNS)
    # All but ids, the constant image type, source and licence.
    unused = {"isic_id", "patient_id", "image_type", "attribution", "copyright_license"}
    assert set(TEST_COLUMNS) - set(isic.task.columns) == unused


def test_run_returns_what_the_job_prints(sample, tmp_path):
    folder, _ = sample
    task = parse_config(PrepareDatasetConfig, [], REPO_ROOT / "configs/prepare_dataset.yaml").task
    config = PrepareDatasetConfig(
        images=str(folder / "train-image.hdf5"),
        metadata=str(folder / "train-metadata.csv"),
        out=str(tmp_path),
        task=task,
        num_folds=3,
    )
    first, second = run(config), run(config)
    assert first == second and first["dataset"] == str(tmp_path / first["digest"][:12])
