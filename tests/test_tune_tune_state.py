"""A search goes on from Ray Tune's state, starts anew where there is none, and stops where it cannot be read."""

import json

import pytest
from ray import tune

from tune.tune_state import restored_tuner


def trainable(sample):
    return {}


@pytest.fixture
def left(tmp_path, monkeypatch):
    """The experiment's folder as Ray Tune leaves it before its first trial."""
    monkeypatch.setenv("RAY_AIR_LOCAL_CACHE_DIR", str(tmp_path / "cache"))
    tune.Tuner(trainable, param_space={}, run_config=tune.RunConfig(name="tune", storage_path=str(tmp_path)))
    return tmp_path / "tune"


def restored(folder, lines):
    return restored_tuner(str(folder), trainable, {}, lines.append)


def test_a_search_starts_anew_only_where_there_is_no_state(tmp_path, left):
    lines = []
    assert restored(tmp_path / "nowhere", lines) is None
    assert restored(left, lines) is None
    (left / "experiment_state-2026-01-01_00-00-00.json").write_text(json.dumps({"trial_data": []}))
    assert restored(left, lines) is None and lines == []


@pytest.mark.parametrize(
    ("newest", "message"),
    [
        ('{"trial_data": [[', r"experiment_state-2026-01-02_00-00-00.json cannot be read \(JSONDecodeError"),
        # Ray Tune itself cannot make a trial of it.
        ('{"trial_data": [["{}", "{}"]]}', r"/tune cannot be read \(RuntimeError"),
    ],
)
def test_a_state_that_cannot_be_read_stops_the_search(left, newest, message):
    (left / "experiment_state-2026-01-01_00-00-00.json").write_text(json.dumps({"trial_data": []}))
    (left / "experiment_state-2026-01-02_00-00-00.json").write_text(newest)
    with pytest.raises(RuntimeError, match=message) as stopped:
        restored(left, [])
    assert "\n" not in str(stopped.value)


def test_a_search_that_ray_tune_refuses_to_restore_stops(left):
    (left / "experiment_state-2026-01-02_00-00-00.json").write_text('{"trial_data": [["{}", "{}"]]}')
    (left / "tuner.pkl").write_bytes(b"cut")
    with pytest.raises(RuntimeError, match=r"/tune cannot be read \(Unpickling"):
        restored(left, [])
    (left / "tuner.pkl").unlink()
    with pytest.raises(RuntimeError, match=r"/tune cannot be read \(.*NotFound"):
        restored(left, [])
