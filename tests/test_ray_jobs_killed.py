"""Jobs killed before each of their durable steps and run again: the same end as without, and each decision once."""

from __future__ import annotations

import pytest

from modeling.registry import Registry
from monitoring.prediction_log import PredictionLog
from ray_jobs import export_engine
from store.candidates import record_candidate
from store.database import open_store
from tests.drift_population import lesions, records
from tests.killed_jobs import Home, Job, check_every_kill, files, rows
from tests.test_ray_jobs_check_drift import FIRST_DAY, SETTINGS, drift_bundle, midnight
from tests.tiny_bundle import tiny_bundle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_check_drift(home, tmp_path):
    bundle = drift_bundle(home / "bundle")
    log = PredictionLog(f"sqlite:///{home}/store.db", str(home / "images"), str(home / "spool"))
    log.write(records(lesions(30, 2, (2, 3), shifted=True), midnight(0)), {})
    log.store.close()
    places = {"store_url": f"sqlite:///{home}/store.db", "out": str(home / "drift"), "bundle": str(bundle)}
    settings = SETTINGS | {"num_resamples": 100, "num_splits": 10}
    job = Job("check_drift", places | {"start": FIRST_DAY, "settings": settings}, ("evidently", "sklearn.linear_model"))

    def state():
        # Evidently draws ids for its pages.
        return rows(places["store_url"]), files(home / "drift", contents=False)

    assert check_every_kill(job, Home(home, tmp_path / "kept"), state) >= 4


@pytest.mark.parametrize("rollback", [False, True])
def test_promote_model(home, tmp_path, rollback):
    registry = Registry(f"sqlite:///{home}/mlflow.db", "dermray", str(home / "artifacts"))
    places = {
        "tracking_uri": registry.tracking_uri,
        "artifact_root": str(home / "artifacts"),
        "engine_sets": str(home / "engine_sets"),
    }
    config = places | {"approver": "Ada", "reason": "better", "store_url": f"sqlite:///{home}/store.db"}
    store = open_store(config["store_url"])
    for seed in range(1 + rollback):
        bundle = tiny_bundle(tmp_path / f"bundle{seed}", name=f"model{seed}")
        version = registry.log_candidate(bundle.directory, "run", {}, {})
        record_candidate(store, version.version, version.digest, {})
        export_engine.run(export_engine.ExportEngineConfig(**places, rounds=1))
        if rollback:
            from ray_jobs import promote_model

            promote_model.run(promote_model.PromoteModelConfig(**config))
    store.close()
    job = Job("promote_model", config | ({"rollback": True, "model": "2"} if rollback else {}), ("mlflow",))

    def state():
        fresh = Registry(registry.tracking_uri, "dermray", str(home / "artifacts"))
        history = [{name: value for name, value in event.items() if name != "at"} for event in fresh.history()]
        stored = rows(config["store_url"], "gate", "detail")
        return fresh.find("champion"), history, stored

    # MLflow's own commits are among them: about forty.
    check_every_kill(job, Home(home, tmp_path / "kept"), state, max_points=14)
