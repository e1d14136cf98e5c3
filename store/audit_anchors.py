"""Anchors of the audit chain: a file beside the database that keeps heads of the chain, one JSON line each.

The chain alone shows an entry that was changed, removed, inserted or moved. Who can write the database can also cut
entries off its end, or write all of them anew from some entry on, and leave a chain that is valid in itself. An anchor
`{"id", "hash", "at"}` says that the chain had this entry at that time (microseconds, UTC).

- Without a key the anchors protect from who can write the database and not this file.
- With a key (`DERMRAY_AUDIT_KEY`) each line carries an HMAC-SHA256. Who can write both can then not make an anchor that
  fits a chain of theirs: the entries up to the last line that they leave stay protected. They can still cut lines off
  the file's end, or remove it: `check_age` notices where every run leaves an anchor; a copy elsewhere notices always.
- Nothing here protects from who also has the key, nor entries that no run has anchored yet.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from store.audit_chain import ChainCheck
from store.synced_files import sync_folder

KEY_VARIABLE = "DERMRAY_AUDIT_KEY"
_MIN_KEY_LENGTH = 16


class Anchor(NamedTuple):
    """An entry that the chain had.

    Attributes:
        id: number of the entry.
        hash: its hash, hex SHA-256.
        at: when it was the last one, microseconds UTC.
    """

    id: int
    hash: str
    at: int

    @property
    def time(self) -> str:
        return datetime.fromtimestamp(self.at / 1e6, UTC).isoformat(timespec="seconds")


def anchor_key(environment: Mapping[str, str]) -> bytes | None:
    """The key that signs anchors; None where there is none.

    Raises:
        ValueError: it is too short to be a secret.
    """
    text = environment.get(KEY_VARIABLE)
    if text is None:
        return None
    if len(text.strip()) < _MIN_KEY_LENGTH:
        raise ValueError(f"{KEY_VARIABLE} has {len(text.strip())} characters; expected at least {_MIN_KEY_LENGTH}")
    return text.strip().encode()


class AnchorFile:
    """The anchors of one chain, while this process alone holds their file; see `open_anchors`.

    Attributes:
        anchors: by time of writing.
        torn: whether the last line was cut off by a crash; the next `append` removes what is left of it.
    """

    def __init__(self, path: Path, descriptor: int, key: bytes | None):
        self.path = path
        self._descriptor = descriptor
        self._key = key
        data = path.read_bytes()
        lines = data.split(b"\n")
        # A line is acknowledged once its line break is on disk.
        self.torn = lines[-1] != b""
        self._whole_bytes = len(data) - len(lines[-1])
        self.anchors = [self._parsed(number, line) for number, line in enumerate(lines[:-1], 1)]
        self._hashes: dict[int, Anchor] = {}
        for number, anchor in enumerate(self.anchors, 1):
            if self._hashes.setdefault(anchor.id, anchor).hash != anchor.hash:
                raise ValueError(f"{self._line(number)} contradicts an earlier one about audit entry {anchor.id}")

    def check_age(self, max_age_s: float, now_us: int) -> None:
        """Refuses anchors whose newest is older than a run should have left, as after lines were cut off.

        Raises:
            ValueError: there is no anchor, or the newest one is too old.
        """
        if not self.anchors:
            raise ValueError(f"{self.path} holds no anchor; expected one of the last {max_age_s / 3600:g} hours")
        newest = max(self.anchors, key=lambda anchor: anchor.at)
        if now_us - newest.at > max_age_s * 1e6:
            raise ValueError(
                f"the newest anchor in {self.path} is of {newest.time}; expected one of the last "
                f"{max_age_s / 3600:g} hours: lines were cut off, or no run has verified the chain since"
            )

    def check_entry(self, entry: Mapping[str, Any]) -> None:
        """Compares an entry of the chain with the anchor that there may be of it.

        Raises:
            ValueError: it is another entry.
        """
        anchor = self._hashes.get(entry["id"])
        if anchor is not None and anchor.hash != entry["hash"]:
            raise ValueError(
                f"audit entry {anchor.id} is not the one that was anchored at {anchor.time}: entries up to it were "
                f"written anew, or {self.path} is of another store"
            )

    def check_length(self, length: int) -> None:
        """Compares the length of the chain with the anchors.

        Raises:
            ValueError: the chain was longer.
        """
        last = max(self._hashes.values(), default=None)
        if last is not None and last.id > length:
            raise ValueError(
                f"audit entry {length + 1} is missing: the chain ends at entry {length}, and entry {last.id} was "
                f"anchored at {last.time}: entries were cut off, or {self.path} is of another store"
            )

    def append(self, chain: ChainCheck, now_us: int) -> Anchor:
        """Adds the head of a checked chain of at least one entry; on disk when this returns.

        Raises:
            ValueError: the file cannot be written.
        """
        anchor = Anchor(chain.length, chain.head, now_us)
        line = anchor._asdict()
        if self._key is not None:
            line["hmac"] = _signature(self._key, anchor)
        data = json.dumps(line).encode() + b"\n"
        try:
            if self.torn:
                os.ftruncate(self._descriptor, self._whole_bytes)
            if os.write(self._descriptor, data) < len(data):
                raise OSError("the disk is full")
            os.fsync(self._descriptor)
            sync_folder(self.path.parent)
        except OSError as error:
            raise ValueError(f"anchor = {str(self.path)!r} cannot be written: {error.strerror or error}") from error
        return anchor

    def _line(self, number: int) -> str:
        return f"{self.path}, line {number}"

    def _parsed(self, number: int, line: bytes) -> Anchor:
        try:
            values = json.loads(line)
            anchor = Anchor(values["id"], values["hash"], values["at"])
            if not all(isinstance(value, kind) for value, kind in zip(anchor, (int, str, int), strict=True)):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{self._line(number)} is no anchor: expected JSON with id, hash and at") from None
        signature = values.get("hmac")
        if self._key is None and signature is not None:
            raise ValueError(f"{self._line(number)} is signed; {KEY_VARIABLE} is not in the environment")
        if self._key is not None and not hmac.compare_digest(
            str(signature).encode(), _signature(self._key, anchor).encode()
        ):
            raise ValueError(
                f"{self._line(number)} is not signed with this {KEY_VARIABLE}: it was changed, or written with another "
                "key or none, which needs a file of its own"
            )
        return anchor


@contextmanager
def open_anchors(path: Path, key: bytes | None) -> Iterator[AnchorFile]:
    """Reads the anchors, and holds their file against other processes and threads until the block ends.

    Raises:
        ValueError: the file cannot be read or made, or holds something else, or a line's signature does not fit.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise ValueError(f"anchor = {str(path)!r} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield AnchorFile(path, descriptor, key)
    finally:
        os.close(descriptor)


def _signature(key: bytes, anchor: Anchor) -> str:
    return hmac.new(key, json.dumps(["audit anchor", *anchor]).encode(), hashlib.sha256).hexdigest()
