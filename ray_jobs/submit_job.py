"""Submits a job to the cluster once per key, for cron, systemd timers and Kubernetes CronJobs:

    python -m ray_jobs.submit_job --key check-drift --per day -- check_drift --model champion

The job's id is `<key>-<period>-<attempt>`. Typed again in the same period it follows the job that runs, says so where
it has succeeded, and submits the next attempt where it has failed. Exit status and last line are the job's.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field, ValidationError

from modeling.locations import dermray_home
from ray_jobs import job_client
from ray_jobs.job import JobConfig, Location, parse_config, say, validation_lines
from ray_jobs.job_client import JobFailedError

USAGE = "expected [--field value ...] -- VERB [--field value ...]"
_PASSWORD = re.compile(r"://[^/?#\s]*:[^/?#\s]+@")
_PERIODS = {"hour": "%Y-%m-%dT%H", "day": "%Y-%m-%d", "week": "%G-W%V", "month": "%Y-%m"}


class SubmitJobConfig(JobConfig):
    key: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,99}$", description="names the work: one job per key")
    per: Literal["hour", "day", "week", "month"] | None = Field(
        None, description="the period (UTC) is added to the key: one job in each; null: one for ever"
    )
    max_attempts: int = Field(3, ge=1, le=100, description="jobs under one key, the failed ones counted")
    no_wait: bool = Field(False, description="submit only; the exit status then says nothing of the job")
    timeout_s: float = Field(86_400, gt=0, description="no longer is the job followed; it runs on")
    address: str | None = Field(None, description="the dashboard's URL; null: RAY_API_SERVER_ADDRESS")
    home: Location | None = Field(None, description="the job's DERMRAY_HOME, as the cluster sees it; null: ours")


def period_key(key: str, per: str | None, now: datetime) -> str:
    """The key of the period that `now` lies in, UTC."""
    return key if per is None else f"{key}-{now.astimezone(UTC).strftime(_PERIODS[per])}"


def split_arguments(argv: list[str]) -> tuple[list[str], str, list[str]]:
    """Flags of the submission, verb and flags of the job.

    Raises:
        ValueError: no verb, or not one of ours; or a password in a URL, which the dashboard would show to everyone.
    """
    if "--" not in argv or argv[-1] == "--":
        raise ValueError(USAGE)
    at = argv.index("--")
    verb, arguments = argv[at + 1], argv[at + 2 :]
    if not verb.isidentifier() or importlib.util.find_spec(f"ray_jobs.{verb}") is None:
        raise ValueError(f"verb {verb!r}: there is no ray_jobs/{verb}.py")
    if any(_PASSWORD.search(argument) for argument in arguments):
        raise ValueError(
            "a flag of the job holds a URL with a password, which the dashboard shows; expected it in the environment "
            "of the cluster's nodes, such as PGPASSFILE"
        )
    return argv[:at], verb, arguments


def run(
    config: SubmitJobConfig,
    verb: str,
    arguments: list[str],
    client: Any = None,
    now: datetime | None = None,
    show: Callable[[str], None] = say,
) -> dict[str, Any]:
    """The job's result; with `no_wait`, where it stands.

    Args:
        client: a `JobSubmissionClient`; None: of `config.address`.
        now: decides the period; None: the present.

    Raises:
        JobFailedError: the job failed, or could not be submitted.
    """
    client = client or job_client.open_client(config.address)
    key = period_key(config.key, config.per, now or datetime.now(UTC))
    runtime_env = job_client.job_environment(config.home or dermray_home())
    command = job_client.job_command(verb, arguments)
    attempt = job_client.submit_once(client, key, command, runtime_env, config.max_attempts)
    known = "submitted" if attempt.submitted else f"{attempt.status.lower()} already, not submitted again"
    show(f"job {attempt.submission_id}: {known}")
    if config.no_wait:
        return {"verb": verb, "submission_id": attempt.submission_id, "status": attempt.status}
    log = job_client.follow(client, attempt.submission_id, show, config.timeout_s, stop_late=False)
    return job_client.parse_result(log)


def main(argv: list[str]) -> int:
    """The command line; returns the exit status."""
    if {"-h", "--help"} & set(argv[: argv.index("--")] if "--" in argv else argv):
        fields = [f"  --{name}  {field.description or ''}" for name, field in SubmitJobConfig.model_fields.items()]
        print("\n".join([(__doc__ or "").strip(), "", "fields:", *fields]))
        return 0
    try:
        flags, verb, arguments = split_arguments(argv)
        config = parse_config(SubmitJobConfig, flags)
        result = run(config, verb, arguments)
    except ValidationError as error:
        return _fail(validation_lines(error), 2)
    except ValueError as error:
        return _fail(str(error), 2)
    except JobFailedError as error:
        return _fail(str(error), error.exit_code)
    sys.stderr.flush()
    print(json.dumps(result), flush=True)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"submit_job: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
