"""Submits one job to a cluster with `ray job submit`, shows its progress, and returns its result.

The command line only submits (`--no-wait`): following a job with it ends up to 7 s after the job, asking the job API
ends within half a second.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO_ROOT = Path(__file__).resolve().parents[1]
# Neither belongs to the code; the job's copy of the repository is made from the rest (.gitignore is honoured too).
EXCLUDES = [".git", ".venv", "var"]
POLL_S = 0.5
# The job API gives a log only as a whole; following a long one every half second took 7 % of a core.
LOG_EVERY_S = 2.0
# A job's own progress lines, and those of its train workers, which Ray prefixes and colours.
_PROGRESS = re.compile(r"(?:\[\d\d:\d\d:\d\d\] .*)|(?:\(RayTrainWorker[^)]*\) )(\S+: epoch \d.*)")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_ERROR = re.compile(r"[a-z_]+: error: ")


class JobFailedError(RuntimeError):
    """A submitted job did not succeed; the message is its reason, in one line."""


def parse_result(log: str) -> dict[str, Any]:
    """The result of a job: the last line of its log that is a JSON object with the key `verb`.

    Raises:
        JobFailedError: no such line.
    """
    for line in reversed(log.splitlines()):
        if line.startswith("{"):
            try:
                result = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(result, dict) and "verb" in result:
                return result
    raise JobFailedError("the job printed no result line")


def failure_reason(log: str, message: str | None) -> str:
    """One line that says why a job failed: its own error line, else the last line of its log, else Ray's message."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in reversed(lines):
        if _ERROR.match(line):
            return line
    last_of_message = (message or "").strip().splitlines()[-1:] or ["no reason given"]
    return lines[-1] if lines else last_of_message[0]


def progress_of(line: str) -> str | None:
    """What to show of a line of a job's log; None for the many lines that Ray and other libraries write."""
    match = _PROGRESS.fullmatch(_COLOUR.sub("", line).rstrip())
    return None if match is None else match[1] or match[0]


def job_command(verb: str, arguments: list[str]) -> list[str]:
    """The entry point of a job."""
    return ["python", "-m", f"ray_jobs.{verb}", *arguments]


def submit(entrypoint: list[str], submission_id: str, environment: dict[str, str], home: Path) -> None:
    """Runs `ray job submit` without waiting for the job's end.

    Args:
        entrypoint: the command, run in a copy of this repository.
        submission_id: the job's id; a used one is rejected.
        environment: `LocalCluster.client_environment()`.
        home: DERMRAY_HOME of the job, absolute.

    Raises:
        JobFailedError: the cluster did not take the job.
    """
    # The job's copy of the code has no .git; training records the commit in the bundle.
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO_ROOT, capture_output=True, text=True, check=False)
    variables = {"DERMRAY_HOME": str(home), "DERMRAY_GIT_COMMIT": commit.stdout.strip() or "unknown"}
    runtime_env = {"excludes": EXCLUDES, "env_vars": variables}
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--no-wait"]
    command += ["--submission-id", submission_id, "--working-dir", str(REPO_ROOT)]
    command += ["--runtime-env-json", json.dumps(runtime_env), "--", *entrypoint]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode != 0:
        # A traceback within a traceback; its own words are the last line that names an error.
        lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
        named = [line for line in lines if re.search(r"Error\b", line)] or lines or ["no output"]
        raise JobFailedError(f"ray job submit failed: {named[-1]}")


def follow(
    submission_id: str,
    environment: dict[str, str],
    log_file: Path,
    show: Callable[[str], None],
    timeout_s: float,
) -> str:
    """Waits for a job's end, shows its progress lines as they come, and returns its whole log (also in `log_file`).

    Raises:
        JobFailedError: the job failed, was stopped, or ran longer than `timeout_s`; then it is stopped.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text(encoding="utf-8")
    client = JobSubmissionClient(environment["RAY_API_SERVER_ADDRESS"], headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + timeout_s
    shown, next_log = 0, 0.0
    while True:
        # Status first: a log read after the end is complete.
        info = client.get_job_info(submission_id)
        ended = info.status.is_terminal()
        if ended or time.monotonic() >= next_log:
            next_log = time.monotonic() + LOG_EVERY_S
            log = client.get_job_logs(submission_id) or ""
            lines = log.splitlines() if ended else log.splitlines()[:-1]
            for line in lines[shown:]:
                if (progress := progress_of(line)) is not None:
                    show(progress)
            shown = max(shown, len(lines))
            log_file.write_text(log)
        if ended:
            break
        if time.monotonic() > deadline:
            client.stop_job(submission_id)
            raise JobFailedError(f"stopped after {timeout_s:.0f} s; log: {log_file}")
        time.sleep(POLL_S)
    if info.status != JobStatus.SUCCEEDED:
        raise JobFailedError(f"{failure_reason(log, info.message)} (log: {log_file})")
    return log


def run_job_on(
    environment: dict[str, str],
    home: Path,
    verb: str,
    arguments: list[str],
    submission_id: str,
    show: Callable[[str], None] = print,
    timeout_s: float = 1800.0,
) -> dict[str, Any]:
    """Submits `python -m ray_jobs.<verb> <arguments>`, follows it and returns its JSON result.

    The log is kept in `<home>/logs/<submission_id>.log`.

    Raises:
        JobFailedError: with the job's reason.
    """
    log_file = home / "logs" / f"{submission_id}.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    entrypoint = job_command(verb, arguments)
    show(f"$ ray job submit --working-dir . -- {shlex.join(entrypoint)}")
    submit(entrypoint, submission_id, environment, home)
    return parse_result(follow(submission_id, environment, log_file, show, timeout_s))
