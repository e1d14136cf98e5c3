"""A service's month for tests of its page: predictions, labels, drift reports, alarms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from store.database import Store
from store.tables import labels, now_us
from tests.log_rows import label_row, prediction_row

HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
MODEL, THRESHOLD = "3", 0.0105
FEATURES = ("age_approx", "sex", "brightness", "risk_none")


def a_day(store: Store) -> int:
    """Predictions of the last 24 hours, every seventh without a risk; returns how many."""
    now, rng = now_us(), np.random.default_rng(0)
    rows = []
    for hour in range(24):
        for number in range(3 + round(9 * (1 + math.sin(hour / 4)))):
            at = now - hour * HOUR_US - (number + 1) * 60_000_000
            values: dict[str, Any] = {"abstained": True, "reasons": ["blurred"]}
            if number % 7 != 6:
                values = {"band": "low", "risk": 1 / (1 + math.exp(-rng.normal(-5, 2))), "threshold": THRESHOLD}
            values |= {"stage_ms": {"total": 14.0 + number}, "model_version": MODEL}
            rows.append(prediction_row(f"p{hour}-{number}", received_at=at, **values))
    store.insert_predictions(rows)
    return len(rows)


def labelled_lesions(store: Store, malignant: int, benign: int, missed: int = 0) -> None:
    """Lesions of as many patients, a day ago, and what an expert called them; `missed` cancers had low risks."""
    now = now_us()
    rows, said = [], []
    for number in range(malignant + benign):
        cancer = number < malignant
        risk = 0.004 if cancer and number < missed else 0.2 + number / 1000 if cancer else 0.001 + number / 100_000
        values = {"risk": risk, "threshold": THRESHOLD, "band": "low", "model_version": MODEL}
        values |= {"patient_hmac": f"{number:064x}", "stage_ms": {"total": 12.0}}
        rows.append(prediction_row(f"labelled{number}", received_at=now - DAY_US - number, **values))
        label = {"label": "malignant" if cancer else "benign", "malignant": cancer, "labelled_at": now - HOUR_US}
        said.append(label_row(f"labelled{number}", labeller="Dr Weber", **label))
    store.insert_predictions(rows)
    if said:
        with store.writing() as connection:
            connection.execute(labels.insert(), said)


def a_drift_report(store: Store, days_ago: int, drifted: tuple[str, ...] = (), **values: Any) -> None:
    """The report of one whole day on `FEATURES`, and on those that drifted."""
    start = (now_us() // DAY_US - days_ago) * DAY_US
    features = [
        {
            **{"name": name, "statistic": "ks_distance", "distance": 0.26 if name in drifted else 0.05},
            **{"threshold": 0.2, "drifted": name in drifted, "n_reference": 500, "n_current": 400},
        }
        for name in dict.fromkeys((*FEATURES, *drifted))
    ]
    statistics = {"features": features, "embedding": None, "not_judged": {}, "segments": []}
    row = {"window_start": start, "window_end": start + DAY_US, "model_version": MODEL, "reference": "b" * 64}
    row |= {"label_watermark": 0, "status": "drift" if drifted else "ok", "alarm": bool(drifted)}
    row |= {"drifted": list(drifted), "num_rows": 400, "num_groups": 130, "statistics": statistics}
    store.upsert_drift_report(row | {"input_digest": "a" * 64, "report": None} | values)


def an_alarm(store: Store, number: int, **values: Any) -> int:
    """Raises an alarm about a topic of its own; returns its id."""
    base = {"kind": "drift", "severity": "warning", "model_version": MODEL, "message": f"drift {number}"}
    row = {"dedupe_key": f"test:{number}", "detail": {"drifted": ["age"]}, "raised_at": now_us(), **base, **values}
    assert store.raise_alarm(row)
    return next(found["id"] for found in store.alarms() if found["dedupe_key"] == row["dedupe_key"])
