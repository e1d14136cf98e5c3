"""One picture in a hundred like those of training is refused at most, far ones are, and a saved rule decides alike."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modeling.abstention import MIN_ROWS, REASONS, AbstentionRule
from tests.tiny_bundle import tiny_bundle

DIM = 40


def pictures(number, seed=0):
    """Figures and embeddings of usable pictures."""
    rng = np.random.default_rng(seed)
    quality = {
        "brightness": rng.normal(0.6, 0.06, number),
        "contrast": rng.gamma(5.0, 0.02, number),
        "blur": rng.normal(1.7, 0.3, number),
        "red": rng.normal(0.7, 0.04, number),
        "green": rng.normal(0.55, 0.04, number),
        "blue": rng.normal(0.5, 0.04, number),
    }
    basis = np.random.default_rng(77).normal(size=(8, DIM))
    return quality, 6.0 + rng.normal(size=(number, 8)) @ basis + 0.3 * rng.normal(size=(number, DIM))


def fit(quality, embeddings, **settings):
    """Every picture of another patient."""
    return AbstentionRule.fit(quality, embeddings, np.arange(len(embeddings)), seed=0, **settings)


@pytest.fixture(scope="module")
def rule():
    return fit(*pictures(2000))


def refused(rule, quality, embeddings):
    return np.array([bool(found) for found in rule.refusals(quality, rule.distance(embeddings))])


def one(**changes):
    quality, embedding = pictures(1, seed=3)
    return {name: float(changes.get(name, values[0])) for name, values in quality.items()}, embedding


@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_all_checks_together_refuse_the_rate_asked_for(rate):
    rule = fit(*pictures(2000), false_refusal_rate=rate)
    share = refused(rule, *pictures(20_000, seed=1)).mean()
    assert 0.4 * rate < share < 1.4 * rate


def test_few_training_pictures_do_not_make_it_refuse_more():
    shares = [refused(fit(*pictures(150, seed)), *pictures(4000, seed=seed + 50)).mean() for seed in range(8)]
    assert np.mean(shares) < 0.03


def test_refusals_name_what_is_wrong(rule):
    def reasons(quality, embedding):
        (found,) = rule.refusals(quality, rule.distance(embedding))
        return [refusal.reason for refusal in found]

    quality, embedding = one()
    assert reasons(quality, embedding) == []
    assert reasons(one(brightness=0.1)[0], embedding) == ["too_dark"]
    assert reasons(one(blur=0.0)[0], embedding) == ["blurred"]
    away = embedding + 9.0 * np.random.default_rng(1).normal(size=embedding.shape)
    assert reasons(quality, away) == ["unlike_training"]
    assert reasons(one(brightness=0.1, blue=0.9)[0], away) == ["too_dark", "unusual_colour", "unlike_training"]
    assert set(reasons(one(brightness=0.1, blue=0.9)[0], away)) <= set(REASONS)
    (found,) = rule.refusals(quality, np.float32([99.0]))
    assert found[0].detail == f"embedding distance 99, expected at most {rule.max_distance:.3g}"


def test_what_is_no_number_is_refused_and_never_scored_silently(rule):
    quality, embedding = one()
    assert rule.refusals(quality, np.array([np.nan]))[0][0].reason == "unlike_training"
    assert rule.refusals(quality | {"red": float("nan")}, rule.distance(embedding))[0][0].reason == "unusual_colour"


def test_unreadable_training_pictures_are_left_out_of_the_fit(rule):
    quality, embeddings = pictures(2100)
    quality = {name: values.copy() for name, values in quality.items()}
    quality["brightness"][2000:2050] = np.nan
    embeddings[2050:] = np.nan
    fitted = fit(quality, embeddings)
    assert fitted.num_rows == 2000 and np.isfinite(fitted.max_distance)


def test_too_few_pictures_make_no_rule():
    assert fit(*pictures(MIN_ROWS - 1)) is None
    assert fit(*pictures(MIN_ROWS)) is not None
    assert AbstentionRule.fit(*pictures(2000), ["one patient"] * 2000, seed=0) is None


def test_new_patients_are_refused_no_more_often_though_patients_differ():
    """Twenty pictures of one patient are alike; a rule that takes them for twenty patients knows too little."""

    def clinic(seed, patients=60):
        rng = np.random.default_rng(seed)
        quality, _ = pictures(patients * 20, seed)
        of_patient = np.repeat(6.0 + 0.5 * rng.normal(size=(patients, DIM)), 20, axis=0)
        return quality, of_patient + 0.05 * rng.normal(size=(patients * 20, DIM)), np.repeat(np.arange(patients), 20)

    quality, embeddings, patients = clinic(1)
    new = clinic(2, patients=400)[:2]
    aware = AbstentionRule.fit(quality, embeddings, patients, seed=0)
    assert refused(aware, *new).mean() < 0.04 < refused(fit(quality, embeddings), *new).mean()


def test_constant_embeddings_and_figures_refuse_nothing_like_them(tmp_path):
    quality, _ = pictures(200)
    flat = {name: np.full(200, values[0]) for name, values in quality.items()}
    embeddings = np.ones((200, DIM))
    rule = fit(flat, embeddings)
    assert not refused(rule, flat, embeddings * np.linspace(1 - 1e-6, 1 + 1e-6, DIM)).any()
    rule.save(tmp_path)
    assert AbstentionRule.load(tmp_path).max_distance == rule.max_distance >= 1


def test_a_saved_rule_decides_alike_and_is_part_of_the_hashed_bundle(rule, tmp_path):
    rule.save(tmp_path)
    again = AbstentionRule.load(tmp_path)
    quality, embeddings = pictures(500, seed=9)
    embeddings[::3] += 5.0
    quality["brightness"][::7] = 0.9
    first = rule.refusals(quality, rule.distance(embeddings))
    assert sum(map(bool, first)) > 50
    assert again.refusals(quality, again.distance(embeddings)) == first
    assert again.describe() == rule.describe()


def test_no_files_no_rule_and_half_or_foreign_files_are_refused(rule, tmp_path):
    assert AbstentionRule.load(tmp_path) is None
    rule.save(tmp_path)
    path = tmp_path / "abstention.json"
    content = json.loads(path.read_text())
    for change, text in (
        ({"schema_version": 2}, "schema_version"),
        ({"limits": {}}, "limits are of"),
        ({"surprise": 1}, "surprise"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=f"abstention.json is not valid: .*{text}") as caught:
            AbstentionRule.load(tmp_path)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match="abstention.json cannot be read"):
        AbstentionRule.load(tmp_path)


def test_a_bundle_without_a_rule_opens_and_one_of_another_network_does_not(rule, tmp_path):
    assert tiny_bundle(tmp_path / "without").abstention() is None
    assert tiny_bundle(tmp_path / "tabular", abstention=rule, modalities=["metadata"]).abstention() is None
    foreign = tiny_bundle(tmp_path / "foreign", abstention=rule)
    assert "abstention.npz" in foreign.manifest.files and "abstention.json" in foreign.manifest.files
    with pytest.raises(ValueError, match="reads 40-d embeddings, its network gives 8"):
        foreign.abstention()
