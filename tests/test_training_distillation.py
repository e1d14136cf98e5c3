"""Who teaches whom: the network that did not see the student's fold either, of a run of the same data."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from data_pipelines.image_dataset import DatasetVersion
from modeling.image_scorer import ExportableScorer
from ray_jobs.job import parse_config
from ray_jobs.train_model import TrainModelConfig
from training.config import TrainingConfig
from training.distillation import Teacher, teacher_settings
from training.image_models import RunFolder, check_training
from training.networks import CHECKPOINT_FILE, create_network, load_network
from training.trainer import TrainedImageModel

SMALL = {"backbone": "mobilenetv3_small_050", "weights": "none", "input_size": 32}
DIGEST = "a" * 64


@pytest.fixture
def version(tmp_path, many_classes):
    lesions = pd.DataFrame({"id": ["I0", "I1", "I2"], "fold": [0, 1, 2], "label": [0, 1, 2]})
    return DatasetVersion(tmp_path, many_classes, DIGEST, "images.hdf5", lesions, 3)


@pytest.fixture
def teacher_run(tmp_path, version):
    """A finished run of three folds and a refit, each network's checkpoint in a folder of its name."""
    config = TrainingConfig.model_validate({"model": SMALL, "optimizer": {"malignant_weight": 1.0}})
    folder = RunFolder(tmp_path / "runs" / "teacher", config, version)
    for name in ("fold_0", "fold_1", "fold_2", "refit"):
        checkpoint = folder.path / "checkpoints" / name
        checkpoint.mkdir(parents=True)
        folder.train(name, lambda checkpoint=checkpoint: TrainedImageModel(checkpoint, {"auc": 0.5}))
    return folder.path


def student(teacher_run, **fields):
    return TrainingConfig.model_validate({"model": SMALL, "distillation": {"teacher_run": str(teacher_run)}, **fields})


def test_a_student_learns_from_the_network_that_did_not_see_its_fold_and_the_refit_from_the_refit(teacher_run):
    pairs = {fold: teacher_settings(student(teacher_run), DIGEST, fold)["checkpoint"] for fold in (0, 1, 2, None)}
    expected = {0: "fold_0", 1: "fold_1", 2: "fold_2", None: "refit"}
    assert pairs == {fold: str(teacher_run / "checkpoints" / name) for fold, name in expected.items()}
    assert teacher_settings(TrainingConfig(), DIGEST, 0) is None


def test_a_run_that_cannot_teach_is_refused_in_one_line(teacher_run, version, tmp_path):
    config = student(teacher_run)
    check_training(config, version, [None, 0, 1, 2])
    with pytest.raises(ValueError, match="teacher_run: .* was trained on data set aaaaaaaaaaaa, not on bbbbbbbbbbbb"):
        teacher_settings(config, "b" * 64, 0)
    (teacher_run / "fold_1.json").unlink()
    with pytest.raises(ValueError, match="teacher has no finished fold_1 to learn from"):
        check_training(config, version, range(3))
    check_training(config, version, [0])  # a search of one fold needs no other
    (teacher_run / "checkpoints" / "refit").rmdir()
    with pytest.raises(ValueError, match="no finished refit"):
        teacher_settings(config, DIGEST, None)
    with pytest.raises(ValueError, match="teacher_run: .*nowhere is not the folder of a training run"):
        teacher_settings(student(tmp_path / "nowhere"), DIGEST, 0)


def test_the_teacher_sees_the_students_pictures_at_its_own_size_and_answers_as_it_is_served(teacher_run, many_classes):
    settings = teacher_settings(student(teacher_run), DIGEST, 2)
    config = TrainingConfig.model_validate(settings["config"])
    torch.manual_seed(0)
    network = create_network(config, many_classes)
    torch.save({"average": network.state_dict()}, teacher_run / "checkpoints" / "fold_2" / CHECKPOINT_FILE)

    teacher = Teacher(settings, many_classes, torch.device("cpu"))
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))
    served = ExportableScorer([load_network(teacher_run / "checkpoints" / "fold_2", config, many_classes)])
    logits = teacher(images)
    assert torch.allclose(logits, served(images)[0], atol=1e-5) and not logits.requires_grad
    # Twice as large, every pixel four times: the resized picture is the one above.
    double = images.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    assert torch.allclose(teacher(double), logits, atol=1e-3)


def test_the_teachers_place_starts_from_home_in_a_file_and_from_where_a_flag_was_typed(tmp_path, monkeypatch):
    monkeypatch.setenv("DERMRAY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "train_model.yaml"
    file.write_text("dataset: d\ntraining: {distillation: {teacher_run: runs/t}, model: {weights: w.pt}}\n")
    config = parse_config(TrainModelConfig, [], file).training
    assert config.distillation.teacher_run == str(tmp_path / "home/runs/t")
    assert config.model.weights == str(tmp_path / "home/w.pt")
    typed = parse_config(TrainModelConfig, ["--training.distillation.teacher_run", "runs/t"], file).training
    assert typed.distillation.teacher_run == str(tmp_path / "runs/t")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {"backbone": "resnet_18", "weights": "none"}}, "did you mean resnet18"),
        ({"model": SMALL | {"weights": "/no/file.pt"}}, "expected 'none', 'package' or the path"),
        ({"model": SMALL | {"frozen_blocks": 20}}, "allows 0 to 6"),
    ],
)
def test_what_would_fail_in_every_worker_is_found_before_they_start(version, fields, message):
    with pytest.raises(ValueError, match=message):
        check_training(TrainingConfig.model_validate(fields), version, [0])


def test_a_malignant_head_beside_two_classes_is_refused(version):
    binary = version.task.model_copy(update={"classes": ["nv", "mel"], "malignant": ["mel"]})
    config = TrainingConfig.model_validate({"model": SMALL, "optimizer": {"malignant_weight": 1}})
    check_training(config, version, [0])
    with pytest.raises(ValueError, match="malignant_weight = 1.0: task spots has two classes"):
        check_training(config, DatasetVersion(version.path, binary, DIGEST, "i", version.lesions, 3), [0])


def test_a_run_begun_before_these_fields_existed_goes_on(teacher_run, version):
    file = teacher_run / "run.json"
    facts = json.loads(file.read_text())
    assert "distillation" in facts["config"]
    config = TrainingConfig.model_validate(facts["config"])
    del facts["config"]["distillation"], facts["config"]["augmentation"]["place"]
    file.write_text(json.dumps(facts))
    RunFolder(teacher_run, config, version)
    with pytest.raises(ValueError, match="another config or data set"):
        RunFolder(teacher_run, student(teacher_run), version)
