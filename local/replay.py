"""Replays past traffic: the lesions of a data set as the requests of past days, and later what experts said of them.

python -m local.replay send --images F.hdf5 --metadata F.csv --start 2026-03-01 --days 30 --answers month.csv
python -m local.replay label --answers month.csv --metadata F.csv --delay-days 5 --until 2026-03-20

The service takes the requests' days from their header Replayed-At; deploy it with `--ingress.accept_replays true`.
Sending the same days again sends nothing twice: every request has a key of its own.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd

from data_pipelines.progress import Progress
from local.traffic import ATTEMPTS, Day, Lesion, metadata_fields, read_lesions, send_day
from serve.client import DermrayClient, DermrayError, RetryPolicy

# A clinic's day, UTC.
OPENS, CLOSES = timedelta(hours=8), timedelta(hours=18)
_COLUMNS = ("image_id", "prediction_id", "received_at", "risk", "band", "abstained")


@dataclass(frozen=True)
class Answer:
    """A line of the answers' file: which prediction a lesion of a day became."""

    image_id: str
    prediction_id: str
    received_at: datetime


def plan_days(lesions: Sequence[Lesion], start: date, days: int, device: str | None = None) -> list[list[Lesion]]:
    """Each day's lesions, each with the moment of its request and a key: every patient comes once, on one day.

    Patients are dealt to the days in an order that a hash of their ids gives, one after the other through the opening
    hours; a lesion without a patient counts as one of its own.

    Raises:
        ValueError: fewer patients than days.
    """
    patients: dict[str, list[Lesion]] = {}
    for lesion in lesions:
        patients.setdefault(lesion.origin.get("patient_id", lesion.image_id), []).append(lesion)
    if len(patients) < days:
        raise ValueError(f"{len(patients)} patients; expected at least one for each of {days} days")
    order = sorted(patients, key=lambda name: hashlib.sha256(name.encode()).digest())
    planned = []
    for index in range(days):
        day = start + timedelta(days=index)
        opens = datetime(day.year, day.month, day.day, tzinfo=UTC) + OPENS
        todays = [lesion for patient in order[index::days] for lesion in patients[patient]]
        step = (CLOSES - OPENS) / len(todays)
        planned.append([_at(lesion, opens + place * step, device) for place, lesion in enumerate(todays)])
    return planned


def _at(lesion: Lesion, moment: datetime, device: str | None) -> Lesion:
    time = moment.isoformat()
    key = hashlib.sha256(f"{lesion.image_id} {time} {device}".encode()).hexdigest()[:32]
    origin = {**lesion.origin, "acquired_at": time, "replayed_at": time, "idempotency_key": f"replay-{key}"}
    return replace(lesion, origin=origin | ({} if device is None else {"device": device}))


def send(url: str, planned: Sequence[Sequence[Lesion]], answers: Path, clients: int = 8) -> list[Day]:
    """Sends day after day, and adds each answered lesion to the answers' file, once.

    Raises:
        UnavailableError: the service cannot be reached; what was answered is in the file.
    """
    known = {answer.prediction_id for answer in read_answers(answers)} if answers.exists() else set()
    done = []
    with Progress("days", _say) as progress:
        for number, lesions in enumerate(planned, 1):
            rows: list[dict[str, Any]] = []
            lock = threading.Lock()

            def keep(lesion: Lesion, answer: Any, rows: list[dict[str, Any]] = rows, lock: Any = lock) -> None:
                line = answer.model_dump(include=set(_COLUMNS))
                line |= {"image_id": lesion.image_id, "received_at": lesion.origin["replayed_at"]}
                with lock:
                    rows.append(line)

            done.append(send_day(url, list(lesions), clients, on_answer=keep))
            _append(answers, sorted((row for row in rows if row["prediction_id"] not in known), key=_when))
            progress(number, len(planned))
    return done


def _when(row: dict[str, Any]) -> tuple[str, str]:
    return row["received_at"], row["image_id"]


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())


