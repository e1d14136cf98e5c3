"""`make demo`: the whole path on synthetic lesions, each step a job submitted to a Ray cluster on this host.

data, search, training, engine, promotion, service, an ordinary and a shifted day of requests, labels of the ordinary
one, drift check of both and by the timer.
The service stays up until `make down`. A step that fails ends the demo and its cluster, with the step's reason.
"""

from __future__ import annotations

import argparse
import getpass
import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_pipelines.synthetic_dataset import SHIFTS, write_sample
from local.cluster import LocalCluster
from local.down import CLUSTER_FOLDER, DEMO_HOME
from local.jobs import run_job_on, run_scheduled
from local.replay import Answer, read_classes, send_labels
from local.traffic import Lesion, metadata_fields, read_lesions, send_day
from serve.api import Prediction
from serve.client import DermrayClient, DermrayError

# Written into the demo's folder: only a folder with it, or an empty one, is ever cleared.
MARKER = "DEMO"
CONFIGS = "configs/demo"
# A day's lesions come from the same population as the training sample (configs/demo/make_sample.yaml), other patients.
DAY_PATIENTS, DAY_LESIONS, DAY_PREVALENCE = 40, 11.0, 0.12
DAYS = {"ordinary": "none", "shifted": "camera"}


class DemoError(RuntimeError):
    """The demo cannot go on; the message is one line."""


def say(line: str) -> None:
    print(line, flush=True)


