"""A retraining whose driver dies anywhere ends as if it had not; one whose stage fails says so."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import sqlalchemy as sql

from ray_jobs.retraining_driver import LeaseKeeper, StageFailedError, json_value, work
from store.candidates import list_candidates, record_candidate
from store.database import StoreUnavailableError, open_store
from store.retraining import find_retraining, request_retraining
from store.retraining_queue import RetrainTakenOverError, claim_retraining
from store.tables import now_us, retrain_requests
from tests.house import REPO_ROOT

NAMES = ("prepare", "train", "export", "gate")
LEASE_S = 60.0


class Killed(BaseException):
    """What no handler of errors sees, as of a process that is gone."""


def stages(store, folder, kill=lambda where: None, fail=None):
    """Four stages that leave something behind, as the real ones do: safe to repeat."""

    def stage(name):
        def run(finished):
            assert list(finished) == list(NAMES[: NAMES.index(name)])
            kill(f"before {name}")
            if name == fail:
                raise ValueError(f"no {name}\nat all")
            with open(folder / "calls", "a") as calls:
                calls.write(f"{name}\n")
            if name == "train":
                record_candidate(store, "4", "a" * 64, {})
            kill(f"after {name}")
            return {"model_version": "4"} if name == "train" else {"made": name, "nan": float("nan")}

        return run

    return {name: stage(name) for name in NAMES}


@pytest.fixture
def store(any_store_url):
    opened = open_store(any_store_url)
    request_retraining(opened, "manual", "manual", "new camera", "Ada")
    yield opened
    opened.close()


def take(store, seconds=0.0):
    return claim_retraining(store, int(LEASE_S * 1e6), 3, now=now_us() + int(seconds * 1e6))


def state_of(store, request_id):
    row = find_retraining(store, request_id)
    return {name: row[name] for name in ("state", "stage", "error", "model_version", "detail", "leased_until")}


def quiet(_):
    pass


DONE = {
    "state": "done",
    "stage": None,
    "error": None,
    "model_version": "4",
    "leased_until": None,
    "detail": {
        "stages": {name: {"model_version": "4"} if name == "train" else {"made": name, "nan": None} for name in NAMES}
    },
}


@pytest.mark.parametrize("where", [f"{when} {name}" for name in NAMES for when in ("before", "after")])
def test_killed_at_each_stage_and_run_again_it_ends_the_same(store, tmp_path, where):
    def kill(here):
        if here == where:
            raise Killed

    first = take(store)
    with pytest.raises(Killed):
        work(store, first, stages(store, tmp_path, kill), LEASE_S, quiet)
    assert take(store) is None
    second = take(store, LEASE_S + 5)
    assert (second.id, second.attempt) == (first.id, 2)
    said = []
    work(store, second, stages(store, tmp_path), LEASE_S, said.append)
    assert state_of(store, first.id) == DONE
    assert [row["model_version"] for row in list_candidates(store, 9)] == ["4"]
    assert take(store, 2 * LEASE_S) is None
    # What was finished before is not done again; the stage it died in may be.
    calls = (tmp_path / "calls").read_text().split()
    assert list(dict.fromkeys(calls)) == list(NAMES)
    repeated = {where.split()[1]} if where.startswith("after") else set()
    assert {name for name in NAMES if calls.count(name) == 2} == repeated and len(calls) == 4 + len(repeated)
    number = NAMES.index(where.split()[1])
    assert sum("finished by an earlier attempt" in line for line in said) == number


EXIT = """
import os, sys
from pathlib import Path
from store.database import open_store
from tests.test_ray_jobs_retraining_driver import LEASE_S, quiet, stages, take, work
store = open_store(sys.argv[1])
kill = lambda where: os._exit(9) if where == "after train" else None
work(store, take(store), stages(store, Path(sys.argv[2]), kill), LEASE_S, quiet)
"""


def test_a_process_that_is_gone_is_followed_by_another(tmp_path):
    url = f"sqlite:///{tmp_path}/store.db"
    store = open_store(url)
    request_id = request_retraining(store, "manual", "manual", "new camera", "Ada")[0]["id"]
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    done = subprocess.run([sys.executable, "-c", EXIT, url, str(tmp_path)], env=environment, timeout=50, check=False)
    assert done.returncode == 9 and find_retraining(store, request_id)["state"] == "running"
    work(store, take(store, LEASE_S + 5), stages(store, tmp_path), LEASE_S, quiet)
    assert state_of(store, request_id) == DONE and len(list_candidates(store, 9)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_that_fails_is_named_with_its_reason_and_not_tried_again(store, tmp_path, name):
    claim = take(store)
    with pytest.raises(StageFailedError, match=f"stage {name} failed: no {name} at all") as error:
        work(store, claim, stages(store, tmp_path, fail=name), LEASE_S, quiet)
    assert error.value.by_user and error.value.stage == name
    row = find_retraining(store, claim.id)
    assert (row["state"], row["stage"], row["error"]) == ("failed", name, f"no {name} at all")
    assert list(row["detail"].get("stages", {})) == list(NAMES[: NAMES.index(name)])
    assert take(store, 2 * LEASE_S) is None


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_store_that_is_away_fails_nothing(store, tmp_path, wrapped):
    def away(finished):
        try:
            raise StoreUnavailableError("gone")
        except StoreUnavailableError as error:
            if wrapped:
                raise ValueError("store_url: gone") from error
            raise

    claim = take(store)
    with pytest.raises(StoreUnavailableError, match="gone"):
        work(store, claim, {**stages(store, tmp_path), "train": away}, LEASE_S, quiet)
    assert state_of(store, claim.id)["state"] == "running"
    work(store, take(store, LEASE_S + 5), stages(store, tmp_path), LEASE_S, quiet)
    assert state_of(store, claim.id) == DONE


def test_a_driver_that_lost_its_lease_is_interrupted_and_writes_nothing(store, tmp_path):
    claim = take(store)
    interrupted = threading.Event()

    def slow(finished):
        with store.writing() as connection:
            mine = retrain_requests.c.id == claim.id
            connection.execute(sql.update(retrain_requests).where(mine).values(attempt=2))
        assert interrupted.wait(20)
        raise KeyboardInterrupt

    with pytest.raises(RetrainTakenOverError, match="attempt 1 is not the one"):
        work(store, claim, {**stages(store, tmp_path), "train": slow}, 0.2, quiet, interrupted.set)
    row = find_retraining(store, claim.id)
    assert (row["state"], row["attempt"], list(row["detail"]["stages"])) == ("running", 2, ["prepare"])


def test_the_main_thread_is_woken_by_a_lost_lease(tmp_path):
    """Without an `interrupt` of its own: what ends a training that runs for hours."""
    store = open_store(f"sqlite:///{tmp_path}/store.db")
    request_retraining(store, "manual", "manual", "new camera", "Ada")
    claim = take(store)
    with store.writing() as connection:
        connection.execute(sql.update(retrain_requests).values(attempt=2))
    began = time.monotonic()
    with pytest.raises(RetrainTakenOverError), LeaseKeeper(store, claim, 0.2, quiet):
        threading.Event().wait(120)
    # Woken, and not found once the wait was over.
    assert time.monotonic() - began < 100


def test_a_lease_is_renewed_while_a_stage_runs(store, tmp_path):
    claim = take(store)
    before = find_retraining(store, claim.id)["leased_until"]

    def slow(finished):
        deadline = now_us() + 20_000_000
        while find_retraining(store, claim.id)["leased_until"] == before:
            assert now_us() < deadline, "never renewed"
        return {}

    work(store, claim, {"train": slow}, 0.4, quiet)


def test_figures_that_json_cannot_hold_become_null():
    assert json_value({"a": (1, float("inf"), {"b": float("nan")})}) == {"a": [1, None, {"b": None}]}
