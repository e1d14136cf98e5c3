"""Checks one window for one model: read, judge, model quality, reports, row, alarm; what is there already is kept.

Every step may be cut off and run again: files are replaced whole, the row is written after them and the alarm last.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.progress import Progress
from modeling.bundle import Bundle
from modeling.schema import CONTEXTS
from monitoring.alarms import drift_alarm, quality_alarm, raise_alarm
from monitoring.drift_columns import CLOCK_TOLERANCE_US, PLACES, Columns, read_columns, read_trailing, reference_columns
from monitoring.drift_report import STATISTICS_VERSION, DriftSettings, WindowDrift, judge_window, write_json
from monitoring.evidently_report import WorkspaceEntry
from store.alarm_topics import COOL_DOWN_H
from store.database import Store
from store.prediction_windows import WindowContent, count_received_after, was_seen, whole_since, window_content
from store.tables import now_us

if TYPE_CHECKING:
    import pandas as pd

REPORT, HTML, EVIDENTLY, WORKSPACE = "drift.json", "evidently.html", "evidently.json", "workspace"
_DAY_US = 86_400 * 1_000_000


@dataclass(frozen=True)
class Window:
    """start_us <= received_at < end_us, microseconds UTC; `name` is also its folder."""

    name: str
    start_us: int
    end_us: int


Quality = Callable[[Store, Bundle, str | None, Window], dict[str, Any]]
"""Model quality on the labels of a window's predictions: store, bundle, model version (None: of any) and window to
JSON-ready figures, kept under `quality` beside the drift statistics."""


def check_window(
    store: Store,
    bundle: Bundle,
    model_version: str | None,
    window: Window,
    out: Path,
    settings: DriftSettings,
    say: Callable[[str], None],
    quality: Quality | None = None,
    cool_down_h: float = COOL_DOWN_H,
) -> dict[str, Any]:
    """Judges one window, writes its reports, then its row, then its alarms; what is there already is left alone.

    A window is judged again when its rows, the reference or the settings changed; when only labels came, its drift is
    taken over and its quality measured. A window past retention keeps its report: the labelled rows that are left are
    not what a day consists of.

    Args:
        model_version: only its predictions count; None: all.
        say: prints one line of progress.
        quality: measured whenever the window's labels or rows have changed.
        cool_down_h: how long an alarm quiets those that say nothing new.

    Returns:
        The window's part of the job's answer, JSON-ready.
    """
    check = _Check(store, bundle, model_version, window, out, settings, say)
    content = window_content(store, window.start_us, window.end_us)
    digest = _digest(content, bundle.digest, settings)
    reports = check.stored_reports()
    stored = next((row for row in reports if row["label_watermark"] == check.key["label_watermark"]), None)
    judged = next((row for row in reports if row["input_digest"] == digest and check.complete(row)), None)
    if judged is None and any(row["num_rows"] for row in reports) and _past_retention(store, window, content):
        judged = stored = max(reports, key=lambda row: row["label_watermark"])
        say(f"{window.name}: its predictions are no longer all stored, the report of {judged['num_rows']} is kept")
    elif (
        stored is not None
        and stored["input_digest"] == digest
        and check.complete(stored)
        and check.current(stored, quality is not None)
    ):
        judged = stored
        say(f"{window.name}, model {check.key['model_version']}: {stored['status']}, known already")
    else:
        statistics = check.judge(content) if judged is None else dict(judged["statistics"])
        statistics.pop("quality", None)
        if quality is not None:
            statistics["quality"] = quality(store, bundle, model_version, window)
        judged = check.record(statistics, digest)
    verdict = WindowDrift.from_json(judged["statistics"])
    about = (window.name, window.start_us, window.end_us, judged["model_version"], bundle.digest)
    if verdict.alarm:
        raise_alarm(store, drift_alarm(*about, verdict), cool_down_h)
    problems = judged["statistics"].get("quality", {}).get("problems", [])
    if problems:
        raise_alarm(store, quality_alarm(*about, problems), cool_down_h)
    return {
        "day": window.name,
        "model_version": model_version,
        "rows": verdict.num_rows,
        "rows_of_other_models": judged["statistics"]["rows_of_other_models"],
        "status": verdict.status,
        "alarm": verdict.alarm,
        "drifted": verdict.drifted,
        "quality_problems": problems,
        "report": str(check.folder / REPORT),
        "html": str(check.folder / HTML) if verdict.status != "insufficient" else None,
    }


def _past_retention(store: Store, window: Window, content: WindowContent) -> bool:
    whole = whole_since(store)
    return content.num_rows == 0 or (whole is not None and window.start_us < whole)


class _Check:
    """One window and model: where its files lie, and the steps."""

    def __init__(
        self,
        store: Store,
        bundle: Bundle,
        model_version: str | None,
        window: Window,
        out: Path,
        settings: DriftSettings,
        say: Callable[[str], None],
    ):
        self.store, self.bundle, self.model_version, self.window = store, bundle, model_version, window
        self.settings, self.say = settings, say
        self.folder = out / window.name / f"{model_version or 'bundle'}-{bundle.digest[:12]}"
        version = model_version or f"bundle:{bundle.digest[:12]}"
        self.key = {
            "window_start": window.start_us,
            "window_end": window.end_us,
            "model_version": version,
            "reference": bundle.digest,
            "label_watermark": store.label_watermark(window.start_us, window.end_us),
        }
        start = datetime.fromtimestamp(window.start_us / 1e6, UTC)
        project = f"{bundle.manifest.name} {version} {bundle.digest[:12]}"
        self.entry = WorkspaceEntry(out / WORKSPACE, project, window.name, start)

    def stored_reports(self) -> list[dict[str, Any]]:
        """Rows of this window, model and reference, one per label watermark."""
        same = {name: value for name, value in self.key.items() if name != "label_watermark"}
        rows = self.store.drift_reports(self.window.start_us, self.window.end_us)
        return [row for row in rows if all(row[name] == value for name, value in same.items())]

    def complete(self, stored: dict[str, Any]) -> bool:
        """Whether all files of a stored verdict lie where this run would write them."""
        files = [self.folder / REPORT]
        if stored["status"] != "insufficient":
            files += [self.folder / HTML, self.folder / EVIDENTLY, self.entry.snapshot_file]
        return stored["report"] == str(self.folder) and all(file.exists() for file in files)

    def current(self, stored: dict[str, Any], with_quality: bool) -> bool:
        """Whether the report on disk is the one of this row, and not of another label watermark."""
        content = json.loads((self.folder / REPORT).read_text(encoding="utf-8"))
        same = content.get("label_watermark") == stored["label_watermark"]
        return same and (not with_quality or "quality" in stored["statistics"])

    def judge(self, content: WindowContent) -> dict[str, Any]:
        """Reads and judges the window and writes Evidently's report of it; returns the statistics, JSON-ready."""
        started = time.monotonic()
        window, settings, task = self.window, self.settings, self.bundle.task
        with Progress(f"{window.name}: reading predictions", self.say) as progress:
            rows = read_columns(
                self.store,
                task,
                window.start_us,
                window.end_us,
                self.model_version,
                lambda done: progress(done, max(content.num_rows, done)),
                content.num_rows,
            )
        read = time.monotonic()
        trailing, begin = None, window.start_us - settings.trailing_days * _DAY_US
        enough = len(rows.columns) >= settings.min_rows
        if enough and settings.max_segments and any((rows.columns.places[by].codes >= 0).any() for by in PLACES):
            trailing = read_trailing(
                self.store,
                task,
                window.start_us,
                settings.trailing_days,
                settings.max_trailing_rows,
                self.model_version,
            )
        reference = reference_columns(reference_table(self.bundle, rows.columns), task) if enough else None
        verdict, features = judge_window(
            rows.columns if reference is None else reference,
            rows.columns,
            task,
            settings,
            trailing,
            lambda column, value: was_seen(self.store, column, value, begin, window.start_us),
        )
        judged = time.monotonic()
        if features:
            from monitoring.evidently_report import write_evidently_report

            html, evidently = self.folder / HTML, self.folder / EVIDENTLY
            write_evidently_report(
                features, verdict.features, html, evidently, settings.max_report_rows, settings.seed, self.entry
            )
        what = f"drift in {', '.join(verdict.drifted)}" if verdict.alarm else verdict.status
        parts = f"read {read - started:.0f} s, judged {judged - read:.0f} s, report {time.monotonic() - judged:.0f} s"
        self.say(
            f"{window.name}: {verdict.num_rows} predictions of {verdict.num_groups} patients, {what}"
            + (f" ({parts})" if verdict.num_rows >= 100_000 else "")
        )
        others = sum(rows.rows_by_model.values()) - len(rows.columns)
        return {
            **verdict.to_json(),
            "rows_of_other_models": others,
            "clock_skew": {
                "tolerance_s": CLOCK_TOLERANCE_US // 1_000_000,
                # Of the whole log: a clock that ran ahead dates its rows into windows to come.
                "future_rows": count_received_after(self.store, now_us() + CLOCK_TOLERANCE_US),
                "acquired_after_received": rows.acquired_after_received,
            },
        }

    def record(self, statistics: dict[str, Any], digest: str) -> dict[str, Any]:
        """Writes drift.json, then the row; returns the row."""
        write_json(self.folder / REPORT, {"window": self.window.name, **self.key, **statistics})
        row = {
            **self.key,
            "status": statistics["status"],
            "num_rows": statistics["num_rows"],
            "num_groups": statistics["num_groups"],
            "alarm": statistics["status"] == "drift",
            "drifted": statistics["drifted"],
            "statistics": statistics,
            "input_digest": digest,
            "report": str(self.folder),
        }
        self.store.upsert_drift_report(row)
        return row


def reference_table(bundle: Bundle, current: Columns) -> pd.DataFrame:
    """The bundle's reference with the band of each risk that the window has, by the thresholds that are served."""
    table = bundle.reference()
    for context in CONTEXTS:
        name = f"risk_{context}"
        if name in table and name in current.numbers and context in bundle.manifest.contexts:
            thresholds = bundle.contexts[context].thresholds
            table[f"band_{context}"] = np.array([thresholds.band(risk) for risk in table[name]], dtype=object)
    return table


def _digest(content: WindowContent, reference: str, settings: DriftSettings) -> str:
    """Fingerprint of everything that a window's drift depends on; the trailing days are those of its first check."""
    parts = [STATISTICS_VERSION, reference, settings.model_dump(), *content]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
