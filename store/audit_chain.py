"""The audit trail as a hash chain: each entry's SHA-256 covers the entry and the hash before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

FIRST_PREVIOUS_HASH = "0" * 64
_COVERED = ("id", "at", "actor", "action", "subject", "detail", "previous_hash")


def entry_hash(entry: Mapping[str, Any]) -> str:
    """Hex SHA-256 of an audit entry (every column but `hash`), over canonical JSON."""
    text = json.dumps([entry[name] for name in _COVERED], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def next_entry(last: Mapping[str, Any] | None, at: int, actor: str, action: str, subject: str, detail: dict) -> dict:
    """The entry that follows `last` (None: the first of the chain), complete with its hash."""
    entry = {
        "id": 1 if last is None else last["id"] + 1,
        "at": at,
        "actor": actor,
        "action": action,
        "subject": subject,
        # Through JSON once, so that what is hashed is what the database gives back (tuples, integer keys).
        "detail": json.loads(json.dumps(detail, allow_nan=False)),
        "previous_hash": FIRST_PREVIOUS_HASH if last is None else last["hash"],
    }
    return {**entry, "hash": entry_hash(entry)}


def verify(entries: Iterable[Mapping[str, Any]]) -> int:
    """Checks a whole chain in order of id and returns its length.

    Entries cut off the end leave a valid shorter chain: compare the length with a copy kept elsewhere.

    Raises:
        ValueError: the first entry that was changed, removed or inserted.
    """
    previous, count = FIRST_PREVIOUS_HASH, 0
    for entry in entries:
        count += 1
        if entry["id"] != count:
            raise ValueError(f"audit entry {count} is missing; found {entry['id']} in its place")
        if entry["previous_hash"] != previous or entry["hash"] != entry_hash(entry):
            raise ValueError(f"audit entry {count} was changed: its hash does not fit")
        previous = entry["hash"]
    return count
