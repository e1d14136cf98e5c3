"""How often unchanged days raise an alarm, at the settings that `check_drift` ships with.

    python -m benchmarks.drift_false_alarms [--windows 200] [--rows 600] [--reference-rows 3000]

A log without any change: each day so many lesions, of patients with four each, at twelve institutions with six devices;
half of every figure's variance lies between patients. Each day is judged as the job does it, on rows read from the
store, against a reference of its own: with one for all days, that one's deviations would be counted again each day.
Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections import Counter
from typing import Any

from benchmarks.drift import DAY, benchmark_task, fill, reference_frame, task_columns

_DAY_US = 86_400_000_000


def judge_day(url: str, day: int, reference_rows: int, settings: dict[str, Any]) -> tuple[int, list[str], int]:
    """One day's drifted names and how many of its institutions and devices were judged."""
    from monitoring.drift_columns import read_columns, read_trailing, reference_columns
    from monitoring.drift_report import DriftSettings, judge_window
    from store.database import open_store
    from store.prediction_windows import was_seen

    columns = task_columns()
    task, given = benchmark_task(columns), DriftSettings(**settings)
    start = int(DAY.timestamp()) * 1_000_000 + day * _DAY_US
    store = open_store(url)
    current = read_columns(store, task, start, start + _DAY_US).columns
    trailing = read_trailing(store, task, start, given.trailing_days, given.max_trailing_rows)
    begin = start - given.trailing_days * _DAY_US
    reference = reference_columns(reference_frame(reference_rows, 10_000 + day, columns), task)
    verdict, _ = judge_window(
        reference, current, task, given, trailing, lambda column, value: was_seen(store, column, value, begin, start)
    )
    store.close()
    judged = sum(segment.baseline is not None for segment in verdict.segments)
    return day, verdict.drifted, judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=200, help="days that are judged")
    parser.add_argument("--rows", type=int, default=600, help="predictions a day")
    parser.add_argument("--reference-rows", type=int, default=3_000)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()

    from monitoring.drift_report import DriftSettings

    settings = DriftSettings()
    started, alarms, judged = time.monotonic(), {}, []
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/store.db"
        days = settings.trailing_days + arguments.windows
        start = int(DAY.timestamp()) * 1_000_000 - settings.trailing_days * _DAY_US
        fill(url, days * arguments.rows, start, days * _DAY_US, 3, task_columns())
        with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
            given = settings.model_dump()
            waiting = [
                pool.apply_async(judge_day, (url, day, arguments.reference_rows, given))
                for day in range(arguments.windows)
            ]
            for done, result in enumerate(waiting, 1):
                day, drifted, num_judged = result.get()
                judged.append(num_judged)
                if drifted:
                    alarms[day] = drifted
                if done % 10 == 0 or drifted:
                    print(f"{done} of {arguments.windows} days, {len(alarms)} alarms {drifted or ''}", flush=True)
    answer = {
        "windows": arguments.windows,
        "rows": arguments.rows,
        "false_alarm_rate": settings.false_alarm_rate,
        "alarms": len(alarms),
        "places_judged": sum(judged) / len(judged),
        "drifted": dict(Counter(name for names in alarms.values() for name in names)),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
