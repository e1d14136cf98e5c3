"""A search's folder belongs to one search, and its finished folds are trained once."""

import pytest

from training.config import TrainingConfig
from tune.json_files import write_json
from tune.search_folder import FoldRecords, SearchFolder, without_credentials
from tune.search_space import with_overrides

IDENTITY = {"dataset": "d1", "space": {"optimizer.learning_rate": {"low": 0.1, "high": 0.2}}, "seed": 0}


def test_a_search_is_resumed_with_what_it_was_started_with(tmp_path):
    folder = SearchFolder(str(tmp_path), "night")
    search_id = folder.claim(IDENTITY, resume=False)
    assert folder.claim(IDENTITY, resume=True) == search_id
    assert SearchFolder(str(tmp_path), "day").claim(IDENTITY, resume=False) != search_id
    other = {**IDENTITY, "space": {"optimizer.learning_rate": {"low": 0.1, "high": 0.5}}}
    with pytest.raises(ValueError, match=r"space.optimizer.learning_rate.high was 0.2, now 0.5; resume it with"):
        folder.claim(other, resume=True)
    with pytest.raises(ValueError, match="dataset was 'd1', now 'd2'"):
        folder.claim({**IDENTITY, "dataset": "d2"}, resume=True)
    with pytest.raises(ValueError, match=r"space.model.low was None, now 1"):
        folder.claim({**IDENTITY, "space": {**IDENTITY["space"], "model": {"low": 1}}}, resume=True)


def test_a_moved_search_is_not_resumed_into_its_old_folder(tmp_path):
    SearchFolder(str(tmp_path / "old"), "night").claim(IDENTITY, resume=False)
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(ValueError, match=r"folder was '.*/old/night', now '.*/new/night'; resume it with"):
        SearchFolder(str(tmp_path / "new"), "night").claim(IDENTITY, resume=True)


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("postgresql://ada:s3cret@db.site:5432/mlflow?password=s3cret", "postgresql://db.site:5432/mlflow"),
        ("https://ada:p@ss@mlflow.site/team", "https://mlflow.site/team"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("/data/artifacts", "/data/artifacts"),
        ("s3://bucket/artifacts", "s3://bucket/artifacts"),
    ],
)
def test_no_secret_of_a_url_is_kept(url, kept):
    assert without_credentials(url) == kept


def test_a_search_is_neither_mixed_with_another_nor_resumed_where_there_is_none(tmp_path):
    folder = SearchFolder(str(tmp_path), "night")
    with pytest.raises(ValueError, match=r"no such search in .*night to resume"):
        folder.claim(IDENTITY, resume=True)
    folder.claim(IDENTITY, resume=False)
    with pytest.raises(ValueError, match="--resume true, or give another name"):
        folder.claim(IDENTITY, resume=False)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "searches").write_text("a file stands in the way")
    folder = SearchFolder(str(tmp_path / "searches"), "night")
    with pytest.raises(ValueError, match=r"searches = '.*/searches': the search's folder cannot be written: \w+"):
        folder.claim(IDENTITY, resume=False)


class Trainings:
    """Stands for Ray Train: leaves a run folder with a checkpoint, as a run does, and may be cut off."""

    def __init__(self):
        self.names = []

    def __call__(self, storage_path, name, cut_off=False):
        self.names.append(name)
        write_json(f"{storage_path}/{name}/checkpoint/state.json", {})
        write_json(f"{storage_path}/{name}.epoch", 0)
        if cut_off:
            raise KeyboardInterrupt
        return {"pauc": 0.1, "auc": 0.8}


def test_a_finished_fold_is_found_by_its_config_and_leaves_no_checkpoint(tmp_path):
    trainings, config = Trainings(), TrainingConfig()
    records = FoldRecords(str(tmp_path), config, "d1")
    assert records.get(0) is None and not records.begun(0, "trial_1_fold_0")
    record = records.train(0, "trial_1_fold_0", trainings)
    assert record["pauc"] == 0.1 and record["seconds"] > 0
    assert [path.suffix for path in (tmp_path / "folds").iterdir()] == [".json"]
    # Another trial that drew the same config.
    again = FoldRecords(str(tmp_path), TrainingConfig(), "d1")
    assert again.get(0) == record and again.begun(0, "trial_7_fold_0")
    assert again.get(1) is None
    assert FoldRecords(str(tmp_path), config, "d2").get(0) is None
    other = with_overrides(config, {"optimizer.learning_rate": 0.01})
    assert FoldRecords(str(tmp_path), other, "d1").get(0) is None


def test_a_fold_that_was_cut_off_has_begun_but_has_no_record(tmp_path):
    trainings = Trainings()
    records = FoldRecords(str(tmp_path), TrainingConfig(), "d1")
    with pytest.raises(KeyboardInterrupt):
        records.train(0, "trial_1_fold_0", lambda path, name: trainings(path, name, cut_off=True))
    assert records.get(0) is None and records.begun(0, "trial_1_fold_0")
    records.train(0, "trial_1_fold_0", trainings)
    assert trainings.names == ["trial_1_fold_0"] * 2 and records.get(0)["auc"] == 0.8


def test_a_search_that_is_over_keeps_records_only(tmp_path):
    folder = SearchFolder(str(tmp_path), "night")
    folder.remove_checkpoints()
    records = FoldRecords(folder.url, TrainingConfig(), "d1")
    records.train(0, "trial_1_fold_0", Trainings())
    with pytest.raises(KeyboardInterrupt):
        records.train(1, "trial_1_fold_1", lambda path, name: Trainings()(path, name, cut_off=True))
    folder.remove_checkpoints()
    assert [path.suffix for path in (tmp_path / "night" / "folds").iterdir()] == [".json"]
    assert records.get(0) is not None
