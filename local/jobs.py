"""Jobs on a local cluster, for the demo and the tests: `ray_jobs.job_client` with the cluster's address and token."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modeling.locations import REPO_ROOT as REPO_ROOT
from ray_jobs import job_client, submit_job
from ray_jobs.job_client import JobFailedError as JobFailedError


def client_of(environment: dict[str, str]) -> Any:
    """A job client of the cluster whose `LocalCluster.client_environment()` is given."""
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text(encoding="utf-8")
    return job_client.open_client(environment["RAY_API_SERVER_ADDRESS"], token)


def submit(entrypoint: list[str], submission_id: str, environment: dict[str, str], home: Path) -> None:
    """Submits a command without waiting for its end; `home` is DERMRAY_HOME of the job, absolute.

    Raises:
        JobFailedError: the cluster did not take the job.
    """
    job_client.submit(client_of(environment), entrypoint, submission_id, job_client.job_environment(home))


def follow(
    submission_id: str, environment: dict[str, str], log_file: Path, show: Callable[[str], None], timeout_s: float
) -> str:
    """As `job_client.follow`; a job that runs longer than `timeout_s` is stopped."""
    return job_client.follow(client_of(environment), submission_id, show, timeout_s, log_file)


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
    entrypoint = job_client.job_command(verb, arguments)
    show(f"$ ray job submit --working-dir . -- {shlex.join(entrypoint)}")
    submit(entrypoint, submission_id, environment, home)
    return job_client.parse_result(follow(submission_id, environment, log_file, show, timeout_s))


def run_scheduled(
    environment: dict[str, str],
    home: Path,
    key: str,
    verb: str,
    arguments: list[str],
    per: str | None = "day",
    show: Callable[[str], None] = print,
) -> dict[str, Any]:
    """What a timer's `python -m ray_jobs.submit_job --key KEY --per PERIOD -- VERB ...` does, on this cluster: called
    again in the same period it submits nothing, and returns the same result.

    Raises:
        JobFailedError: with the job's reason.
    """
    period = [] if per is None else ["--per", per]
    show(f"$ python -m ray_jobs.submit_job {shlex.join(['--key', key, *period, '--', verb, *arguments])}")
    config = submit_job.SubmitJobConfig(key=key, per=per, home=str(home))
    return submit_job.run(config, verb, arguments, client_of(environment), show=show)
