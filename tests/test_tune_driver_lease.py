"""One driver writes a search; it is followed at once where it is known to be gone, else after a minute's silence."""

import os
import pickle
import subprocess
import sys

import psutil
import pytest

from tests.house import REPO_ROOT
from tune.driver_lease import LEASE_SECONDS, DriverLease, SearchTakenOverError
from tune.json_files import read_json, write_json

RENEW = "import pickle, sys; pickle.loads(bytes.fromhex(sys.argv[1])).renew()"


@pytest.fixture
def url(tmp_path):
    return f"{tmp_path}/driver.json"


def held_by_another(url, **fields):
    """The lease as another driver left it."""
    DriverLease(url).take()
    held = read_json(url) | {"driver": "another"} | fields
    write_json(url, held)
    return held


@pytest.fixture
def process():
    started = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield started
    started.kill()
    started.wait()


def test_a_driver_on_another_host_is_followed_only_after_its_silence(url):
    held = held_by_another(url, host="gpu-7", pid=123)
    with pytest.raises(ValueError, match=r"run by process 123 on gpu-7, last seen \d+ s ago; .* try again in \d+ s"):
        DriverLease(url).take()
    assert read_json(url) == held
    held_by_another_since = held["at"] - LEASE_SECONDS - 1
    write_json(url, held | {"at": held_by_another_since})
    DriverLease(url).take()
    assert read_json(url)["pid"] == os.getpid()


def test_a_driver_on_this_host_is_followed_as_soon_as_it_is_dead(url, process):
    started = psutil.Process(process.pid).create_time()
    held_by_another(url, pid=process.pid, process_started=started)
    with pytest.raises(ValueError, match="that process is alive; end it first"):
        DriverLease(url).take()
    process.kill()
    process.wait()
    DriverLease(url).take()
    assert read_json(url)["pid"] == os.getpid()


def test_a_process_id_that_was_given_again_holds_nothing(url, process):
    held_by_another(url, pid=process.pid, process_started=psutil.Process(process.pid).create_time() - 100)
    DriverLease(url).take()


def test_the_same_process_id_in_another_container_says_nothing(url):
    held_by_another(url, pid=2**30, pid_namespace="pid:[1]")
    with pytest.raises(ValueError, match="last seen"):
        DriverLease(url).take()


def test_a_released_lease_is_free_and_another_drivers_is_left_alone(url):
    DriverLease(url).take()
    DriverLease(url).release()
    assert read_json(url) is None
    held = held_by_another(url, host="gpu-7")
    DriverLease(url).release()
    with pytest.raises(SearchTakenOverError, match="on gpu-7.* has taken over"):
        DriverLease(url).renew()
    assert read_json(url) == held


def test_an_unpickled_lease_is_that_of_the_process_it_is_in(url):
    lease = DriverLease(url)
    lease.take()
    pickled = pickle.dumps(lease).hex()
    done = subprocess.run(
        [sys.executable, "-c", RENEW, pickled], cwd=REPO_ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "has taken over this search" in done.stderr
    pickle.loads(bytes.fromhex(pickled)).renew()
