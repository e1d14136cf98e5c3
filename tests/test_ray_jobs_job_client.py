"""Jobs on a cluster: reading their logs, and one job per key however often it is asked for."""

from __future__ import annotations

import json
import re
import threading
from datetime import UTC, datetime, timedelta, timezone
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from ray_jobs import job_client, submit_job
from ray_jobs.job_client import JobFailedError, failure_reason, parse_result, progress_of, submit_once

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


class FakeCluster:
    """The job API as Ray answers it: a used id is rejected, an unknown one is a 404.

    Args:
        outcomes: how the jobs end, one after the other: (status, exit code, log).
    """

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)
        self.jobs: dict[str, SimpleNamespace] = {}
        self.logs: dict[str, str] = {}
        self.submitted: list[tuple[str, str]] = []
        self.environments: list[dict] = []
        self.before_submit = lambda: None
        self._lock = threading.Lock()

    def get_job_info(self, name):
        if name not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {name} does not exist.")
        return self.jobs[name]

    def submit_job(self, *, entrypoint, submission_id, runtime_env):
        self.before_submit()
        with self._lock:
            if submission_id in self.jobs:
                text = f"Traceback\n  File\nValueError: Job with submission_id {submission_id} already exists.\n"
                raise RuntimeError(f"Request failed with status code 500: {text}")
            status, code, log = self.outcomes.pop(0)
            self.jobs[submission_id] = SimpleNamespace(status=status, message=f"was {status}", driver_exit_code=code)
            self.logs[submission_id] = log
            self.submitted.append((submission_id, entrypoint))
            self.environments.append(runtime_env)

    def get_job_logs(self, name):
        return self.logs[name]


def done(**result):
    return JobStatus.SUCCEEDED, 0, "[12:00:00] looking\n" + json.dumps({"verb": "check_drift", **result}) + "\n"


def failed(code=1, line="check_drift: error: no champion"):
    return JobStatus.FAILED, code, line + "\n"


def ask(cluster, now=NOON, **fields):
    config = submit_job.SubmitJobConfig(**{"key": "drift", "per": "day"} | fields)
    return submit_job.run(config, "check_drift", ["--model", "champion"], cluster, now)


def test_a_job_that_succeeded_is_not_submitted_again_and_says_what_it_said():
    cluster = FakeCluster(done(alarm=True), done(alarm=False))
    first = ask(cluster)
    assert ask(cluster, NOON + timedelta(hours=11)) == first == {"verb": "check_drift", "alarm": True}
    assert cluster.submitted == [("drift-2026-11-21-1", "python -m ray_jobs.check_drift --model champion")]
    assert ask(cluster, NOON + timedelta(hours=12))["alarm"] is False
    assert cluster.submitted[-1][0] == "drift-2026-11-22-1"


def test_a_failed_attempt_is_followed_by_the_next_one_and_not_by_a_fourth():
    cluster = FakeCluster(failed(2), failed(1), failed(1), done())
    for code in (2, 1, 1):
        with pytest.raises(JobFailedError, match="check_drift: error: no champion") as error:
            ask(cluster)
        assert error.value.exit_code == code
    with pytest.raises(JobFailedError, match="3 attempts have failed"):
        ask(cluster)
    assert [name for name, _ in cluster.submitted] == [f"drift-2026-11-21-{number}" for number in (1, 2, 3)]
    assert ask(cluster, max_attempts=4)["verb"] == "check_drift"


def test_a_stopped_job_is_tried_again():
    cluster = FakeCluster((JobStatus.STOPPED, None, ""), done())
    with pytest.raises(JobFailedError, match="was STOPPED") as error:
        ask(cluster)
    assert error.value.exit_code == 1
    assert ask(cluster)["verb"] == "check_drift"


@pytest.mark.parametrize("status", [JobStatus.RUNNING, JobStatus.PENDING])
def test_a_job_that_runs_is_followed_not_repeated(status, monkeypatch):
    cluster = FakeCluster((status, None, "[12:00:00] looking\n"))
    assert ask(cluster, no_wait=True)["status"] == "PENDING"
    assert ask(cluster, no_wait=True)["status"] == status.value

    def end(_):
        state, _, log = done(alarm=False)
        cluster.jobs["drift-2026-11-21-1"].status, cluster.logs["drift-2026-11-21-1"] = state, log

    monkeypatch.setattr(job_client.time, "sleep", end)
    assert ask(cluster) == {"verb": "check_drift", "alarm": False}
    assert len(cluster.submitted) == 1


def test_following_has_an_end_and_leaves_the_job_running(monkeypatch):
    cluster = FakeCluster((JobStatus.RUNNING, None, ""))
    monkeypatch.setattr(job_client.time, "sleep", lambda _: None)
    with pytest.raises(JobFailedError, match="still running after 0 s"):
        ask(cluster, timeout_s=0.01)
    assert cluster.jobs["drift-2026-11-21-1"].status == JobStatus.RUNNING


