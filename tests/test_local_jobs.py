"""Reading a submitted job's log: its result, or the reason why it failed."""

from __future__ import annotations

import pytest

from local.jobs import JobFailedError, failure_reason, parse_result, progress_of


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
