"""Agreement of two models is what it says, over the pairs that it says."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from store.database import open_store
from store.shadow_agreement import ShadowAgreement, rank_correlation, shadow_agreement
from store.shadow_records import shadow_id
from tests.log_rows import prediction_row


@pytest.fixture
def store(any_store_url):
    opened = open_store(any_store_url)
    yield opened
    opened.close()


def pair(name, champion, shadow, at=1_000, versions=("1", "2")):
    """Rows of one lesion; an answer is (risk, band), or None for an abstention. Thresholds: 0.5 and 0.3."""
    rows = []
    for role, answer, threshold, version in zip(
        ("champion", "shadow"), (champion, shadow), (0.5, 0.3), versions, strict=True
    ):
        values = {"abstained": True} if answer is None else {"risk": answer[0], "band": answer[1]}
        row_id = name if role == "champion" else shadow_id(name)
        rows.append(
            prediction_row(row_id, role=role, received_at=at, threshold=threshold, model_version=version, **values)
        )
    return rows


def insert(store, *pairs):
    store.insert_predictions([row for rows in pairs for row in rows])


def test_figures_are_over_pairs_with_two_risks(store):
    insert(
        store,
        pair("a", (0.1, "low"), (0.2, "low")),
        pair("raised", (0.4, "low"), (0.3, "moderate")),
        pair("lowered", (0.5, "high"), (0.29, "moderate")),
        pair("d", (0.9, "high"), (0.9, "high")),
        pair("e", None, (0.9, "high")),
        pair("f", (0.9, "high"), None),
        pair("g", (0.9, "high"), None),
        pair("h", None, None),
        # Other versions, an earlier time, and lesions that one of them never saw.
        pair("i", (0.1, "low"), (0.9, "high"), versions=("1", "3")),
        pair("j", (0.1, "low"), (0.9, "high"), at=999),
        pair("k", (0.1, "low"), (0.9, "high"))[:1],
    )
    found = shadow_agreement(store, "1", "2", 1_000)
    assert found == ShadowAgreement(
        champion_version="1",
        shadow_version="2",
        pairs=4,
        champion_abstained=1,
        shadow_abstained=2,
        mean_abs_difference=pytest.approx((0.1 + 0.1 + 0.21 + 0) / 4),
        rank_correlation=pytest.approx(spearmanr([0.1, 0.4, 0.5, 0.9], [0.2, 0.3, 0.29, 0.9]).statistic),
        ranked_pairs=4,
        same_band=0.5,
        raised=0.25,
        lowered=0.25,
    )


def test_models_that_never_met_agree_on_nothing(store):
    insert(store, pair("a", None, None))
    assert shadow_agreement(store, "1", "9", 0) == ShadowAgreement("1", "9")
    only_abstained = shadow_agreement(store, "1", "2", 0)
    assert (only_abstained.pairs, only_abstained.raised, only_abstained.rank_correlation) == (0, None, None)


def test_ranks_are_those_of_the_newest_pairs(store):
    agreeing = [pair(f"new {i}", (i / 10, "low"), (i / 10, "low"), at=2_000 + i) for i in range(5)]
    insert(store, *agreeing, *(pair(f"old {i}", (i / 10, "low"), (1 - i / 10, "low")) for i in range(5)))
    assert shadow_agreement(store, "1", "2", 0, ranked_pairs=5).rank_correlation == pytest.approx(1)
    assert shadow_agreement(store, "1", "2", 0, ranked_pairs=5).pairs == 10
    assert shadow_agreement(store, "1", "2", 0).rank_correlation < 1


def test_rank_correlation_is_spearmans_with_ties():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 20, 500).astype(float)
    second = first + rng.integers(0, 15, 500)
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert rank_correlation(first, -first) == pytest.approx(-1)
    assert rank_correlation(first, np.zeros(500)) is None and rank_correlation(first[:1], second[:1]) is None
