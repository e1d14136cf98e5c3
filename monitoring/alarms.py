"""Alarms: rows in the store and lines in the log, raised once each; what repeats them within the cool-down is quiet."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from store.alarm_topics import COOL_DOWN_H, HOUR_US, WARNING, insert_alarm, topic_name
from store.database import Store

if TYPE_CHECKING:
    from monitoring.drift_report import WindowDrift

logger = logging.getLogger(__name__)


def drift_alarm(
    window: str,
    start_us: int,
    end_us: int,
    model_version: str,
    reference: str,
    verdict: WindowDrift,
    segment: str | None = None,
) -> dict[str, Any]:
    """The alarm of a drifted window: one per (window, model, reference), whatever labels or rows come later.

    Its topic is the drift of this model from this reference, so that a later window that drifted in the same features
    is quieted.

    Args:
        window: the window's name for people; start_us, end_us: its bounds, microseconds UTC.
        reference: digest of the bundle whose reference the window was compared with.
        segment: the part of the window that it is about, such as `institution=X`, which is a topic of its own; None:
            all of it.
    """
    names = ", ".join(verdict.drifted)
    part = () if segment is None else (segment,)
    place = window if segment is None else f"{window}, {segment}"
    detail: dict[str, Any] = {
        "window": window,
        "window_start": start_us,
        "window_end": end_us,
        "reference": reference,
        "drifted": verdict.drifted,
    }
    if segment is not None:
        detail["segment"] = segment
    return {
        "dedupe_key": topic_name("drift", model_version, reference[:16], str(start_us), str(end_us), *part),
        "topic": topic_name("drift", model_version, reference[:16], *part),
        "kind": "drift",
        "severity": WARNING,
        "model_version": model_version,
        "message": f"drift on {place}: {names} ({verdict.num_rows} predictions of model {model_version})",
        "detail": detail,
    }


def quality_alarm(
    window: str, start_us: int, end_us: int, model_version: str, reference: str, problems: list[str]
) -> dict[str, Any]:
    """The alarm of a model that experts' labels show to be worse than on its gate split; arguments as `drift_alarm`.

    Args:
        problems: `model_quality.quality_problems`, at least one.
    """
    return {
        "dedupe_key": topic_name("quality", model_version, reference[:16], str(start_us), str(end_us)),
        "topic": topic_name("quality", model_version, reference[:16]),
        "kind": "quality",
        "severity": WARNING,
        "model_version": model_version,
        "message": f"model {model_version} is worse than it was, on labels up to {window}: {'; '.join(problems)}",
        "detail": {
            "window": window,
            "window_start": start_us,
            "window_end": end_us,
            "reference": reference,
            # The figures change from day to day; what they are about does not.
            "findings": sorted({problem.split(")")[0] + ")" for problem in problems}),
        },
    }


def raise_alarm(store: Store, alarm: dict[str, Any], cool_down_h: float = COOL_DOWN_H) -> bool:
    """Stores an alarm and logs it, unless its dedupe key was raised before; returns whether it is new.

    Args:
        cool_down_h: how long an alarm quiets those of its topic that say nothing new; see `insert_alarm`.
    """
    with store.writing() as connection:
        row = insert_alarm(connection, alarm, round(cool_down_h * HOUR_US))
    if row is None:
        return False
    if row["quieted_by"] is None:
        logger.warning("ALARM %s: %s", row["kind"], row["message"])
    else:
        logger.info("quiet, as alarm %d said it: ALARM %s: %s", row["quieted_by"], row["kind"], row["message"])
    return True
