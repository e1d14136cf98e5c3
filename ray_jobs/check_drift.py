"""Compares the prediction log with the model's reference: one window per day, a report each, alarms once each.

Days are UTC, the service's clock decides, both ends are included. Without dates: yesterday, and of the --backfill days
up to then every one that was missed or whose rows or labels have changed. With times instead of dates, one window from
--start up to --end. Running a window again changes nothing, unless more predictions or labels came in.
`evidently ui --workspace OUT/workspace --port 8001` shows the history.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PlainValidator, model_validator

from modeling.bundle import Bundle, load_bundle
from monitoring.alarm_channels import JobAlarmSettings
from monitoring.alarm_delivery import AlarmDelivery
from monitoring.drift_check import Window, check_window
from monitoring.drift_report import DriftSettings
from monitoring.model_quality import QualitySettings, window_quality
from ray_jobs.job import JobConfig, Location, run_job, say
from store.database import Store, StoreUnavailableError, open_store
from store.prediction_windows import first_received, model_versions

MAX_WINDOWS = 3660
ALL = "all"


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


class CheckDriftConfig(JobConfig):
    start: Moment = Field(None, description="first day, or the window's begin; default: yesterday, and --backfill")
    end: Moment = Field(None, description="last day (included), or the window's end (not included)")
    backfill: int = Field(
        7, ge=1, le=MAX_WINDOWS, description="without dates: days up to yesterday that are made up for where missed"
    )
    model: str = Field(
        "champion", description="registry alias or version whose predictions are checked; all: each that answered"
    )
    bundle: Location | None = Field(None, description="a bundle's folder instead: checks every prediction against it")
    out: Location = Field("drift", description="folder of the reports")
    settings: DriftSettings = Field(default_factory=DriftSettings)
    quality: QualitySettings = Field(default_factory=QualitySettings)
    alarms: JobAlarmSettings = Field(default_factory=JobAlarmSettings, description="where alarms are sent")
    store_url: Location = "sqlite:///store.db"
    tracking_uri: Location = "sqlite:///mlflow.db"
    artifact_root: Location = "mlflow-artifacts"
    model_name: str = "dermray"

    @model_validator(mode="after")
    def _windows_exist(self) -> CheckDriftConfig:
        windows(self.start, self.end)
        return self


def windows(start: date | datetime | None, end: date | datetime | None) -> list[Window]:
    """The windows of a range of days, or the one between two times; yesterday's without either.

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


def windows_to_backfill(store: Store, days: int) -> list[Window]:
    """Yesterday, and before it as many of the `days` as the log has existed."""
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    first = first_received(store)
    oldest = yesterday if first is None else (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=first)).date()
    start = max(min(oldest, yesterday), yesterday - timedelta(days=days - 1))
    return windows(start, yesterday)


@dataclass
class _Models:
    """The models to check, opened once each."""

    config: CheckDriftConfig

    def __post_init__(self) -> None:
        self._opened: dict[str, tuple[Bundle, str | None]] = {}

    def of(self, store: Store, window: Window) -> dict[str, int]:
        """Aliases or versions to check in a window, with their rows where known: those that answered there, the
        champion where none did."""
        if self.config.model != ALL or self.config.bundle is not None:
            return {self.config.model: 0}
        return model_versions(store, window.start_us, window.end_us) or {"champion": 0}

    def open(self, model: str) -> tuple[Bundle, str | None]:
        """The bundle and its version; None as version: every prediction counts.

        Raises:
            ValueError: not registered, or its files are not those that were registered.
        """
        if model not in self._opened:
            self._opened[model] = _open_bundle(self.config, model)
        return self._opened[model]


def _open_bundle(config: CheckDriftConfig, model: str) -> tuple[Bundle, str | None]:
    if config.bundle is not None:
        return load_bundle(config.bundle), None
    from modeling.registry import Registry

    version = Registry(config.tracking_uri, config.model_name, config.artifact_root).resolve(model)
    return load_bundle(version.uri, version.digest), version.version


def _check(config: CheckDriftConfig, store: Store, models: _Models, window: Window) -> list[dict[str, Any]]:
    """The results of one window, one per model."""
    results = []
    for model, num_rows in models.of(store, window).items():
        try:
            bundle, version = models.open(model)
        except ValueError as error:
            # A model that was removed from the registry hides no other's drift.
            if config.model != ALL or model == "champion":
                raise
            say(f"{window.name}: predictions of model {model} are not checked: {error}")
            skipped = {"day": window.name, "model_version": model, "rows": num_rows, "status": "no_reference"}
            results.append({**skipped, "alarm": False, "drifted": [], "report": None, "html": None})
            continue
        results.append(
            check_window(
                store,
                bundle,
                version,
                window,
                Path(config.out),
                config.settings,
                say,
                partial(window_quality, settings=config.quality),
                config.alarms.cool_down_h,
            )
        )
    return results


def run(config: CheckDriftConfig) -> dict[str, Any]:
    if "://" in config.out:
        raise ValueError(f"out = {config.out!r}: expected a folder")
    models = _Models(config)
    version = None if config.model == ALL and config.bundle is None else models.open(config.model)[1]
    try:
        store = open_store(config.store_url, create=False)
        dated = config.start is not None or config.end is not None
        days = windows(config.start, config.end) if dated else windows_to_backfill(store, config.backfill)
        results = [result for window in days for result in _check(config, store, models, window)]
        # Also what a service that does not run left, or a check that was killed here.
        deliveries = AlarmDelivery(store, config.alarms).deliver_for(config.alarms.deliver_for_s)
    except StoreUnavailableError as error:
        raise ValueError(str(error)) from error
    unknown = sorted({result["model_version"] for result in results if result["status"] == "no_reference"})
    if all(result["status"] == "no_reference" for result in results):
        raise ValueError(f"nothing was checked: no reference of the models that answered, {', '.join(unknown)}")
    return {
        "model_version": version,
        "alarm": any(result["alarm"] for result in results),
        "drifted": list(dict.fromkeys(name for result in results for name in result["drifted"])),
        "html": results[-1]["html"],
        "alarms_delivered": dict(deliveries),
        "windows": results,
    }


if __name__ == "__main__":
    run_job("check_drift", CheckDriftConfig, run, __doc__)
