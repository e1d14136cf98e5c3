"""What goes out to Label Studio and comes back, on the store's side of one ingress replica. Without Ray."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, BinaryIO, NamedTuple

from monitoring.prediction_log import PredictionLog
from serve.errors import ApiError, invalid_field, unavailable
from serve.label_tasks_zip import TasksTooLargeError, write_tasks
from serve.store_calls import StoreCalls
from store.database import Store
from store.label_files import LabelProblem, PlacedLabel, read_label_studio
from store.label_import import store_labels, unknown_prediction
from store.label_studio import Classes
from store.label_tasks import record_handout, select_label_tasks
from store.prediction_records import PredictionFilter, known_predictions
from store.shadow_records import is_shadow_id
from store.tables import now_us

MAX_TASKS = 200
MAX_DAYS = 3650
MAX_SEED = 2**31 - 1
# Of a Label Studio's export; 200 tasks that three people have annotated are 1 MB.
MAX_EXPORT_BYTES, MAX_ANNOTATIONS = 8 * 2**20, 5_000

_MAX_PICTURE_BYTES = 256 * 2**20
# As `export_label_tasks` has it.
_UNCERTAIN_SHARE = 0.5
_DAY_US = 86_400_000_000
# Labels of one call of the store: a slow disk syncs each one.
_CHUNK = 200
_TIMEOUT_S = 60.0

logger = logging.getLogger("ray.serve")


class TaskChoice(NamedTuple):
    """Which tasks are wanted; see `ExportLabelTasksConfig`.

    Attributes:
        days: of receipt, today among them, from midnight UTC on; None: all.
    """

    num_tasks: int
    days: int | None
    seed: int
    suggestion: bool

    def since(self) -> int | None:
        """The first moment of the first day, microseconds."""
        return None if self.days is None else (now_us() // _DAY_US - self.days + 1) * _DAY_US


class TasksFile(NamedTuple):
    """A ZIP of tasks, at its beginning: a file without a name, which is gone when it is closed."""

    name: str
    file: BinaryIO
    num_bytes: int


class CheckedLabels(NamedTuple):
    """What an export holds: labels that can be stored, oldest first, and the entries that give none.

    Attributes:
        gone: labels of predictions that are not in the log.
        skipped: tasks that their annotators skipped.
        problems: all others.
    """

    labels: list[PlacedLabel]
    gone: list[LabelProblem]
    skipped: list[LabelProblem]
    problems: list[LabelProblem]


class LabelExchange:
    """Makes tasks and stores labels, one at a time; others wait. Every method raises ApiError 503 while the store does
    not answer.

    Args:
        log: this node's log, whose spool may hold records that the store does not have yet.
        retry_after_s: what a 503 tells the client.
    """

    def __init__(self, log: PredictionLog, retry_after_s: int):
        self._log = log
        self._retry_after_s = retry_after_s
        self._call = StoreCalls(log, retry_after_s, "label exchange", threads=1, timeout_s=_TIMEOUT_S)

    async def tasks(self, choice: TaskChoice, task: Classes, actor: str) -> TasksFile:
        """Tasks of unlabelled predictions with their pictures, noted in the audit trail as handed out.

        Raises:
            ApiError: 422, there are none, or their pictures are too large together.
        """
        return await self._call(self._tasks, choice, task, actor)

    def _tasks(self, store: Store, choice: TaskChoice, task: Classes, actor: str) -> TasksFile:
        since = choice.since()
        wanted = PredictionFilter(from_us=since, labelled=False)
        chosen, available = select_label_tasks(store, wanted, choice.num_tasks, _UNCERTAIN_SHARE, choice.seed)
        while True:
            # On disk and without a name: whatever ends this request leaves nothing behind.
            file = tempfile.TemporaryFile()
            try:
                made = write_tasks(file, chosen, self._log.image_files.get, task, choice.suggestion, _MAX_PICTURE_BYTES)
                if not made.chosen:
                    where = "" if choice.days is None else f" of the last {choice.days} days"
                    raise invalid_field(f"days: there is no unlabelled lesion{where} whose picture is kept")
                detail = {
                    "num_tasks": len(made.chosen),
                    "uncertain": sum(item.selected_by == "uncertain" for item in made.chosen),
                    "available": available,
                    "since": None if since is None else datetime.fromtimestamp(since // 1_000_000, UTC).isoformat(),
                    "seed": choice.seed,
                    "suggestion": choice.suggestion,
                }
                gone = record_handout(store, made.name, [item.row["id"] for item in made.chosen], actor, detail)
            except TasksTooLargeError as error:
                file.close()
                raise invalid_field(f"tasks: {error}; expected fewer tasks than {len(chosen)}") from error
            except BaseException:
                file.close()
                raise
            if not gone:
                num_bytes = file.tell()
                file.seek(0)
                return TasksFile(made.name, file, num_bytes)
            # Their pictures were read before they were erased.
            file.close()
            chosen = [item for item in made.chosen if item.row["id"] not in gone]

    async def check(self, data: bytes, task: Classes, instance: str, names: Mapping[str, str]) -> CheckedLabels:
        """Reads an export of Label Studio; nothing is stored.

        Args:
            instance, names: see `read_label_studio`.

        Raises:
            ApiError: 422, no such export; 503 also when a prediction may be among the records that wait in this node's
                spool.
        """
        return await self._call(self._check, data, task, instance, names)

    def _check(
        self, store: Store, data: bytes, task: Classes, instance: str, names: Mapping[str, str]
    ) -> CheckedLabels:
        try:
            found = read_label_studio(data, task, instance, names, MAX_ANNOTATIONS)
        except ValueError as error:
            raise invalid_field(f"file: {error}") from error
        # Looked at first: a record that is replayed between the two is found, not missed.
        waiting = self._log.spool.pending()
        known = known_predictions(store, {placed.label.prediction_id for placed in found.labels})
        labels, gone = [], []
        for placed in found.labels:
            if placed.label.prediction_id in known and not is_shadow_id(placed.label.prediction_id):
                labels.append(placed)
            else:
                gone.append(unknown_prediction(placed))
        if gone and waiting:
            detail = f"file: {len(gone)} predictions may be among the records that wait for the store"
            raise unavailable(detail, self._retry_after_s)
        skipped = [problem for problem in found.problems if problem.reason == "cancelled"]
        problems = [problem for problem in found.problems if problem.reason != "cancelled"]
        return CheckedLabels(labels, gone, skipped, problems)

    async def add(self, labels: Sequence[PlacedLabel], actor: str) -> tuple[Counter[str], list[LabelProblem]]:
        """See `store_labels`.

        Raises:
            ApiError: 503, some may be stored: what is stored is not stored twice.
        """
        counts: Counter[str] = Counter()
        problems: list[LabelProblem] = []
        for start in range(0, len(labels), _CHUNK):
            try:
                added, refused = await self._call(store_labels, labels[start : start + _CHUNK], actor, _log_alarm)
            except ApiError as error:
                detail = f"{error.detail}; {start} of {len(labels)} labels or more are stored, none is stored twice"
                raise ApiError(error.status, error.error, detail, error.retry_after_s) from error
            counts.update(added)
            problems += refused
        return counts, problems


def _log_alarm(alarm: dict[str, Any]) -> None:
    # As an error: in throughput mode Serve's logger holds back what is below.
    logger.error("ALARM %s: %s", alarm["kind"], alarm["message"])
