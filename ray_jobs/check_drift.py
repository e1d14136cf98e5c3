"""Compares the prediction log with the model's reference: one window per day, a report each, alarms once each.

Days are UTC, the service's clock decides, both ends are included; without dates: yesterday. With times instead of
dates, one window from --start up to --end. Running a window again changes nothing, unless more predictions came in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PlainValidator, model_validator

from modeling.bundle import Bundle, load_bundle
from monitoring.alarm_channels import JobAlarmSettings
from monitoring.alarm_delivery import AlarmDelivery
from monitoring.alarms import drift_alarm, raise_alarm
from monitoring.drift_report import STATISTICS_VERSION, DriftSettings, WindowDrift, judge_window, write_json
from monitoring.prediction_log import read_window
from ray_jobs.job import JobConfig, Location, run_job, say
from store.alarm_topics import COOL_DOWN_H
from store.database import Store, StoreUnavailableError, open_store

MAX_WINDOWS = 3660
REPORT, HTML, EVIDENTLY = "drift.json", "evidently.html", "evidently.json"


def _moment(value: Any) -> date | datetime | None:
    """A date, or a time (UTC unless it says otherwise), from YAML or a flag."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = date.fromisoformat(value) if len(value) <= 10 else datetime.fromisoformat(value)
        except ValueError:
            pass
    if isinstance(value, datetime):
        return value.astimezone(UTC) if value.tzinfo is not None else value.replace(tzinfo=UTC)
    if isinstance(value, date):
        return value
    raise ValueError("expected a date such as 2026-11-21 or a time such as 2026-11-21T08:00:00Z")


Moment = Annotated[date | datetime | None, PlainValidator(_moment)]


@dataclass(frozen=True)
class Window:
    """start_us <= received_at < end_us, microseconds UTC; `name` is also its folder."""

    name: str
    start_us: int
    end_us: int


class CheckDriftConfig(JobConfig):
    start: Moment = Field(None, description="first day, or the window's begin; default: yesterday")
    end: Moment = Field(None, description="last day (included), or the window's end (not included)")
    model: str = Field("champion", description="registry alias or version whose predictions are checked")
    bundle: Location | None = Field(None, description="a bundle's folder instead: checks every prediction against it")
    out: Location = Field("drift", description="folder of the reports")
    settings: DriftSettings = Field(default_factory=DriftSettings)
    alarms: JobAlarmSettings = Field(default_factory=JobAlarmSettings)
    store_url: Location = "sqlite:///store.db"
    tracking_uri: Location = "sqlite:///mlflow.db"
    artifact_root: Location = "mlflow-artifacts"
    model_name: str = "dermray"

    @model_validator(mode="after")
    def _windows_exist(self) -> CheckDriftConfig:
        windows(self.start, self.end)
        return self


def windows(start: date | datetime | None, end: date | datetime | None) -> list[Window]:
    """The windows of a range of days, or the one between two times.

    Raises:
        ValueError: a date and a time mixed, an end before the start, a start in the future, or too long a range.
    """
    now = datetime.now(UTC)
    start = start or (end if end is not None and not isinstance(end, datetime) else now.date() - timedelta(days=1))
    if isinstance(start, datetime) or isinstance(end, datetime):
        if not (isinstance(start, datetime) and isinstance(end, datetime)):
            raise ValueError(f"start = {start}, end = {end}: expected two dates or two times")
        if end <= start:
            raise ValueError(f"end = {end.isoformat()} is not after start = {start.isoformat()}")
        days = [(f"{start:%Y%m%dT%H%M%S.%fZ}-{end:%Y%m%dT%H%M%S.%fZ}", start, end)]
    else:
        last = end or start
        if last < start:
            raise ValueError(f"end = {last} lies before start = {start}")
        num = (last - start).days + 1
        if num > MAX_WINDOWS:
            raise ValueError(f"{start} to {last} are {num} days; at most {MAX_WINDOWS} at a time")
        midnights = [datetime(start.year, start.month, start.day, tzinfo=UTC) + timedelta(days=i) for i in range(num)]
        days = [(f"{midnight:%Y-%m-%d}", midnight, midnight + timedelta(days=1)) for midnight in midnights]
    if days[0][1] > now:
        raise ValueError(f"start = {start} lies in the future")
    return [Window(name, _microseconds(begin), _microseconds(finish)) for name, begin, finish in days]