def read_answers(path: Path) -> list[Answer]:
    """The lines of an answers' file.

    Raises:
        ValueError: no such file, or not one of `send`.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                Answer(row["image_id"], row["prediction_id"], datetime.fromisoformat(row["received_at"]))
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"answers {path}: {error!r}; expected a file that `local.replay send` wrote") from error


def due_labels(
    answers: Sequence[Answer], classes: dict[str, str], delay_days: float, share: float, until: datetime
) -> Iterator[tuple[Answer, str, datetime]]:
    """Answers that were labelled by `until`, with their class and the moment of the label.

    Which lesions are labelled at all, and after how long (exponentially distributed, `delay_days` on average), follows
    from a hash of the prediction: a later `until` gives the same labels and more.
    """
    for answer in answers:
        digest = hashlib.sha256(answer.prediction_id.encode()).digest()
        chosen, wait = (int.from_bytes(digest[part : part + 6]) / 2**48 for part in (0, 6))
        moment = answer.received_at - timedelta(days=delay_days) * math.log1p(-wait)
        if answer.image_id in classes and chosen < share and moment <= until:
            yield answer, classes[answer.image_id], moment


def read_classes(metadata: Path, label_column: str, names: Sequence[str], id_column: str = "isic_id") -> dict[str, str]:
    """Class name by image id; a number in the label column counts through `names`, the service's classes.

    Raises:
        ValueError: no such column, or a label that is no class.
    """
    table = pd.read_csv(metadata, low_memory=False)
    for column in (id_column, label_column):
        if column not in table:
            raise ValueError(f"metadata file {metadata} has no column {column!r}")
    labelled = table.dropna(subset=[label_column])
    classes = {}
    for image_id, value in zip(labelled[id_column], labelled[label_column], strict=True):
        is_index = isinstance(value, int | float) and float(value).is_integer() and 0 <= value < len(names)
        name = names[int(value)] if is_index else str(value)
        if name not in names:
            raise ValueError(f"{label_column} of {image_id} is {value!r}; expected one of {', '.join(names)}")
        classes[image_id] = name
    return classes


def send_labels(
    url: str, labels: Sequence[tuple[Answer, str, datetime]], labeller: str, clients: int = 4
) -> Counter[str]:
    """Posts labels; one that was sent before is not stored again. Returns how many of each class were sent.

    Raises:
        DermrayError: the first that the service refuses, or that cannot be sent.
    """
    with DermrayClient(url, retries=RetryPolicy(attempts=ATTEMPTS), trust_env=False) as client:

        def post(item: tuple[Answer, str, datetime]) -> str:
            answer, name, moment = item
            client.label(answer.prediction_id, name, labeller=labeller, labelled_at=moment.isoformat())
            return name

        with ThreadPoolExecutor(clients) as pool:
            return Counter(pool.map(post, labels))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line's options; SystemExit for a wrong one, as argparse does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=8, help="requests at a time")
    verbs = parser.add_subparsers(dest="verb", required=True)
    sending = verbs.add_parser("send", help="a data set's lesions as requests of past days")
    sending.add_argument("--images", type=Path, required=True)
    sending.add_argument("--start", type=date.fromisoformat, required=True, help="first day")
    sending.add_argument("--days", type=int, default=1)
    sending.add_argument("--device", help="camera named in the requests")
    sending.add_argument("--limit", type=int, help="the first so many rows only")
    labelling = verbs.add_parser("label", help="experts' labels of what was sent")
    labelling.add_argument("--label-column", default="target")
    labelling.add_argument("--delay-days", type=float, default=5.0, help="from the answer to the label, on average")
    labelling.add_argument("--share", type=float, default=1.0, help="of the answers that are labelled at all")
    labelling.add_argument("--until", type=datetime.fromisoformat, help="labels of up to this time; default: now")
    labelling.add_argument("--labeller", default="replay")
    for verb in (sending, labelling):
        verb.add_argument("--metadata", type=Path, required=True)
        verb.add_argument("--id-column", default="isic_id")
        verb.add_argument("--answers", type=Path, required=True, help="CSV of what became of each lesion")
    return parser.parse_args(arguments)


def _send(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    fields = metadata_fields(options.url)
    lesions = list(read_lesions(options.images, options.metadata, fields, options.id_column, options.limit))
    days = send(
        options.url, plan_days(lesions, options.start, options.days, options.device), options.answers, options.clients
    )
    for problem in sorted({problem for day in days for problem in day.problems.values()})[:10]:
        _say(f"replay: {problem}")
    sent, answered = sum(day.sent for day in days), sum(day.answered for day in days)
    return {"days": len(days), "sent": sent, "answered": answered, "answers": str(options.answers)}, answered == sent


def _label(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    with DermrayClient(options.url, trust_env=False) as client:
        names = client.model().classes
    until = options.until or datetime.now(UTC)
    until = until if until.tzinfo is not None else until.replace(tzinfo=UTC)
    classes = read_classes(options.metadata, options.label_column, names, options.id_column)
    due = list(due_labels(read_answers(options.answers), classes, options.delay_days, options.share, until))
    return {"labels": dict(sorted(send_labels(options.url, due, options.labeller, options.clients).items()))}, True


def main(arguments: list[str] | None = None, show: Callable[[str], None] = print) -> int:
    """The exit status; `show` gets the result, one line of JSON."""
    options = parse_arguments(arguments)
    try:
        result, complete = _send(options) if options.verb == "send" else _label(options)
    except (DermrayError, ValueError, KeyError, OSError) as error:
        print(f"replay: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    show(json.dumps(result))
    return 0 if complete else 1


if __name__ == "__main__":
    raise SystemExit(main())