@dataclass
class Demo:
    """One run: its folder, its cluster, and what each stage took and gave."""

    home: Path
    cluster: LocalCluster
    rows: list[tuple[str, float, str]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def stage(self, name: str, run: Callable[[], str]) -> None:
        """Runs one stage and notes its seconds and its result line.

        Raises:
            DemoError: with the stage's name and reason.
        """
        say(f"\n[{len(self.rows) + 1}] {name}")
        started = time.monotonic()
        try:
            result = run()
        except (RuntimeError, OSError, ValueError, DermrayError) as error:
            self.rows.append((name, time.monotonic() - started, "FAILED"))
            raise DemoError(f"stage {name!r} failed: {' '.join(str(error).split())}") from error
        self.rows.append((name, time.monotonic() - started, result))
        say(f"    {result}")

    def job(self, verb: str, *arguments: str, attempt: str = "1") -> dict[str, Any]:
        """Submits a job and returns its result."""
        return run_job_on(
            self.cluster.client_environment(),
            self.home,
            verb,
            list(arguments),
            f"{verb}-{attempt}",
            show=lambda line: say(f"    {line}"),
        )

    def job_stage(self, verb: str, arguments: list[str], summary: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
        """A stage that is one job."""
        result: dict[str, Any] = {}

        def run() -> str:
            result.update(self.job(verb, *arguments))
            return summary(result)

        self.stage(verb, run)
        return result

    def table(self) -> str:
        """Stage, seconds and result of everything that ran."""
        width = max(len(name) for name, _, _ in self.rows)
        lines = [f"{'stage':{width}}  seconds  result"]
        lines += [f"{name:{width}}  {seconds:7.1f}  {result}" for name, seconds, result in self.rows]
        return "\n".join([*lines, f"{'total':{width}}  {time.monotonic() - self.started:7.1f}"])


def clear_home(home: Path) -> None:
    """Empties the folder of the previous demo.

    Raises:
        DemoError: a demo is up, or the folder holds something that no demo made.
    """
    previous = LocalCluster.load(home / CLUSTER_FOLDER)
    if previous is not None and previous.is_running():
        raise DemoError(f"a demo is up already, dashboard {previous.dashboard_url}; `make down` ends it")
    if previous is not None:
        previous.stop()
    if home.exists() and any(home.iterdir()):
        if not (home / MARKER).exists():
            raise DemoError(f"{home} is not a demo's folder (it has no file {MARKER}) and is not empty")
        shutil.rmtree(home)
    home.mkdir(parents=True, exist_ok=True)
    (home / MARKER).write_text("made by `make demo`, which empties this folder when it runs again\n")


def build_model(demo: Demo) -> None:
    """The jobs up to a champion."""
    demo.job_stage(
        "make_sample",
        ["--config", f"{CONFIGS}/make_sample.yaml"],
        lambda r: f"{r['num_rows']} synthetic lesions of {r['num_patients']} patients, {r['num_malignant']} malignant",
    )
    demo.job_stage(
        "prepare_dataset",
        ["--config", f"{CONFIGS}/prepare_dataset.yaml"],
        lambda r: f"{r['num_rows']} rows, {r['num_quarantined']} in quarantine, {r['num_folds']} folds",
    )
    demo.job_stage(
        "search_hyperparameters",
        ["--config", f"{CONFIGS}/search_hyperparameters.yaml"],
        lambda r: f"{r['trials']} trials, best {', '.join(f'{k} {_short(v)}' for k, v in r['best'].items())}",
    )
    demo.job_stage(
        "train_model",
        ["--config", str(demo.home / "best_config.yaml"), "--run-name", "demo"],
        lambda r: f"version {r['model_version']}, {_gate_line(r)}",
    )
    demo.job_stage(
        "export_engine",
        ["--config", f"{CONFIGS}/export_engine.yaml"],
        lambda r: f"{r['choice']['name'] if isinstance(r['choice'], dict) else r['choice']} on {r['device']}",
    )
    demo.job_stage(
        "promote_model",
        ["--config", f"{CONFIGS}/promote_model.yaml", "--approver", getpass.getuser(), "--reason", "make demo"],
        lambda r: f"version {r['champion']} is the champion, approved by {r['approver']}",
    )


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _gate_line(result: dict[str, Any]) -> str:
    parts = []
    for context, metrics in result["gate"].items():
        auc = metrics["auc"]
        parts.append(f"{context} {auc['value']:.3f} ({auc['low']:.3f}-{auc['high']:.3f})")
    return "gate AUC " + ", ".join(parts)


def send_traffic(demo: Demo, name: str, url: str, seed: int) -> tuple[tuple[datetime, datetime], list[Answer]]:
    """A day of requests from patients that trained nothing; returns the window of the log that holds them, and what
    each lesion became.

    The window is the time of the sending itself: the log is dated by the service's clock, and no one may set that.
    """
    window: list[datetime] = []
    answers: list[Answer] = []

    def run() -> str:
        folder = demo.home / "traffic" / name
        write_sample(folder, DAY_PATIENTS, DAY_LESIONS, DAY_PREVALENCE, seed, SHIFTS[DAYS[name]], lambda _: None)
        lesions = list(read_lesions(folder / "train-image.hdf5", folder / "train-metadata.csv", metadata_fields(url)))
        window.append(datetime.now(UTC))

        def note(lesion: Lesion, answer: Prediction) -> None:
            answers.append(Answer(lesion.image_id, answer.prediction_id, datetime.now(UTC)))

        day = send_day(url, lesions, on_answer=note)
        window.append(datetime.now(UTC))
        if day.answered != day.sent:
            raise DemoError(f"{day.sent - day.answered} of {day.sent} requests failed: {dict(day.statuses)}")
        figures = day.summary()
        bands = ", ".join(f"{count} {band}" for band, count in sorted(figures["bands"].items()))
        return f"{day.answered} answered, {figures['requests_per_s']}/s, p50 {figures['p50_ms']} ms; {bands}"

    demo.stage(f"{name} day", run)
    return (window[0], window[1]), answers


def label_day(demo: Demo, name: str, url: str, answers: list[Answer]) -> None:
    """What the generator knows of a day's lesions, as a reader's labels: quality can be measured, and what the model
    missed is an alarm."""

    def run() -> str:
        with DermrayClient(url, trust_env=False) as client:
            names = client.model().classes
            classes = read_classes(demo.home / "traffic" / name / "train-metadata.csv", "target", names)
            now = datetime.now(UTC)
            sent = send_labels(url, [(answer, classes[answer.image_id], now) for answer in answers], "demo reader")
            missed = client.summary(hours=24).missed_cancers
        words = ", ".join(f"{count} {label}" for label, count in sorted(sent.items()))
        return f"{words}; the model missed {missed}"

    demo.stage(f"labels of the {name} day", run)


def check_day(demo: Demo, name: str, window: tuple[datetime, datetime], expect_alarm: bool) -> dict[str, Any]:
    """check_drift on one window; the demo fails when the day does not look as it was made."""
    result: dict[str, Any] = {}

    def run() -> str:
        start, end = (moment.isoformat() for moment in window)
        result.update(demo.job("check_drift", "--start", start, "--end", end, attempt=name))
        drifted = result["drifted"]
        if bool(drifted) != expect_alarm:
            raise DemoError(f"expected {'an alarm' if expect_alarm else 'no alarm'}, found drift in {drifted}")
        return f"DRIFT in {', '.join(drifted)}" if drifted else "no drift"

    demo.stage(f"check_drift, {name}", run)
    return result


def show_timer(demo: Demo) -> None:
    """The daily drift check as cron, systemd or a CronJob starts it, and once more, as when two of them do."""

    def run() -> str:
        environment, show = demo.cluster.client_environment(), lambda line: say(f"    {line}")
        first, again = (
            run_scheduled(environment, demo.home, "check-drift", "check_drift", [], show=show) for _ in range(2)
        )
        if again != first:
            raise DemoError("the same day's check gave another result the second time")
        checked = ", ".join(f"{window['day']} {window['status']}" for window in first["windows"])
        return f"{checked}; started again: nothing to do"

    demo.stage("check_drift, timer", run)


def sample_request(home: Path, url: str) -> str:
    """A curl line for one lesion of the ordinary day, whose picture is put beside it."""
    folder = home / "traffic" / "ordinary"
    fields = {"age_approx", "sex", "anatom_site_general"}
    lesion = next(read_lesions(folder / "train-image.hdf5", folder / "train-metadata.csv", fields, limit=1))
    picture = home / "lesion.jpg"
    picture.write_bytes(lesion.image)
    metadata = shlex.quote(f"metadata={json.dumps(lesion.metadata)}")
    return f"curl -F image=@{shlex.quote(str(picture))} -F {metadata} {url}/v1/predict"


def run_demo(home: Path) -> None:
    """Runs everything; the cluster stays up when it succeeds and is ended when it does not."""
    clear_home(home)
    cluster = LocalCluster(home / CLUSTER_FOLDER, preferred_dashboard_port=8265, preferred_http_port=8000)
    demo = Demo(home, cluster)
    try:

        def start() -> str:
            cluster.start()
            return f"dashboard {cluster.dashboard_url}, token required"

        demo.stage("ray head", start)
        build_model(demo)
        deployed = demo.job_stage(
            "deploy_service",
            ["--port", str(cluster.http_port), "--links.ray_dashboard", cluster.dashboard_url],
            lambda r: f"version {r['model_version']} with {r['engine']} at {r['url']}",
        )
        url = deployed["url"]
        ordinary, answers = send_traffic(demo, "ordinary", url, seed=101)
        shifted, _ = send_traffic(demo, "shifted", url, seed=102)
        label_day(demo, "ordinary", url, answers)
        reports = [
            check_day(demo, "ordinary", ordinary, expect_alarm=False),
            check_day(demo, "shifted", shifted, expect_alarm=True),
        ]
        show_timer(demo)
        request = sample_request(home, url)
    except BaseException:
        if demo.rows:
            say("\n" + demo.table())
        cluster.stop()
        raise
    say("\n" + demo.table())
    say(f"""
SYNTHETIC data: these pictures and figures say nothing about real lesions. Not a medical device.

pages      {url}/
service    {url}/docs
dashboard  {cluster.dashboard_url}  (token: cat {cluster.client_environment()["RAY_AUTH_TOKEN_PATH"]})
MLflow     .venv/bin/mlflow ui --backend-store-uri sqlite:///{home}/mlflow.db --port 5000
drift      {reports[0]["html"]}
           {reports[1]["html"]}
try        {request}
pictures   make screenshots
stop       make down""")


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=DEMO_HOME, help="the demo's folder, emptied first")
    home = parser.parse_args(arguments).home.resolve()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run_demo(home)
    except DemoError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; its processes are ended", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