def test_two_who_submit_at_once_get_one_job():
    cluster = FakeCluster(done(), done())
    both = threading.Barrier(2, timeout=10)
    cluster.before_submit = both.wait
    attempts = []

    def submit():
        attempts.append(submit_once(cluster, "drift", ["true"], {}, 3))

    threads = [threading.Thread(target=submit) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(attempt.submitted for attempt in attempts) == [False, True]
    assert {attempt.submission_id for attempt in attempts} == {"drift-1"} and len(cluster.submitted) == 1


def test_a_head_that_was_started_again_knows_no_job_and_gets_it_again():
    cluster = FakeCluster(done(), done())
    ask(cluster)
    cluster.jobs.clear()
    assert ask(cluster)["verb"] == "check_drift" and len(cluster.submitted) == 2


def test_a_cluster_that_refuses_is_one_line():
    class Refuses(FakeCluster):
        def submit_job(self, **_):
            raise RuntimeError("Request failed with status code 500: Traceback\n  File\nOSError: No space left.\n")

    with pytest.raises(JobFailedError, match="^the cluster did not take job drift-2026-11-21-1: OSError: No space"):
        ask(Refuses())


def test_a_job_gets_code_and_home_and_no_secret(monkeypatch, dermray_home):
    monkeypatch.setenv("DERMRAY_API_KEY", "secret")
    monkeypatch.setenv("DERMRAY_GIT_COMMIT", "abc")
    cluster = FakeCluster(done())
    ask(cluster)
    (environment,) = cluster.environments
    assert environment["env_vars"] == {"DERMRAY_HOME": str(dermray_home), "DERMRAY_GIT_COMMIT": "abc"}
    assert ".git" in environment["excludes"]


def test_periods_are_utc():
    ahead = datetime(2026, 1, 1, 0, 30, tzinfo=timezone(timedelta(hours=1)))
    keys = {per: submit_job.period_key("k", per, ahead) for per in ("hour", "day", "week", "month", None)}
    assert keys == {
        "hour": "k-2025-12-31T23",
        "day": "k-2025-12-31",
        "week": "k-2026-W01",
        "month": "k-2025-12",
        None: "k",
    }


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--key", "x"], "expected .* -- VERB"),
        (["--key", "x", "--"], "expected .* -- VERB"),
        (["--key", "x", "--", "no_such_verb"], "no_such_verb"),
        (["--key", "x", "--", "../job"], "../job"),
        (["--", "check_drift"], "key"),
        (["--key", "x", "--", "check_drift", "--store-url", "postgresql://me:pw@db/x"], r"a password, (?!.*me:pw)"),
        (["--key", "x", "--", "check_drift", "--store-url=postgresql://:p%40w@db/x"], r"a password, (?!.*p%40w)"),
        (["--key", "a b", "--", "check_drift"], "key = 'a b'"),
        (["--key", "x", "--per", "decade", "--", "check_drift"], "per = 'decade'"),
        (["--key", "x", "--max-attempts", "0", "--", "check_drift"], "max_attempts = 0"),
    ],
)
def test_wrong_command_lines_are_one_line_and_exit_2(argv, text, capsys):
    assert submit_job.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("submit_job: error: ")
    assert re.search(text, captured.err)


def test_urls_without_a_password_are_flags_like_others():
    flags = ["--store-url", "postgresql://me@db:5432/x", "--tracking-uri", "http://mlflow:5000/?a=b:c@d"]
    assert submit_job.split_arguments(["--key", "x", "--", "check_drift", *flags])[2] == flags


def test_the_command_line_mirrors_the_job(monkeypatch, capsys):
    cluster = FakeCluster(failed(2), done(alarm=False))
    monkeypatch.setattr(job_client, "open_client", lambda address: cluster)
    argv = ["--key", "x", "--", "check_drift", "--start", "2026-11-20"]
    assert submit_job.main(argv) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "submit_job: error: check_drift: error: no champion"
    assert submit_job.main(argv) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"verb": "check_drift", "alarm": False}
    assert cluster.submitted[-1] == ("x-2", "python -m ray_jobs.check_drift --start 2026-11-20")


def test_no_cluster_is_one_line(capsys):
    assert submit_job.main(["--key", "x", "--address", "http://127.0.0.1:9", "--", "check_drift"]) == 1
    assert "no job API at http://127.0.0.1:9" in capsys.readouterr().err


def test_the_result_is_the_last_json_line_of_a_verb():
    log = (
        'Running entrypoint\n{"verb": "a", "rows": 1}\n{"verb": "b", "rows": 2}\n{"other": 3}\n{broken\nlate warning\n'
    )
    assert parse_result(log) == {"verb": "b", "rows": 2}


def test_a_job_without_result_is_a_failure():
    with pytest.raises(JobFailedError, match="no result"):
        parse_result("[12:00:00] working\n{}\n")


def test_the_reason_is_the_job_s_own_error_line_not_what_ray_printed_after_it():
    log = "[12:00:00] reading\ntrain_model: error: dataset /x does not exist\n(raylet) some farewell\n"
    assert failure_reason(log, "Job entrypoint command failed") == "train_model: error: dataset /x does not exist"


def test_without_an_error_line_the_reason_is_the_traceback_s_last_line():
    assert failure_reason("Traceback:\n  File x\nKeyError: 'a'\n\n", None) == "KeyError: 'a'"
    assert failure_reason("", "runtime_env setup failed\nno such package") == "no such package"


def test_progress_is_what_the_job_and_its_train_workers_say_not_what_ray_says():
    assert progress_of("[12:00:00] fold 1/3") == "[12:00:00] fold 1/3"
    worker = "\x1b[36m(RayTrainWorker pid=4949, ip=127.0.0.1)\x1b[0m refit: epoch 3/3 step 8/24 loss 0.6 35 images/s"
    assert progress_of(worker) == "refit: epoch 3/3 step 8/24 loss 0.6 35 images/s"
    assert progress_of("\x1b[36m(RayTrainWorker pid=4949)\x1b[0m Moving model to device: cpu") is None
    assert progress_of("(raylet) 8 workers have been started") is None
