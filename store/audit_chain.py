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


class ChainCheck:
    """Checks a chain entry by entry, oldest first, in constant memory.

    Attributes:
        length: entries that were checked.
        head: hash of the last of them; 64 zeros where there is none.
    """

    def __init__(self):
        self.length = 0
        self.head = FIRST_PREVIOUS_HASH

    def take(self, entry: Mapping[str, Any]) -> None:
        """Checks the next entry.

        Raises:
            ValueError: entries are missing before it, or it was changed, inserted or moved; the line names it.
        """
        number = self.length + 1
        if entry["id"] < number:
            raise ValueError(f"audit entry {entry['id']} was inserted: entry {number} was expected in its place")
        if entry["id"] > number:
            raise ValueError(f"audit entry {number} is missing: it was removed; entry {entry['id']} is in its place")
        if entry["hash"] != _hash_of_any(entry):
            raise ValueError(f"audit entry {number} was changed: its hash does not fit what it says")
        if entry["previous_hash"] != self.head:
            before = "the start of the chain" if number == 1 else f"entry {number - 1}"
            raise ValueError(
                f"audit entry {number} does not follow {before}: one was changed with its hash, inserted, or moved"
            )
        self.length, self.head = number, entry["hash"]


def verify(entries: Iterable[Mapping[str, Any]]) -> int:
    """Checks a whole chain in order of id and returns its length.

    Entries cut off the end leave a valid shorter chain, and who rewrites all entries from one on leaves another valid
    one: `audit_anchors` notices both.

    Raises:
        ValueError: the first entry that was changed, removed, inserted or moved.
    """
    check = ChainCheck()
    for entry in entries:
        check.take(entry)
    return check.length


def _hash_of_any(entry: Mapping[str, Any]) -> str | None:
    try:
        return entry_hash(entry)
    except (TypeError, ValueError, RecursionError):
        # NaN, bytes: nothing that was ever appended.
        return None