def _microseconds(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _digest(ids: Iterator[str], reference: str, watermark: int, settings: DriftSettings) -> str:
    """Fingerprint of everything that a window's verdict depends on (rows of the log never change)."""
    head = json.dumps([STATISTICS_VERSION, reference, watermark, settings.model_dump()], sort_keys=True)
    digest = hashlib.sha256(head.encode())
    for row_id in ids:
        digest.update(b"\0" + row_id.encode())
    return digest.hexdigest()


def check_window(
    store: Store,
    bundle: Bundle,
    model_version: str | None,
    window: Window,
    out: Path,
    settings: DriftSettings,
    cool_down_h: float = COOL_DOWN_H,
) -> dict[str, Any]:
    """Judges one window, writes its reports, then its row, then its alarm; what is there already is left alone.

    Args:
        model_version: only its predictions count; None: all.
        cool_down_h: see `raise_alarm`.
    """
    current = read_window(store, window.start_us, window.end_us)
    others = 0
    if model_version is not None:
        others = int((current["model_version"] != model_version).sum())
        current = current[current["model_version"] == model_version].reset_index(drop=True)
    version = model_version or f"bundle:{bundle.digest[:12]}"
    watermark = store.label_watermark(window.start_us, window.end_us)
    input_digest = _digest(iter(current["id"]), bundle.digest, watermark, settings)
    folder = out / window.name / f"{model_version or 'bundle'}-{bundle.digest[:12]}"
    html = folder / HTML
    key = {
        "window_start": window.start_us,
        "window_end": window.end_us,
        "model_version": version,
        "reference": bundle.digest,
        "label_watermark": watermark,
    }
    stored = store.find_drift_report(key)
    if stored is not None and stored["input_digest"] == input_digest and _complete(folder, stored):
        verdict = WindowDrift.from_json(stored["statistics"])
        say(f"{window.name}: {verdict.status}, known already")
    else:
        verdict, features = judge_window(bundle.reference(), current, bundle.task, settings)
        if features:
            from monitoring.evidently_report import write_evidently_report

            write_evidently_report(
                features, verdict.features, html, folder / EVIDENTLY, settings.max_report_rows, settings.seed
            )
        content = {"window": window.name, **key, "rows_of_other_models": others, **verdict.to_json()}
        write_json(folder / REPORT, content)
        store.upsert_drift_report(
            {
                **key,
                "status": verdict.status,
                "num_rows": verdict.num_rows,
                "num_groups": verdict.num_groups,
                "alarm": verdict.alarm,
                "drifted": verdict.drifted,
                "statistics": verdict.to_json(),
                "input_digest": input_digest,
                "report": str(folder),
            }
        )
        what = f"drift in {', '.join(verdict.drifted)}" if verdict.alarm else verdict.status
        say(f"{window.name}: {verdict.num_rows} predictions of {verdict.num_groups} patients, {what}")
    if verdict.alarm:
        alarm = drift_alarm(window.name, window.start_us, window.end_us, version, bundle.digest, verdict)
        raise_alarm(store, alarm, cool_down_h)
    return {
        "day": window.name,
        "rows": verdict.num_rows,
        "rows_of_other_models": others,
        "status": verdict.status,
        "alarm": verdict.alarm,
        "drifted": verdict.drifted,
        "report": str(folder / REPORT),
        "html": str(html) if verdict.status != "insufficient" else None,
    }


def _complete(folder: Path, stored: dict[str, Any]) -> bool:
    names = [REPORT] if stored["status"] == "insufficient" else [REPORT, HTML, EVIDENTLY]
    return stored["report"] == str(folder) and all((folder / name).exists() for name in names)


def _open_bundle(config: CheckDriftConfig) -> tuple[Bundle, str | None]:
    if config.bundle is not None:
        return load_bundle(config.bundle), None
    from modeling.registry import Registry

    version = Registry(config.tracking_uri, config.model_name, config.artifact_root).resolve(config.model)
    return load_bundle(version.uri, version.digest), version.version


def run(config: CheckDriftConfig) -> dict[str, Any]:
    if "://" in config.out:
        raise ValueError(f"out = {config.out!r}: expected a folder")
    bundle, model_version = _open_bundle(config)
    try:
        store = open_store(config.store_url, create=False)
        results = [
            check_window(
                store, bundle, model_version, window, Path(config.out), config.settings, config.alarms.cool_down_h
            )
            for window in windows(config.start, config.end)
        ]
        # Also what a service that does not run left, or a check that was killed here.
        deliveries = AlarmDelivery(store, config.alarms).deliver_for(config.alarms.deliver_for_s)
    except StoreUnavailableError as error:
        raise ValueError(str(error)) from error
    return {
        "model_version": model_version,
        "alarm": any(result["alarm"] for result in results),
        "drifted": list(dict.fromkeys(name for result in results for name in result["drifted"])),
        "html": results[-1]["html"],
        "alarms_delivered": dict(deliveries),
        "windows": results,
    }


if __name__ == "__main__":
    run_job("check_drift", CheckDriftConfig, run, __doc__)
