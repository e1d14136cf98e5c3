"""What is on disk counts, what was lost is scored again, and no row is kept twice."""

import numpy as np
import pytest

from data_pipelines import score_parts
from data_pipelines.score_parts import ScoreParts
from data_pipelines.table_scoring import _whole_groups


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(score_parts, "PART_ROWS", 4)


def scores(rows):
    return np.stack([np.asarray(rows, float), -np.asarray(rows, float)], axis=1)


def add(parts, rows, errors=None):
    parts.add(np.array(rows), scores(rows), errors or {})


def test_a_second_attempt_finds_what_reached_the_disk(tmp_path, small_parts):
    first = ScoreParts(tmp_path, 10, 2, with_abstained=True)
    add(first, [7, 1])
    add(first, [0, 9], {9: "not a picture"})
    add(first, [4])  # still waiting when the process is killed
    second = ScoreParts(tmp_path, 10, 2, with_abstained=True)
    assert np.flatnonzero(second.done).tolist() == [0, 1, 7, 9]
    assert np.array_equal(second.log_probabilities[[7, 1]], scores([7, 1])) and second.errors == {9: "not a picture"}
    add(second, [4, 5])
    second.flush()
    third = ScoreParts(tmp_path, 10, 2, with_abstained=True)
    assert np.flatnonzero(third.done).tolist() == [0, 1, 4, 5, 7, 9]
    assert np.isnan(third.log_probabilities[2]).all()


def test_what_was_abstained_from_is_kept_with_its_part(tmp_path, small_parts):
    first = ScoreParts(tmp_path, 10, 2, with_abstained=True)
    first.add(np.array([3, 1, 2, 8]), scores([3, 1, 2, 8]), {}, {1: ("blurred noisy", "sharpness 9"), 8: ("a", "b")})
    second = ScoreParts(tmp_path, 10, 2, with_abstained=True)
    assert second.abstained == first.abstained == {1: ("blurred noisy", "sharpness 9"), 8: ("a", "b")}


def test_a_part_that_asked_no_rule_is_scored_again_by_a_model_that_has_one(tmp_path, small_parts):
    add(ScoreParts(tmp_path, 10, 2, with_abstained=False), [3, 1, 2, 8], {8: "not a picture"})
    with np.load(tmp_path / "scores-000000.npz") as part:
        older = {name: part[name] for name in part.files if name != "abstained"}
    np.savez(tmp_path / "scores-000000.npz", **older)
    assert ScoreParts(tmp_path, 10, 2, with_abstained=False).done.sum() == 4
    second = ScoreParts(tmp_path, 10, 2, with_abstained=True)
    assert not second.done.any() and second.errors == {} and np.isnan(second.log_probabilities).all()
    second.add(np.array([1, 2, 3, 8]), scores([1, 2, 3, 8]), {}, {2: ("blurred", "x")})
    third = ScoreParts(tmp_path, 10, 2, with_abstained=True)
    assert third.done.sum() == 4 and third.errors == {} and third.abstained == {2: ("blurred", "x")}


def test_a_row_is_never_taken_twice(tmp_path, small_parts):
    parts = ScoreParts(tmp_path, 10, 2, with_abstained=True)
    add(parts, [1, 2])
    with pytest.raises(AssertionError, match="scored twice"):
        add(parts, [2, 3])


def test_a_part_that_was_being_written_does_not_count(tmp_path, small_parts):
    add(ScoreParts(tmp_path, 10, 2, with_abstained=True), [0, 1, 2, 3])
    (tmp_path / "scores-000001.npz.4711.tmp").write_bytes(b"half")
    assert ScoreParts(tmp_path, 10, 2, with_abstained=True).done.sum() == 4


def test_pieces_hold_whole_patients_and_every_row_once(monkeypatch):
    monkeypatch.setattr("data_pipelines.table_scoring.FUSED_ROWS", 10)
    groups = np.repeat([f"IP_{i}" for i in range(12)], 7)[np.random.default_rng(0).permutation(84)]
    order = np.argsort(groups, kind="stable")
    pieces = list(_whole_groups(order, groups))
    assert sorted(np.concatenate(pieces).tolist()) == list(range(84))
    assert all(len(piece) == 14 for piece in pieces)
    assert len(set().union(*(set(groups[piece]) for piece in pieces))) == sum(len(set(groups[p])) for p in pieces)
    assert [len(piece) for piece in _whole_groups(np.arange(25), None)] == [10, 10, 5]
