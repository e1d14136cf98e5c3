"""Removes erased patients from exports and data sets; without a patient: all whose erasure is still pending there.

`--patient-id ID --actor WHO` (or `--patient-hmac`) erases a patient first, as DELETE /v1/patients/{id} does: records,
pictures, and this machine's spool. Exports are written again without the patient's rows; a data set that holds some
gets a new version, and the old one is deleted. Models are not trained again: the result names those that have learned
from a version. Interrupted, it is run again. It ends with exit code 2 while something cannot be reached.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from data_pipelines.dataset_erasure import (
    ErasedPatients,
    find_versions,
    is_version,
    move_latest,
    operator_images,
    remove_version,
    rewrite_version,
    version_facts,
)
from monitoring.prediction_export import PredictionParquet, count_file_rows, holds_patients, without_patients
from monitoring.prediction_log import patient_hmac
from ray_jobs.job import JobConfig, Location, run_job, say
from store.database import Store, StoreUnavailableError, open_store
from store.erasure import PatientErasure
from store.erasure_reach import (
    BUILDING,
    PendingDataset,
    abandon_dataset,
    clear_dataset,
    delete_dataset,
    lineage_of_patients,
    mark_new_datasets,
    models_of_dataset,
    note_found_dataset,
    pending_copies,
    pending_datasets,
    replace_dataset,
)
from store.exports import (
    ExportClaim,
    LostExportError,
    Written,
    find_export,
    finish_erasure,
    pending_exports,
    take_over_export,
)
from store.image_files import ImageFiles
from store.replaced_file import ReplacedFile
from store.spool import Spool
from store.tables import now_us


class ErasePatientConfig(JobConfig):
    patient_id: str | None = Field(None, min_length=1, description="erase this patient first; needs --actor")
    patient_hmac: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="the same, by pseudonym")
    actor: str | None = Field(None, min_length=1, max_length=255, description="who does it, for the audit trail")
    datasets: list[Location] = Field(
        default_factory=lambda: ["datasets"], description="folders of data sets to search, registered or not"
    )
    patient_key_file: Location = Field("secrets/patient_hmac.key", description="the service's")
    store_url: Location = "sqlite:///store.db"
    images_url: Location = "images"
    spool_dir: Location = "spool"

    @model_validator(mode="after")
    def _one_patient_and_who_asks(self) -> ErasePatientConfig:
        if self.patient_id is not None and self.patient_hmac is not None:
            raise ValueError("patient_id and patient_hmac are both given; expected one")
        if self.starts_erasure and self.actor is None:
            raise ValueError("actor is missing; an erasure needs the name of who does it")
        return self

    @property
    def starts_erasure(self) -> bool:
        return self.patient_id is not None or self.patient_hmac is not None


class CopyErasure:
    """Removes pending patients from exports and data sets, one copy after the other.

    Attributes:
        exports, datasets: what became of each copy that was looked through.
        models: versions of models that have learned from a data set that held an erased patient.
        operator_files: files that data sets were made from, which are not ours to change.
        unreachable: copies whose place cannot be read or written, with the reason.
    """

    def __init__(self, store: Store, key: bytes, actor: str):
        self._store, self._key, self._actor = store, key, actor
        self.exports: list[dict[str, Any]] = []
        self.datasets: list[dict[str, Any]] = []
        self.models: list[str] = []
        self.operator_files: list[str] = []
        self.unreachable: list[str] = []

    def find_versions(self, folders: list[str]) -> None:
        """Registers versions that were made without the store."""
        for folder in map(Path, folders):
            if not folder.is_dir():
                continue
            inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
            for path in dict.fromkeys(found for place in (folder, *inner) for found in find_versions(place)):
                try:
                    facts = version_facts(path)
                except ValueError as error:
                    self.unreachable.append(str(error))
                    continue
                made_at = (path / "dataset.json").stat().st_mtime_ns // 1000
                note_found_dataset(self._store, facts["digest"], str(path.resolve()), made_at, facts["num_rows"])

    def finish(self) -> None:
        """Looks through every pending copy once."""
        for row_id in pending_exports(self._store):
            self._export(row_id)
        mark_new_datasets(self._store)
        done: set[str] = set()
        # A version that takes another's place may itself hold someone who was erased meanwhile.
        while waiting := [pending for pending in pending_datasets(self._store) if pending.digest not in done]:
            for pending in waiting:
                done.add(pending.digest)
                try:
                    self._dataset(pending)
                except (OSError, ValueError) as error:
                    self.unreachable.append(f"data set {pending.path}: {error}")

    def _export(self, row_id: str) -> None:
        claim, patients = take_over_export(self._store, row_id)
        file = ReplacedFile(claim.path)
        try:
            if not file.exists() and not file.reachable():
                raise OSError("its folder is not there; mount it, or make it empty where the file is gone for good")
            # An attempt that was cut off holds rows too.
            file.discard_all()
            removed = self._rewrite_export(file, claim, patients)
        except (OSError, ValueError, LostExportError) as error:
            self.unreachable.append(f"export {claim.path}: {error}")
            return
        self.exports.append({"path": claim.path, "removed_rows": removed})
        say(f"export {claim.path}: {'the file is gone' if removed is None else f'{removed} rows removed'}")

    def _rewrite_export(self, file: ReplacedFile, claim: ExportClaim, patients: frozenset[str]) -> int | None:
        """Rows removed; None where there is no file."""
        finish = partial(finish_erasure, self._store, claim, patients, self._actor)
        if not file.exists():
            finish(exists=False)
            return None
        with file.open() as source:
            held = holds_patients(source, patients)
        if not held:
            return self._note_clean_export(file, claim, finish)
        temporary, removed = uuid.uuid4().hex, 0
        try:
            with file.open() as source, file.writing(temporary) as sink, PredictionParquet(sink) as parquet:
                for table, num_lost in without_patients(source, patients):
                    parquet.append(table)
                    removed += num_lost
            written = Written(parquet.num_rows, sink.sha256())
            finish(removed_rows=removed, written=written, move=partial(file.move, temporary))
        finally:
            file.discard(temporary)
        return removed

    def _note_clean_export(self, file: ReplacedFile, claim: ExportClaim, finish: Callable[..., None]) -> int:
        """Ends the erasure of a file that holds none of the patients; returns how many rows it has lost.

        It may be the work of a run that was killed when its file was in place and the store did not know of it yet.
        """
        row = find_export(self._store, claim.id)
        known = None if row is None else row["detail"].get("sha256")
        with file.open() as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        if row is None or known in (None, digest):
            finish()
            return 0
        with file.open() as source:
            written = Written(count_file_rows(source), digest)
        removed = max(0, row["num_rows"] - written.num_rows)
        finish(removed_rows=removed, written=written)
        return removed

    def _dataset(self, pending: PendingDataset) -> None:
        folder = Path(pending.path)
        if pending.state == BUILDING:
            # Its builder fails when it finishes; what it wrote between the two goes as well.
            self._remove(folder)
            abandon_dataset(self._store, pending, self._actor, now_us())
            self._remove(folder)
            self._say(pending, None, 0, "was being built: given up; make it again")
            return
        if pending.replaced_by is not None:
            self._delete(pending, folder, pending.replaced_by, 0)
            return
        if not is_version(folder):
            if not folder.parent.is_dir():
                raise OSError("its folder is not there; mount it, or make the folder above where it is gone for good")
            # Its last row went, and only the note that its files are gone was missing; or someone removed it.
            self._delete(pending, folder, None, 0)
            return
        gone, stored = lineage_of_patients(self._store, pending.digest, pending.patients)
        pseudonym = partial(patient_hmac, key=self._key)
        result = rewrite_version(folder, ErasedPatients(pending.patients, pseudonym, gone, stored))
        if result is None:
            clear_dataset(self._store, pending)
            self.datasets.append({"path": pending.path, "removed_rows": 0})
            return
        images = operator_images(folder) if result.from_operator else None
        if images is not None and images not in self.operator_files:
            self.operator_files.append(images)
        if result.folder is not None:
            replace_dataset(self._store, pending, result.digest, str(result.folder.resolve()), result.num_rows)
        self._delete(pending, folder, result.digest, result.removed_rows)

    def _remove(self, folder: Path) -> None:
        if folder.parent.is_dir():
            remove_version(folder)

    def _delete(self, pending: PendingDataset, folder: Path, replaced_by: str | None, removed_rows: int) -> None:
        new = None if replaced_by is None else folder.parent / replaced_by[:12]
        if folder.parent.is_dir():
            move_latest(folder, new)
        self._remove(folder)
        models = models_of_dataset(self._store, pending.digest)
        delete_dataset(self._store, pending, replaced_by, models, self._actor, now_us())
        self.models += [model for model in models if model not in self.models]
        self._say(
            pending, new, removed_rows, f"deleted; its new version is {new}" if new else "deleted; nothing is left"
        )

    def _say(self, pending: PendingDataset, new: Path | None, removed_rows: int, what: str) -> None:
        entry = {"path": pending.path, "removed_rows": removed_rows, "new_version": None if new is None else str(new)}
        self.datasets.append(entry)
        say(f"data set {pending.path} {what}")


def _read_key(path: Path) -> bytes:
    try:
        key = path.read_bytes()
    except OSError as error:
        raise ValueError(f"patient_key_file {path}: {error.strerror}; expected the service's") from error
    if not key:
        raise ValueError(f"patient_key_file {path} is empty; expected a secret")
    return key


def run(config: ErasePatientConfig) -> dict[str, Any]:
    """Erases the patient, if one is given, and finishes all that is pending."""
    key = _read_key(Path(config.patient_key_file))
    try:
        store = open_store(config.store_url, create=False)
        actor = config.actor or "erase_patient"
        copies = CopyErasure(store, key, actor)
        # Before the erasure, which notes the patient on every version that is known.
        copies.find_versions(config.datasets)
        erased: dict[str, Any] = {}
        if config.starts_erasure:
            pseudonym = config.patient_hmac or patient_hmac(config.patient_id, key)
            erasure = PatientErasure(store, ImageFiles(config.images_url), Spool(config.spool_dir))
            done = erasure.erase(pseudonym, actor)
            erased = {"counts": done.counts, "image_files": done.image_files, "log_emptied": done.log_emptied}
        copies.finish()
        pending = pending_copies(store)
    except StoreUnavailableError as error:
        raise ValueError(f"store_url: {error}; run it again") from error
    for path in copies.operator_files:
        say(f"{path} is the operator's file: remove the patient's pictures there, and their rows from its CSV")
    if copies.models:
        say(f"models that have learned from a deleted version: {', '.join(copies.models)}; they are not trained again")
    if copies.unreachable:
        raise ValueError(f"the erasure is not finished: {'; '.join(copies.unreachable)}")
    return {
        **erased,
        "exports": copies.exports,
        "datasets": copies.datasets,
        "models": copies.models,
        "operator_files": copies.operator_files,
        "pending": pending,
    }


if __name__ == "__main__":
    run_job("erase_patient", ErasePatientConfig, run, __doc__)
