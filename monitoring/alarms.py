"""Alarms: rows in the store and lines in the log, raised once each."""

from __future__ import annotations

import logging
from typing import Any

from monitoring.drift_report import WindowDrift
from store.database import Store

logger = logging.getLogger(__name__)


def drift_alarm(
    window: str, start_us: int, end_us: int, model_version: str, reference: str, verdict: WindowDrift
) -> dict[str, Any]:
    """The alarm of a drifted window: one per (window, model, reference), whatever labels or rows come later.

    Args:
        window: the window's name for people; start_us, end_us: its bounds, microseconds UTC.
        reference: digest of the bundle whose reference the window was compared with.
    """
    names = ", ".join(verdict.drifted)
    return {
        "dedupe_key": f"drift:{model_version}:{reference[:16]}:{start_us}:{end_us}",
        "kind": "drift",
        "severity": "warning",
        "model_version": model_version,
        "message": f"drift on {window}: {names} ({verdict.num_rows} predictions of model {model_version})",
        "detail": {
            "window": window,
            "window_start": start_us,
            "window_end": end_us,
            "reference": reference,
            "drifted": verdict.drifted,
        },
    }


def raise_alarm(store: Store, alarm: dict[str, Any]) -> bool:
    """Stores an alarm and logs it, unless its dedupe key was raised before; returns whether it is new."""
    is_new = store.raise_alarm(alarm)
    if is_new:
        logger.warning("ALARM %s: %s", alarm["kind"], alarm["message"])
    return is_new
