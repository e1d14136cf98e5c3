"""Writes the predictions of any window, with their labels, to one Parquet file: `--start 2026-11-01 --end 2026-11-30`.

Days are UTC and both ends are included; without dates: yesterday. With times instead of dates, from --start up to
--end. Patients are pseudonyms. The file is recorded in the store first, so that an erasure reaches it: do not copy it
elsewhere. Running it again writes the same file; one that was cut off is written anew.
"""

from __future__ import annotations

import uuid
from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator

from data_pipelines.progress import Progress
from monitoring.prediction_export import PredictionParquet, count_rows, export_tables, without_patients
from ray_jobs.check_drift import Moment, windows
from ray_jobs.job import JobConfig, Location, run_job, say
from store.database import Store, StoreUnavailableError, open_store
from store.exports import LostExportError, Written, begin_export, publish_export
from store.replaced_file import ReplacedFile

_ROLES = {"champion": ["champion"], "shadow": ["shadow"], "both": ["champion", "shadow"]}


class ExportPredictionsConfig(JobConfig):
    start: Moment = Field(None, description="first day, or the window's begin; default: yesterday")
    end: Moment = Field(None, description="last day (included), or the window's end (not included)")
    role: Literal["champion", "shadow", "both"] = "champion"
    out: Location = Field("exports", description="folder or URL of the files")
    actor: str = Field("export_predictions", min_length=1, max_length=255, description="who exports, for the audit")
    store_url: Location = "sqlite:///store.db"

    @model_validator(mode="after")
    def _window_exists(self) -> ExportPredictionsConfig:
        windows(self.start, self.end)
        return self


def write_export(
    store: Store, file: ReplacedFile, window: tuple[int, int], roles: list[str], actor: str
) -> tuple[Written, int]:
    """Writes one export and publishes it; returns what was written and its size in bytes.

    Raises:
        LostExportError: another run or an erasure has taken the file over.
        OSError: the place cannot be written.
    """
    claim = begin_export(store, file.url, *window)
    file.discard_all()
    total = count_rows(store, *window, roles)
    temporary = uuid.uuid4().hex
    with file.writing(temporary) as sink, Progress("export", say) as progress, PredictionParquet(sink) as parquet:
        for table in export_tables(store, *window, roles):
            parquet.append(table)
            progress(parquet.num_rows, total)
    facts = {"window_start": window[0], "window_end": window[1], "roles": roles}
    cleaned: frozenset[str] = frozenset()
    try:
        while True:
            written, num_bytes = Written(parquet.num_rows, sink.sha256()), sink.num_bytes
            place = partial(file.move, temporary)
            pending = publish_export(store, claim, window, written, cleaned, file.exists, place, actor, facts)
            if pending is None:
                return written, num_bytes
            say(f"patients were erased meanwhile ({len(pending)}): writing the file without them")
            old, temporary, cleaned = temporary, uuid.uuid4().hex, cleaned | pending
            try:
                with file.open_temporary(old) as source, file.writing(temporary) as sink:
                    with PredictionParquet(sink) as parquet:
                        for table, _ in without_patients(source, cleaned):
                            parquet.append(table)
            finally:
                file.discard(old)
    finally:
        file.discard(temporary)


def run(config: ExportPredictionsConfig) -> dict[str, Any]:
    asked = windows(config.start, config.end)
    name = asked[0].name if len(asked) == 1 else f"{asked[0].name}--{asked[-1].name}"
    url = f"{config.out.rstrip('/')}/predictions-{config.role}-{name}.parquet"
    try:
        store = open_store(config.store_url, create=False)
        written, num_bytes = write_export(
            store,
            ReplacedFile(url),
            (asked[0].start_us, asked[-1].end_us),
            _ROLES[config.role],
            config.actor,
        )
    except StoreUnavailableError as error:
        raise ValueError(f"store_url: {error}") from error
    except LostExportError as error:
        raise ValueError(str(error)) from error
    except OSError as error:
        raise ValueError(f"out {config.out}: {error}") from error
    return {"path": url, "rows": written.num_rows, "bytes": num_bytes, "sha256": written.sha256}


if __name__ == "__main__":
    run_job("export_predictions", ExportPredictionsConfig, run, __doc__)
