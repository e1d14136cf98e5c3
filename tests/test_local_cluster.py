"""A local cluster lives beside others and ends without a trace; a job submitted to it runs the repository's code."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from local import ports, processes
from local.cluster import LocalCluster
from local.jobs import JobFailedError, follow, run_job_on, run_scheduled, submit


def test_a_block_avoids_a_port_in_use_and_the_ranges_that_ray_numbers_itself():
    block = ports.free_block(seed=1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", block[50]))
        listener.listen(1)
        assert not ports.is_free(block[50])
        assert ports.preferred_port(block[50], otherwise=1) == 1
        other = ports.free_block(seed=1)
    assert other != block
    assert all(20_000 <= port < 30_000 for port in (*block, *other))
    assert ports.preferred_port(block[50], otherwise=1) == block[50]


def spawn(mark: str | None, code: str) -> subprocess.Popen:
    environment = {**os.environ, processes.MARK: mark} if mark else dict(os.environ)
    child = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert child.stdout.readline().strip() == "up"
    return child


DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
ORPHAN = (
    "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
    " start_new_session=True, stdout=subprocess.DEVNULL); print('up', flush=True)"
)


def test_ending_a_cluster_ends_orphans_and_the_deaf_and_spares_everyone_else():
    deaf = spawn("mark-a", DEAF)
    parent = spawn("mark-a", ORPHAN)
    parent.wait(timeout=10)
    other = spawn("mark-b", DEAF)
    unmarked = spawn(None, DEAF)
    try:
        assert len(processes.marked_processes("mark-a")) == 2
        assert processes.end_marked_processes("mark-a", root=None, grace_s=5.0) == 2
        assert processes.marked_processes("mark-a") == []
        assert deaf.wait(timeout=5) != 0
        assert other.poll() is None
        assert unmarked.poll() is None
    finally:
        for child in (deaf, other, unmarked):
            child.kill()
            child.wait()
            child.stdout.close()
        parent.stdout.close()


def test_a_cluster_that_cannot_start_says_why_and_leaves_nothing(tmp_path):
    cluster = LocalCluster(tmp_path, object_store_bytes="many")
    with pytest.raises(RuntimeError, match="ray start ended: .*"):
        cluster.start(timeout_s=60)
    assert LocalCluster.load(tmp_path) is None
    assert not cluster.is_running()


def http_status(url: str, token: str | None = None) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.ray
def test_jobs_need_the_token_and_every_port_is_on_loopback(ray_cluster):
    token = Path(ray_cluster.state.token_path)
    assert token.stat().st_mode & 0o077 == 0
    assert http_status(f"{ray_cluster.dashboard_url}/api/jobs/") == 401
    assert http_status(f"{ray_cluster.dashboard_url}/api/jobs/", token.read_text()) == 200
    listening = [
        (process.name(), connection.laddr.ip)
        for process in processes.marked_processes(ray_cluster.state.cluster_id)
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN and process.name() != "haproxy"
    ]
    assert listening
    assert {ip for _, ip in listening} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


# In a worker, as Train's and Tune's actors do it: with two clusters on the host it has to know which is its own.
ASK_THE_STATE_API = """
import ray
ray.init()
@ray.remote
def count():
    from ray.util.state import list_nodes
    return len(list_nodes())
print("nodes:", ray.get(count.remote()))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_second_cluster_runs_beside_the_first_and_ends_alone(ray_cluster, tmp_path):
    before = {process.pid for process in processes.marked_processes(ray_cluster.state.cluster_id)}
    with LocalCluster(tmp_path) as second:
        state = second.state
        assert second.address != ray_cluster.address
        with pytest.raises(RuntimeError, match="running already"):
            LocalCluster(tmp_path).start()
        loaded = LocalCluster.load(tmp_path)
        assert loaded is not None and loaded.is_running()
        environment = second.client_environment()
        submit([sys.executable, "-c", ASK_THE_STATE_API], "state", environment, tmp_path)
        assert "nodes: 1" in follow("state", environment, tmp_path / "state.log", print, timeout_s=120.0)
    assert processes.marked_processes(state.cluster_id) == []
    assert not Path(state.temp_dir).exists()
    assert LocalCluster.load(tmp_path) is None
    after = {process.pid for process in processes.marked_processes(ray_cluster.state.cluster_id)}
    assert before <= after
    assert http_status(f"{ray_cluster.dashboard_url}/api/jobs/", Path(ray_cluster.state.token_path).read_text()) == 200


@pytest.mark.ray
def test_a_submitted_job_writes_below_its_home_and_reports_its_result(ray_cluster, tmp_path):
    shown: list[str] = []
    result = run_job_on(
        ray_cluster.client_environment(),
        tmp_path,
        "make_sample",
        ["--out", "sample", "--num-patients", "4", "--seed", "3"],
        f"make-sample-{time.time_ns()}",
        show=shown.append,
    )
    assert result["verb"] == "make_sample"
    assert (tmp_path / "sample" / "train-metadata.csv").exists()
    assert shown[0].startswith("$ ray job submit")
    assert list((tmp_path / "logs").glob("make-sample-*.log"))


@pytest.mark.ray
def test_a_failing_job_is_reported_with_its_own_reason(ray_cluster, tmp_path):
    environment = ray_cluster.client_environment()
    with pytest.raises(JobFailedError, match="prepare_dataset: error: .*no_such_key"):
        run_job_on(
            environment,
            tmp_path,
            "prepare_dataset",
            ["--no-such-key", "1"],
            f"prepare-{time.time_ns()}",
        )
    name = f"long-{time.time_ns()}"
    submit(["python", "-c", "import time; time.sleep(600)"], name, environment, tmp_path)
    with pytest.raises(JobFailedError, match="stopped after 3 s"):
        follow(name, environment, tmp_path / "long.log", print, timeout_s=3.0)
    with pytest.raises(JobFailedError, match="already"):
        submit(["python", "-c", "pass"], name, environment, tmp_path)


@pytest.mark.ray
def test_a_timer_s_job_runs_once_in_its_period_and_again_only_where_it_failed(ray_cluster, tmp_path):
    environment = ray_cluster.client_environment()
    key = f"sample-{time.time_ns()}"
    arguments = ["--out", "sample", "--num-patients", "4", "--seed", "3"]
    shown: list[str] = []
    first = run_scheduled(environment, tmp_path, key, "make_sample", arguments, show=shown.append)
    made = (tmp_path / "sample" / "train-metadata.csv").stat().st_mtime_ns
    again = run_scheduled(environment, tmp_path, key, "make_sample", arguments, show=shown.append)
    assert again == first and first["verb"] == "make_sample"
    assert (tmp_path / "sample" / "train-metadata.csv").stat().st_mtime_ns == made
    assert sum("submitted" in line and "not submitted" not in line for line in shown) == 1
    assert "succeeded already, not submitted again" in "\n".join(shown)
    with pytest.raises(JobFailedError, match="prepare_dataset: error: .*no_such_key") as error:
        run_scheduled(environment, tmp_path, f"{key}-x", "prepare_dataset", ["--no-such-key", "1"], per=None)
    # The job's own exit status: a mistake of the user's.
    assert error.value.exit_code == 2
