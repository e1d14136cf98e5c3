"""Predictions kept in local files while the store does not answer, replayed once it does.

Every append is one file of its own, renamed into place after its bytes are on disk: writers need no lock, and a crash
leaves at worst a temporary file that nobody was promised.
"""

from __future__ import annotations

import base64
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from store.synced_files import folder_lock, sync_folder, write_synced

logger = logging.getLogger(__name__)

Write = Callable[[list[dict[str, Any]], dict[str, bytes]], None]


class Spool:
    """A folder of spooled batches, shared by any number of processes of one machine."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)

    def append(self, rows: Sequence[dict[str, Any]], images: Mapping[str, bytes]) -> Path:
        """Writes rows and their images (bytes by hash) to disk; they survive a power cut once this returns.

        Raises:
            OSError: the folder cannot be written.
        """
        if not self.directory.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            sync_folder(self.directory.parent)
        lines = [json.dumps({"image": name, "data": _text(data)}) for name, data in images.items()]
        lines += [json.dumps(_encode(row), allow_nan=False) for row in rows]
        # Names sort by time, so that replay keeps the order.
        path = self.directory / f"{time.time_ns():020d}-{uuid.uuid4().hex}.spool"
        write_synced(path, ("\n".join(lines) + "\n").encode())
        sync_folder(self.directory)
        return path

    def pending(self) -> int:
        """Number of batches that wait for replay."""
        return len(self._files())

    def damaged(self) -> int:
        """Number of batches that replay set aside because of lines that could not be read or rows that were refused."""
        return len(list(self.directory.glob("*.damaged")))

    def replay(self, write: Write) -> int:
        """Hands every batch, oldest first, to `write(rows, images)` and removes it after; returns the rows written.

        `write` must be idempotent: after a crash, or when two processes replay at once, it sees a batch again. What it
        raises ends the replay and leaves the batch, except ValueError, for a row that is wrong itself: a batch with
        such rows or with unreadable lines is kept as `*.damaged` after its other rows are written, and holds up no
        other.
        """
        written = 0
        for path in self._files():
            # An erasure that came between reading and writing would find the rows nowhere.
            with self.locked():
                written += _replay_file(path, write)
        return written

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps replay and erasure apart; appending needs no lock."""
        if not self.directory.exists():
            yield
            return
        with folder_lock(self.directory):
            yield

    def patient_rows(self, patient_hmac: str) -> tuple[int, set[str]]:
        """How many rows of a patient wait or were kept as damaged, and the hashes of their images."""
        erased = [_without_patient(path.read_bytes(), patient_hmac) for path in self._all_files()]
        return sum(item.num_rows for item in erased), {name for item in erased for name in item.image_hashes}

    def erase_patient(self, patient_hmac: str) -> None:
        """Rewrites the batches without a patient's rows and without the images that only these rows used.

        Call it under `locked`. Damaged batches and what an interrupted append left are searched too; there, an
        unreadable line is removed if it holds the pseudonym.

        Raises:
            OSError: a file cannot be read or written; call it again.
        """
        for path in self._all_files():
            data = path.read_bytes()
            kept = _without_patient(data, patient_hmac).kept
            if kept != data:
                if kept:
                    write_synced(path, kept)
                else:
                    path.unlink(missing_ok=True)
        for path in self.directory.glob(".*.tmp"):
            try:
                holds = patient_hmac.encode() in path.read_bytes()
            except FileNotFoundError:
                continue  # an append that ended meanwhile; its request came during the erasure
            if holds:
                path.unlink(missing_ok=True)
        if self.directory.exists():
            sync_folder(self.directory)

    def _all_files(self) -> list[Path]:
        return self._files() + sorted(self.directory.glob("*.damaged"))

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob("*.spool"))


def _replay_file(path: Path, write: Write) -> int:
    """Writes one batch and removes it, or keeps it as `*.damaged`; returns the rows written."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return 0  # another process replayed it
    rows, images, unreadable = _decode(content)
    refused = _write_all(write, rows, images)
    if unreadable or refused:
        logger.error("%s: %d lines unreadable, %d rows refused; kept as .damaged", path.name, unreadable, refused)
        path.replace(path.with_suffix(".damaged"))
    else:
        path.unlink(missing_ok=True)
    return len(rows) - refused


def _write_all(write: Write, rows: list[dict[str, Any]], images: dict[str, bytes]) -> int:
    """Writes a batch, one row at a time where it is refused as a whole; returns how many rows were refused."""
    try:
        write(rows, images)
        return 0
    except ValueError as error:
        if len(rows) <= 1:
            logger.error("a spooled row was refused: %s", error)
            return 1
    return sum(_write_all(write, [row], images) for row in rows)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _encode(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON, its bytes values apart as base64."""
    binary = {name: _text(value) for name, value in row.items() if isinstance(value, bytes)}
    return {"row": {name: value for name, value in row.items() if name not in binary}, "binary": binary}


def _decode(content: bytes) -> tuple[list[dict[str, Any]], dict[str, bytes], int]:
    """Rows, images and the number of lines that could not be read."""
    rows: list[dict[str, Any]] = []
    images: dict[str, bytes] = {}
    unreadable = 0
    for line in content.splitlines():
        try:
            entry = json.loads(line)
            if "image" in entry:
                images[entry["image"]] = base64.b64decode(entry["data"], validate=True)
            else:
                binary = {name: base64.b64decode(value, validate=True) for name, value in entry["binary"].items()}
                rows.append({**entry["row"], **binary})
        except (ValueError, KeyError, TypeError, AttributeError):
            unreadable += 1
    return rows, images, unreadable


class _Erased(NamedTuple):
    kept: bytes
    num_rows: int
    image_hashes: set[str]


def _without_patient(content: bytes, patient_hmac: str) -> _Erased:
    """A batch without a patient's lines: what is left, how many rows went, and the images that they named."""
    lines = content.splitlines(keepends=True)
    pseudonym = patient_hmac.encode()
    theirs, named, others = set(), set(), set()
    image_lines: dict[int, str] = {}
    unreadable = []
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            if "image" in entry:
                image_lines[number] = str(entry["image"])
                continue
            row = entry["row"]
            mine, image_hash = row.get("patient_hmac") == patient_hmac, row.get("image_hash")
        except (ValueError, KeyError, TypeError, AttributeError):
            unreadable.append(number)
            if pseudonym in line:
                theirs.add(number)
            continue
        if mine:
            theirs.add(number)
        if image_hash is not None:
            (named if mine else others).add(image_hash)
    num_rows = len(theirs)
    only_theirs = named - others
    theirs |= {number for number, name in image_lines.items() if name in only_theirs}
    theirs |= {number for number in unreadable if any(name.encode() in lines[number] for name in only_theirs)}
    kept = b"".join(line for number, line in enumerate(lines) if number not in theirs)
    return _Erased(kept, num_rows, named)
