"""Removes what is older than its retention: predictions with their labels, pictures, alarms, submissions and exports.

Nothing is removed unless the config says after how many days. `--dry-run` counts. What a living data set holds stays,
and labelled predictions with `keep_labelled`; drift reports and the audit trail stay always. Interrupted, it is run
again.
"""

from __future__ import annotations

import time
from typing import Any

from pydantic import Field

from ray_jobs.job import JobConfig, Location, run_job, say
from store.database import StoreUnavailableError, open_store
from store.erasure import empty_write_ahead_log
from store.exports import exports_before, remove_export
from store.image_files import ImageFiles
from store.prediction_windows import RETENTION
from store.replaced_file import ReplacedFile
from store.retention import Cutoffs, apply_retention, count_due
from store.tables import now_us

DAY_US = 86_400_000_000
_LINE_S = 5.0


class ApplyRetentionConfig(JobConfig):
    predictions_days: float | None = Field(None, ge=1, description="days that predictions are kept; null: for ever")
    images_days: float | None = Field(None, ge=1, description="days that pictures are kept, their records longer")
    alarms_days: float | None = Field(None, ge=1, description="days that acknowledged alarms are kept")
    submissions_days: float | None = Field(None, ge=1, description="days that finished submissions are kept")
    exports_days: float | None = Field(None, ge=1, description="days that files of export_predictions are kept")
    keep_labelled: bool = Field(True, description="labelled predictions stay, with their pictures")
    dry_run: bool = Field(False, description="count what is due, and remove nothing")
    actor: str = Field("apply_retention", min_length=1, max_length=255, description="who does it, for the audit trail")
    store_url: Location = "sqlite:///store.db"
    images_url: Location = "images"


def run(config: ApplyRetentionConfig) -> dict[str, Any]:
    now = now_us()

    def before(days: float | None) -> int | None:
        return None if days is None else now - round(days * DAY_US)

    cutoffs = Cutoffs(
        predictions=before(config.predictions_days),
        images=before(config.images_days),
        alarms=before(config.alarms_days),
        submissions=before(config.submissions_days),
        keep_labelled=config.keep_labelled,
    )
    try:
        store = open_store(config.store_url, create=False)
        due = count_due(store, cutoffs, now)
        files = [] if config.exports_days is None else exports_before(store, before(config.exports_days))
        if config.exports_days is not None:
            due["exports"] = len(files)
        for name, number in due.items():
            say(f"{name}: {number:,} due")
        if config.dry_run or not any(due.values()):
            if not config.dry_run:
                # A run that was killed once all was removed may have left deleted rows in it.
                empty_write_ahead_log(store)
            return {"dry_run": config.dry_run, "due": due, "removed": {}}
        # Before anything goes: a run that is killed has left its entry, and the next one counts what is left.
        days = {name: value for name, value in config.model_dump().items() if name.endswith("_days") and value}
        detail = {"due": due, **days, "keep_labelled": config.keep_labelled}
        store.append_audit(config.actor, RETENTION, "store", detail)
        last = time.monotonic()

        def progress(name: str, number: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_S:
                last = time.monotonic()
                say(f"{name}: {number:,} removed")

        removed = apply_retention(store, ImageFiles(config.images_url), cutoffs, now, progress)
        for row_id, path in files:
            file = ReplacedFile(path)
            if not file.exists() and not file.reachable():
                raise OSError(f"export {path}: its folder is not there")
            remove_export(store, row_id, file.discard_all, file.remove)
            removed["exports"] = removed.get("exports", 0) + 1
        empty_write_ahead_log(store)
    except StoreUnavailableError as error:
        raise ValueError(f"store_url: {error}; run it again") from error
    except OSError as error:
        raise ValueError(f"{error}; run it again") from error
    return {"dry_run": False, "due": due, "removed": removed}


if __name__ == "__main__":
    run_job("apply_retention", ApplyRetentionConfig, run, __doc__)
