"""What a message about alarms says: nothing of a patient but that a prediction was wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from store.alarm_deliveries import Delivery
from store.alarm_topics import SEVERITIES

TYPE = "dermray.alarms"
MAX_LISTED = 20
# An alarm's detail also holds labels, labellers and comments, which stay here.
SENT_DETAIL = (
    "prediction_id",
    "risk",
    "threshold",
    "window",
    "window_start",
    "window_end",
    "reference",
    "segment",
    "drifted",
    "findings",
)
_MAX_TEXT = 500


def message_body(delivery: Delivery, form: str) -> bytes:
    """The body of a POST, the same at every attempt: up to 20 alarms, the most urgent first, and how many more.

    Args:
        form: `json` or `text`, as of `AlarmChannel`.
    """
    # Sorting is stable: the oldest comes first among equals.
    ordered = sorted(delivery.alarms, key=lambda row: -SEVERITIES.index(row["severity"]))
    content = _as_json(delivery, ordered) if form == "json" else {"text": _as_text(ordered)}
    return json.dumps(content, ensure_ascii=False).encode()


def _as_json(delivery: Delivery, ordered: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "type": TYPE,
        "timestamp": _utc(delivery.newest_us),
        "data": {
            "channel": delivery.channel,
            "count": len(ordered),
            "by_kind": dict(Counter(row["kind"] for row in ordered)),
            "by_severity": dict(Counter(row["severity"] for row in ordered)),
            "alarms": [_listed(row) for row in ordered[:MAX_LISTED]],
            "not_listed": max(0, len(ordered) - MAX_LISTED),
        },
    }


def _listed(row: Mapping[str, Any]) -> dict[str, Any]:
    columns = ("id", "kind", "severity", "model_version", "topic")
    return {
        **{name: row[name] for name in columns},
        "raised_at": _utc(row["raised_at"]),
        "message": row["message"][:_MAX_TEXT],
        "detail": {name: row["detail"][name] for name in SENT_DETAIL if name in row["detail"]},
    }


def _as_text(ordered: Sequence[Mapping[str, Any]]) -> str:
    kinds = ", ".join(f"{number} {kind}" for kind, number in Counter(row["kind"] for row in ordered).most_common())
    lines = [f"dermray: {len(ordered)} {'alarm' if len(ordered) == 1 else 'alarms'} ({kinds})"]
    lines += [f"[{row['severity']}] #{row['id']} {row['message'][:_MAX_TEXT]}" for row in ordered[:MAX_LISTED]]
    if len(ordered) > MAX_LISTED:
        lines.append(f"and {len(ordered) - MAX_LISTED} more: GET /v1/alarms")
    # Chat services give <...> a meaning (<!channel> calls everyone), and an institution's name is a client's text.
    return "\n".join(lines).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _utc(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat(timespec="milliseconds")
