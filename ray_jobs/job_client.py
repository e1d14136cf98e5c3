"""Jobs of this repository on a cluster, over Ray's Job Submission API: submit, follow, read the result.

`ray job submit` uses the same API; following a job with it ends up to 7 s after the job, asking ends within half a
second.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling.locations import REPO_ROOT

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

# None belongs to the code; the job's copy of the repository is made from the rest (.gitignore is honoured too).
EXCLUDES = [".git", ".venv", "var"]
POLL_S = 0.5
# The job API gives a log only as a whole; following a long one every half second took 7 % of a core.
LOG_EVERY_S = 2.0
# A job's own progress lines, and those of its train workers, which Ray prefixes and colours.
_PROGRESS = re.compile(r"(?:\[\d\d:\d\d:\d\d\] .*)|(?:\(RayTrainWorker[^)]*\) )(\S+: epoch \d.*)")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_ERROR = re.compile(r"[a-z_]+: error: ")


class JobFailedError(RuntimeError):
    """A submitted job did not succeed; the message is its reason, in one line.

    Attributes:
        exit_code: of the job's process; 1 where it has none (refused, stopped, killed).
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


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


def code_commit() -> str:
    """The commit that a job's copy of the code is of, which has no .git; "unknown" outside a checkout."""
    if commit := os.environ.get("DERMRAY_GIT_COMMIT"):
        return commit
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=REPO_ROOT, capture_output=True, text=True, check=False
        )
    except OSError:  # an image without git
        return "unknown"
    return answer.stdout.strip() or "unknown"


def job_environment(home: Path | str) -> dict[str, Any]:
    """`runtime_env` of a job: this repository, and DERMRAY_HOME. No secrets: the dashboard shows it.

    Args:
        home: absolute, as the cluster sees it.
    """
    variables = {"DERMRAY_HOME": str(home), "DERMRAY_GIT_COMMIT": code_commit()}
    return {"working_dir": str(REPO_ROOT), "excludes": EXCLUDES, "env_vars": variables}


def open_client(address: str | None = None, token: str | None = None) -> JobSubmissionClient:
    """A client of the job API.

    Args:
        address: the dashboard's URL; None: RAY_API_SERVER_ADDRESS, else a cluster that Ray finds on this host.
        token: None: from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, as Ray itself does.

    Raises:
        JobFailedError: no cluster there, or it refuses the token.
    """
    from ray.job_submission import JobSubmissionClient

    headers = None if token is None else {"Authorization": f"Bearer {token}"}
    try:
        return JobSubmissionClient(address, headers=headers)
    except Exception as error:  # requests', Ray's authentication and address errors share no base
        raise JobFailedError(f"no job API at {address or 'the default address'}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Ray answers with a traceback; its own words are the last line that names an error.
    return next((line for line in reversed(lines) if re.search(r"Error\b", line)), (lines or [type(error).__name__])[0])


def find_job(client: JobSubmissionClient, submission_id: str) -> JobDetails | None:
    """What the cluster knows of a job; None where it has none of this id.

    Raises:
        JobFailedError: the job API does not answer.
    """
    try:
        return client.get_job_info(submission_id)
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise JobFailedError(f"the job API does not answer: {_one_line(error)}") from error
    except OSError as error:  # requests' connection errors
        raise JobFailedError(f"the job API does not answer: {_one_line(error)}") from error


def submit(client: JobSubmissionClient, entrypoint: list[str], submission_id: str, runtime_env: dict[str, Any]) -> None:
    """Submits a job without waiting for it.

    Args:
        entrypoint: the command, run in the job's copy of `working_dir`.
        submission_id: the job's id; a used one is rejected, also after that job failed.

    Raises:
        JobFailedError: the cluster did not take the job.
    """
    try:
        client.submit_job(entrypoint=shlex.join(entrypoint), submission_id=submission_id, runtime_env=runtime_env)
    except (RuntimeError, OSError) as error:
        raise JobFailedError(f"the cluster did not take job {submission_id}: {_one_line(error)}") from error


def follow(
    client: JobSubmissionClient,
    submission_id: str,
    show: Callable[[str], None],
    timeout_s: float,
    log_file: Path | None = None,
    stop_late: bool = True,
) -> str:
    """Waits for a job's end, shows its progress lines as they come, and returns its whole log (also in `log_file`).

    Args:
        stop_late: whether a job that runs longer than `timeout_s` is stopped.

    Raises:
        JobFailedError: the job failed, was stopped, or ran longer than `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    shown, next_log, log = 0, 0.0, ""
    where = "" if log_file is None else f" (log: {log_file})"
    while True:
        # Status first: a log read after the end is complete.
        info = find_job(client, submission_id)
        if info is None:
            raise JobFailedError(f"the cluster has lost job {submission_id}: its head was started again{where}")
        ended = info.status.is_terminal()
        if ended or time.monotonic() >= next_log:
            next_log = time.monotonic() + LOG_EVERY_S
            log = _log(client, submission_id)
            lines = log.splitlines() if ended else log.splitlines()[:-1]
            for line in lines[shown:]:
                if (progress := progress_of(line)) is not None:
                    show(progress)
            shown = max(shown, len(lines))
            if log_file is not None:
                log_file.write_text(log, encoding="utf-8")
        if ended:
            break
        if time.monotonic() > deadline:
            if stop_late:
                client.stop_job(submission_id)
            raise JobFailedError(f"{'stopped' if stop_late else 'still running'} after {timeout_s:.0f} s{where}")
        time.sleep(POLL_S)
    if info.status != "SUCCEEDED":
        raise JobFailedError(f"{failure_reason(log, info.message)}{where}", info.driver_exit_code or 1)
    return log


def _log(client: JobSubmissionClient, submission_id: str) -> str:
    try:
        return client.get_job_logs(submission_id) or ""
    except (RuntimeError, OSError) as error:
        raise JobFailedError(f"the log of job {submission_id} cannot be read: {_one_line(error)}") from error


@dataclass(frozen=True)
class Attempt:
    """A job under a key: its id, and whether this call submitted it."""

    submission_id: str
    status: str
    submitted: bool


def submit_once(
    client: JobSubmissionClient, key: str, entrypoint: list[str], runtime_env: dict[str, Any], max_attempts: int
) -> Attempt:
    """Submits a job under a key unless it runs or has succeeded; ids are `<key>-1`, `<key>-2`, ...

    A failed attempt is followed by the next. Of two that submit at once, Ray rejects the second's id, and it gets the
    first's job. Ray keeps its jobs as long as its head runs: after a restart the key is new, and the job runs again.

    Raises:
        JobFailedError: `max_attempts` attempts have failed, or the cluster took no job.
    """
    for number in range(1, max_attempts + 1):
        submission_id = f"{key}-{number}"
        info = find_job(client, submission_id)
        if info is None:
            try:
                submit(client, entrypoint, submission_id, runtime_env)
            except JobFailedError:
                info = find_job(client, submission_id)
                if info is None:
                    raise
            else:
                return Attempt(submission_id, "PENDING", submitted=True)
        if not (info.status.is_terminal() and info.status != "SUCCEEDED"):
            return Attempt(submission_id, info.status.value, submitted=False)
    reason = f"{key}: {max_attempts} attempts have failed, the last: {info.message or info.status.value}"
    raise JobFailedError(" ".join(reason.split()), info.driver_exit_code or 1)
