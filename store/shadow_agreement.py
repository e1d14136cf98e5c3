"""How a shadow's answers compare with the champion's on the same lesions, counted by the database."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import sqlalchemy as sql
from sqlalchemy.engine import Connection

from store.database import Store
from store.shadow_records import SHADOW_SUFFIX
from store.tables import now_us, predictions

# Enough for a rank correlation to within a few thousandths; two floats each.
RANKED_PAIRS = 100_000

_CHAMPION, _SHADOW = predictions.alias("champion_record"), predictions.alias("shadow_record")


@dataclass(frozen=True)
class ShadowAgreement:
    """A champion's and a shadow's answers to the same lesions.

    Attributes:
        pairs: lesions that both gave a risk. The figures below are over these, and None without any.
        champion_abstained, shadow_abstained: lesions from which one abstained and not the other.
        mean_abs_difference: of the risks.
        rank_correlation: Spearman's, of the risks of the newest `ranked_pairs` pairs; None where it is not defined.
        ranked_pairs: pairs that it was computed from.
        same_band: share with the same band.
        raised: share that the champion calls negative and the shadow positive, each at its own threshold.
        lowered: share that the champion calls positive and the shadow negative.
    """

    champion_version: str
    shadow_version: str
    pairs: int = 0
    champion_abstained: int = 0
    shadow_abstained: int = 0
    mean_abs_difference: float | None = None
    rank_correlation: float | None = None
    ranked_pairs: int = 0
    same_band: float | None = None
    raised: float | None = None
    lowered: float | None = None


def shadow_agreement(
    store: Store, champion_version: str, shadow_version: str, since_us: int, ranked_pairs: int = RANKED_PAIRS
) -> ShadowAgreement:
    """Compares two models on what was received from `since_us` (microseconds UTC) on."""
    versions = (_CHAMPION.c.model_version == champion_version, _SHADOW.c.model_version == shadow_version)
    with store.reading() as connection:
        found = shadow_agreements(connection, since_us, now_us() + 1, ranked_pairs, *versions)
    return found[0] if found else ShadowAgreement(champion_version, shadow_version)


def shadow_agreements(
    connection: Connection,
    start_us: int,
    end_us: int,
    ranked_pairs: int = RANKED_PAIRS,
    *conditions: sql.ColumnElement[bool],
) -> list[ShadowAgreement]:
    """One entry per champion's and shadow's version that met in [start_us, end_us), by version."""
    # No condition on the champion's role or time: its id finds it, and other indexes would find too many.
    joined = _SHADOW.join(
        _CHAMPION,
        _CHAMPION.c.id == sql.func.substr(_SHADOW.c.id, 1, sql.func.length(_SHADOW.c.id) - len(SHADOW_SUFFIX)),
    )
    shadow = _SHADOW.c
    window = (shadow.role == "shadow", shadow.received_at >= start_us, shadow.received_at < end_us, *conditions)
    keys = (_CHAMPION.c.model_version, _SHADOW.c.model_version)
    query = sql.select(*keys, *_figures()).select_from(joined).where(*window).group_by(*keys).order_by(*keys)
    found = []
    for champion_version, shadow_version, pairs, *abstained, difference, band, raised, lowered in list(
        connection.execute(query)
    ):
        newest = (
            sql.select(_CHAMPION.c.risk, _SHADOW.c.risk)
            .select_from(joined)
            .where(*window, keys[0] == champion_version, keys[1] == shadow_version, _both_scored())
            .order_by(shadow.received_at.desc(), shadow.id.desc())
            .limit(ranked_pairs)
        )
        risks = np.array(connection.execute(newest).all(), np.float64).reshape(-1, 2)
        found.append(
            ShadowAgreement(
                champion_version,
                shadow_version,
                pairs,
                *abstained,
                mean_abs_difference=difference,
                rank_correlation=rank_correlation(risks[:, 0], risks[:, 1]),
                ranked_pairs=len(risks),
                **{
                    name: count / pairs if pairs else None
                    for name, count in (("same_band", band), ("raised", raised), ("lowered", lowered))
                },
            )
        )
    return found


def _both_scored() -> sql.ColumnElement[bool]:
    return sql.and_(_CHAMPION.c.risk.is_not(None), _SHADOW.c.risk.is_not(None))


def _figures() -> list[sql.ColumnElement]:
    """Counts and the mean difference, in the order in which `shadow_agreements` reads them."""
    champion, shadow = _CHAMPION.c, _SHADOW.c

    def count(*conditions: sql.ColumnElement[bool]) -> sql.ColumnElement[int]:
        return sql.func.sum(sql.case((sql.and_(*conditions), 1), else_=0))

    # A comparison with NULL, an abstention's risk, is never true.
    return [
        count(_both_scored()),
        count(champion.abstained, sql.not_(shadow.abstained)),
        count(sql.not_(champion.abstained), shadow.abstained),
        sql.func.avg(sql.func.abs(champion.risk - shadow.risk)),
        count(_both_scored(), champion.band == shadow.band),
        count(champion.risk < champion.threshold, shadow.risk >= shadow.threshold),
        count(champion.risk >= champion.threshold, shadow.risk < shadow.threshold),
    ]


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's rank correlation of two float (N,); None for fewer than two values or where one has one value only."""
    if len(first) < 2:
        return None
    ranks = np.stack([_average_ranks(first), _average_ranks(second)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    scale = np.sqrt((ranks**2).sum(axis=1).prod())
    return None if scale == 0 else float(ranks.prod(axis=0).sum() / scale)


def _average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, float64 (N,); equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[inverse]
