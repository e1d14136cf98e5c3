"""Jobs killed at each of their durable steps and run again: the same end as without, and each decision once."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sql

from data_pipelines.image_dataset import open_dataset
from modeling.engine_set import find_engine_set
from modeling.network_file import NetworkFile
from modeling.registry import Registry
from monitoring.prediction_log import PredictionLog, PredictionRecord
from ray_jobs import deploy_service, export_engine, export_predictions, train_model
from ray_jobs.export_predictions import ExportPredictionsConfig
from ray_jobs.service_rollout import Rollout
from ray_jobs.verify_audit import VerifyAuditConfig
from ray_jobs.verify_audit import run as verify_audit
from store.api_keys import create_api_key, hash_key, list_api_keys
from store.candidates import list_candidates, record_candidate
from store.database import look_at_store, open_store
from store.image_files import prepare_image
from store.labels import NewLabel, add_label
from store.retraining import find_retraining, request_retraining
from store.tables import alarm_deliveries, exports, retrain_requests
from tests import small_population, test_ray_jobs_apply_retention, test_ray_jobs_erase_patient
from tests.bundle_factory import lesion_image, served_bundle
from tests.dark_spots import prepare_dark_spots
from tests.drift_population import lesions, records
from tests.killed_jobs import Home, Job, check_every_kill, files, rows
from tests.log_rows import prediction_row
from tests.old_stores import all_rows, make_version_1, plain_engine
from tests.test_data_pipelines_label_additions import TASK, World
from tests.test_ray_jobs_check_drift import FIRST_DAY, SETTINGS, drift_bundle, midnight
from tests.tiny_bundle import tiny_bundle
from tests.webhook_receiver import webhook_receiver

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Imported once, before any job starts: the first job's wish counts for the whole run.
HEAVY = ("evidently", "sklearn.linear_model", "mlflow", "mlflow.tracking", "tests.test_ray_jobs_killed")


@pytest.fixture
def home(tmp_path, monkeypatch):
    # This process would go on reading a database that `Home.restore` has removed: MLflow keeps connections open.
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture
def check(home, tmp_path):
    """Kills a job with this config at each step, from the home as it is now; returns the number of steps."""

    def call(verb, config, state, stand_in=None, **options):
        job = Job(verb, config, home, HEAVY, stand_in)
        return check_every_kill(job, Home(home, tmp_path / "kept"), state, **options)

    return call


def store_of(home):
    return f"sqlite:///{home}/store.db"


def audit_of(store_url):
    """What was done to what; a job that was killed and run again may say twice that it did it."""
    with closing(open_store(store_url)) as store:
        return {(entry["actor"], entry["action"], entry["subject"]) for entry in store.audit_entries()}


def without_audit(found):
    return {name: table for name, table in found.items() if name != "audit"}


def test_check_drift_leaves_one_report_one_alarm_of_each_kind_sent_once(home, check):
    bundle = drift_bundle(home / "bundle")
    log = PredictionLog(store_of(home), str(home / "images"), str(home / "spool"))
    answered = records(lesions(30, 2, (2, 3), shifted=True), midnight(0))
    log.write(answered, {})
    for number, record in enumerate(answered[:50]):
        add_label(log.store, NewLabel(record.id, ("benign", "malignant")[number % 2], number % 2 == 1, "Ada"), "clinic")
    log.store.close()
    places = {"store_url": store_of(home), "out": str(home / "drift"), "bundle": str(bundle)}
    settings = {"settings": SETTINGS | {"num_resamples": 100, "num_splits": 10}}

    def leases_end():
        with closing(open_store(store_of(home))) as store, store.writing() as connection:
            connection.execute(sql.update(alarm_deliveries).values(leased_until=None, next_attempt_at=0))

    def state():
        # Evidently draws ids for its pages.
        return rows(store_of(home), "attempts", "sent_at"), files(home / "drift", contents=False)

    with webhook_receiver() as receiver:
        channel = {"name": "chat", "url": receiver.url, "format": "text"}
        config = {**places, **settings, "start": FIRST_DAY, "alarms": {"channels": [channel]}}
        # A run takes Evidently's 2 s: every third step.
        assert check("check_drift", config, state, max_points=10, after_kill=leases_end) >= 20
    # One message, whoever sent it: it may come twice, and receivers take an id once.
    assert len(set(receiver.ids)) == 1
    found = rows(store_of(home))
    (alarm,), (report,) = found["alarms"], found["drift_reports"]
    assert "'drift'" in alarm and '"quality"' in report and len(found["labels"]) == 50
    assert found["alarm_deliveries"] and all("'sent'" in row for row in found["alarm_deliveries"])
    assert any(name.startswith("workspace/") for name in files(home / "drift"))


def test_export_engine_leaves_a_set_its_networks_and_nothing_beside_them(home, tmp_path, check):
    registry = Registry(f"sqlite:///{home}/mlflow.db", "dermray", str(home / "artifacts"))
    dataset = prepare_dark_spots(tmp_path, 240, 2, 3)
    bundle = tiny_bundle(tmp_path / "bundle", dataset_digest=open_dataset(dataset).digest)
    version = registry.log_candidate(bundle.directory, "run", {}, {})
    sets = home / "engine_sets"
    # int8 always passes: which networks are kept is no matter of chance.
    loose = {"auc": 0.5, "pauc": 0.5, "mean_probability": 0.5}
    config = {"model": version.version, "dataset": str(dataset), "rounds": 1, "limits": loose}
    config |= {"int8": {"pictures": 64}, "better_int8": None, "engine_sets": str(sets)}
    config |= {"tracking_uri": registry.tracking_uri, "artifact_root": str(home / "artifacts")}

    def state():
        found = find_engine_set(sets, bundle.digest)
        verdicts = {report.candidate.name: report.passed for report in found.candidates}
        # What is fastest is a matter of chance here, and with it which network has a copy in MLflow.
        for network in (report.candidate.choice.get("network") for report in found.candidates):
            assert network is None or NetworkFile(**network).fetch(tmp_path / "cache").exists()
        return verdicts, files(sets, contents=False)

    assert check("export_engine", config, state, max_points=8) >= 8
    names = files(sets, contents=False)
    assert {Path(name).suffix for name in names} == {".onnx", ".csv", ".json"}


@pytest.mark.parametrize("rollback", [False, True])
def test_promote_model_moves_the_champion_once(home, tmp_path, check, rollback):
    registry = Registry(f"sqlite:///{home}/mlflow.db", "dermray", str(home / "artifacts"))
    places = {
        "tracking_uri": registry.tracking_uri,
        "artifact_root": str(home / "artifacts"),
        "engine_sets": str(home / "engine_sets"),
    }
    reports = {"reports": str(home / "reports")}
    config = places | reports | {"approver": "Ada", "reason": "better", "store_url": store_of(home)}
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

    def state():
        fresh = Registry(registry.tracking_uri, "dermray", str(home / "artifacts"))
        history = [{name: value for name, value in event.items() if name != "at"} for event in fresh.history()]
        stored = rows(config["store_url"], "gate", "detail")
        return fresh.find("champion"), history, stored, files(home / "reports", contents=False)

    # MLflow's own commits are among them: more than fifty.
    assert rollback or state()[0] is None
    back = {"rollback": True, "model": "2"} if rollback else {}
    check("promote_model", config | back, state, max_points=12)
    assert state()[0].version == "1"


def test_make_sample_leaves_the_same_files_and_nothing_beside_them(home, check):
    config = {"out": str(home / "sample"), "num_patients": 4, "lesions_per_patient": 2, "num_test_patients": 2}
    assert check("make_sample", config, lambda: files(home)) >= 9
    assert len(files(home)) == 5


@pytest.mark.parametrize("labels", [False, True])
def test_prepare_dataset_leaves_one_version_and_nothing_beside_it(home, check, labels):
    world = World(home)
    world.labelled("m", 901, "Jane")
    world.labelled("b", 902, None, "benign")
    world.log.store.close()
    config = {
        "images": str(world.images),
        "metadata": str(world.metadata),
        "out": str(world.out),
        "task": TASK.model_dump(),
        "num_folds": 3,
        "gate_fraction": 0.2,
    }
    if labels:
        key = str(home / "secrets" / "patient_hmac.key")
        store = {"store_url": store_of(home), "images_url": str(home / "images")}
        config["add_labels"] = {"require": "agreed", "patient_key_file": key, **store}
    assert check("prepare_dataset", config, lambda: (rows(store_of(home)), files(home / "datasets"))) >= 10
    (version,) = (path for path in world.out.iterdir() if path.is_dir())
    assert {path.name for path in world.out.iterdir()} == {"LATEST", version.name}
    assert (version / "added.hdf5").exists() == labels


def days_of_log(home, names=("p1", "p2", "p3")):
    store = open_store(store_of(home))
    store.insert_predictions([prediction_row(name, received_at=midnight(0) + 5, risk=0.1) for name in names])
    add_label(store, NewLabel(names[0], "malignant", True, "Dr Weber"), "clinic")
    store.close()


def test_export_predictions_leaves_one_file_one_row_one_entry(home, check):
    days_of_log(home)
    config = {"start": FIRST_DAY, "end": FIRST_DAY, "out": str(home / "out"), "store_url": store_of(home)}
    assert check("export_predictions", config, lambda: (rows(store_of(home)), files(home / "out"))) >= 4
    assert len(files(home / "out")) == 1


def test_apply_retention_removes_what_is_due_also_from_the_write_ahead_log(home, check):
    place = test_ray_jobs_apply_retention.Place(home, store_of(home))
    window = {"start": "2024-05-01", "end": "2024-05-01"}
    export_predictions.run(
        ExportPredictionsConfig(**window, out=str(home / "out"), store_url=store_of(home), role="both")
    )
    with place.store.writing() as connection:
        connection.execute(sql.update(exports).values(created_at=test_ray_jobs_apply_retention.OLD))
    place.store.close()
    config = {"store_url": store_of(home), "images_url": place.files.url, "exports_days": 30}

    def state():
        # Before the store is opened, and closed, which empties the log.
        left = [path.name for path in home.glob("store.db*") if b"old-shared" in path.read_bytes()]
        return (
            left,
            without_audit(rows(store_of(home))),
            audit_of(store_of(home)),
            files(home / "out"),
            place.pictures(),
        )

    assert check("apply_retention", config | test_ray_jobs_apply_retention.EVERYTHING, state) >= 8
    assert state()[0] == [] and place.pictures() and not files(home / "out")
    assert "old-shared" not in str(state()[1]) and "recent-shared" in str(state()[1])


def test_erase_patient_reaches_every_copy(home, check):
    erasure = test_ray_jobs_erase_patient
    place = erasure.Place(home, store_of(home))
    erasure.register(place)
    picture = prepare_image(lesion_image(1))
    log = PredictionLog(store_of(home), str(home / "pictures"), str(home / "spool"))
    fields = {"model_version": "1", "context": "none", "image_hash": picture.hash, "patient_hmac": erasure.THEIRS}
    log.write([PredictionRecord(id="pictured", received_at=erasure.START_US, **fields)], {picture.hash: picture.data})
    log.store.close()
    place.store.close()
    config = {
        "patient_id": erasure.PATIENT,
        "actor": "dpo",
        "datasets": [str(place.datasets)],
        "patient_key_file": str(home / "key"),
        "store_url": store_of(home),
        "images_url": str(home / "pictures"),
        "spool_dir": str(home / "spool"),
    }

    def state():
        theirs = erasure.THEIRS.encode()
        left = [path.name for path in home.glob("store.db*") if b"pictured" in path.read_bytes()]
        copies = {name: hash_ for name, hash_ in files(home).items() if not name.startswith("store.db")}
        held = [name for name in copies if theirs in (home / name).read_bytes()]
        # An entry counts what its own run removed, and a killed one has removed some. Where the new version was there
        # and not yet noted, the next run finds it, looks through it, and says so once more.
        return left, held, copies, without_audit(rows(store_of(home))), audit_of(store_of(home))

    assert check("erase_patient", config, state) >= 30
    assert state()[:2] == ([], []) and not any(name.startswith("pictures/") for name in files(home))
    assert "others" in str(state()[3]["predictions"])


def log_of_ten(home):
    log = PredictionLog(store_of(home), str(home / "images"), str(home / "spool"))
    for number in range(10):
        picture = prepare_image(lesion_image(number))
        fields = {"model_version": "7", "context": "none", "risk": 0.03 * number, "threshold": 0.05, "band": "low"}
        record = PredictionRecord(id=f"p{number}", received_at=1_000 + number, image_hash=picture.hash, **fields)
        log.write([record], {picture.hash: picture.data})
    log.store.close()
    tiny_bundle(home / "bundle", contexts=["image_only", "none"])
    return {"bundle": str(home / "bundle"), "store_url": store_of(home)}


def test_import_labels_stores_each_label_and_its_alarm_once(home, check):
    config = log_of_ten(home)
    lines = [
        "prediction_id,label,labeller,labelled_at,confidence,comment,adjudication",
        "p0,malignant,Dr A,2024-06-01,0.9,,",
        "p0,benign,Dr B,2024-06-02,,looks fine,no",
        "p5,malignant,Dr A,2024-06-03,,,",
        "p9,benign,pathology,2024-06-04,1,histology,yes",
        "gone,benign,Dr A,2024-06-04,1,,",
    ]
    (home / "labels [2].csv").write_text("\n".join(lines))
    config |= {"file": str(home / "labels [2].csv"), "out": str(home / "reports")}

    def state():
        # How many were new is what the last run saw.
        reports = {path.name: json.loads(path.read_text())["problems"] for path in (home / "reports").glob("*.json")}
        return rows(store_of(home)), files(home / "reports", contents=False), reports

    assert check("import_labels", config, state) >= 7
    found = rows(store_of(home))
    assert len(found["labels"]) == 4 and len(found["alarms"]) == 1


def test_export_label_tasks_leaves_the_same_files_and_nothing_beside_them(home, check):
    config = log_of_ten(home) | {"out": str(home / "tasks"), "num_tasks": 4}
    assert check("export_label_tasks", config, lambda: (rows(store_of(home)), files(home / "tasks"))) >= 6
    assert list(files(home / "tasks")) == ["labelling_config.xml", "tasks.json"]


def test_verify_audit_leaves_whole_anchors_of_the_chain_and_the_store_as_it_was(home, check):
    days_of_log(home)
    config = {"store_url": store_of(home), "anchor": str(home / "anchors" / "audit.jsonl")}
    verify_audit(VerifyAuditConfig(**config))

    def state():
        # Each run adds an anchor: of the same end.
        lines = [json.loads(line) for line in Path(config["anchor"]).read_text().splitlines()]
        found = {(line["id"], line["hash"]) for line in lines}
        return found, rows(store_of(home)), files(home / "anchors", contents=False)

    assert check("verify_audit", config, state) >= 2
    assert len(state()[0]) == 1


def test_manage_api_keys_leaves_no_key_that_nobody_has(home, check):
    open_store(store_of(home)).close()
    file = home / "keys" / "clinic"
    config = {"action": "create", "name": "clinic", "role": "caller", "actor": "Ada"}

    def state():
        with closing(open_store(store_of(home))) as store:
            live = [(key.name, key.role, key.key_hash) for key in list_api_keys(store)]
            entries = [(entry["actor"], entry["action"]) for entry in store.audit_entries()]
        written = hash_key(file.read_text().strip())
        held = [(name, role, key_hash == written) for name, role, key_hash in live]
        return held, entries, stat.S_IMODE(file.stat().st_mode), files(home / "keys", contents=False)

    assert check("manage_api_keys", config | {"store_url": store_of(home), "key_file": str(file)}, state) >= 4
    assert state()[0] == [("clinic", "caller", True)] and state()[2] == 0o600


def test_manage_api_keys_revokes_once(home, check):
    with closing(open_store(store_of(home))) as store:
        key, _ = create_api_key(store, "clinic", "caller", "Ada")
    config = {"action": "revoke", "id": key.id, "actor": "Bob", "store_url": store_of(home)}

    def state():
        with closing(open_store(store_of(home))) as store:
            return rows(store_of(home), "revoked_at"), [key.revoked_at is None for key in list_api_keys(store)]

    assert check("manage_api_keys", config, state) >= 1
    assert state()[1] == [False]


def test_upgrade_store_is_all_or_nothing(home, check):
    make_version_1(store_of(home))
    before = all_rows(plain_engine(store_of(home)))

    def state():
        store, version = look_at_store(store_of(home))
        store.close()
        engine = plain_engine(store_of(home))
        with engine.connect() as connection:
            schema = sorted(connection.exec_driver_sql("SELECT type, name, sql FROM sqlite_master").all(), key=str)
        found = {name: rows for name, rows in all_rows(engine).items() if name != "schema_version"}
        engine.dispose()
        return version, schema, found

    assert check("upgrade_store", {"store_url": store_of(home)}, state) >= 1
    assert len(state()[2]["predictions"]) == len(before["predictions"]) == 1


def stand_in_for_serve():
    """A cluster that takes every deploy: what happens there is in test_ray_jobs_deploy_killed."""
    for name in ("connect", "cluster_nodes", "check_room", "start_serve", "running_service"):
        setattr(deploy_service, name, lambda *_: None)
    Rollout._deploy = lambda *_: None
    Rollout.model_card = lambda _: None


def test_deploy_service_leaves_one_key_one_release_and_one_store(home, check):
    bundle = served_bundle(home / "bundle")
    key = home / "secrets" / "patient_hmac.key"
    places = {"images_url": str(home / "images"), "spool_dir": str(home / "spool"), "engine_sets": str(home / "sets")}
    config = {"bundle": bundle.bundle_uri, "store_url": store_of(home), "patient_key_file": str(key)}
    config |= {"releases": str(home / "releases"), **places}

    def state():
        made = sorted(str(path.relative_to(home)) for path in home.iterdir() if not path.name.startswith("store.db"))
        keys = files(home / "secrets", contents=False), key.stat().st_size, stat.S_IMODE(key.stat().st_mode)
        return made, keys, files(home / "releases"), rows(store_of(home))

    assert check("deploy_service", config, state, stand_in_for_serve) >= 8
    assert state()[:2] == (["bundle", "releases", "secrets"], ({"patient_hmac.key": ""}, 32, 0o600))


def stand_in_for_ray():
    """Training without a cluster: a tiny bundle, registered as `train_model` registers its own. Engines: none."""

    def train(config):
        registry = Registry(config.tracking_uri, config.model_name, config.artifact_root)
        digest = hashlib.sha256(str(config.run_name).encode()).hexdigest()
        folder = Path(config.bundles) / digest[:12]
        if folder.exists():
            shutil.rmtree(folder)
        bundle = tiny_bundle(folder, name="candidate")
        version = registry.log_candidate(bundle.directory, config.run_name, {}, {})
        gate = {name: train_model.summary(bundle.metrics(name)["gate"]) for name in bundle.manifest.contexts}
        return {"model_version": version.version, "digest": bundle.digest, "run_name": config.run_name, "gate": gate}

    train_model.run = train
    export_engine.run = lambda config: {"device": "none", "choice": None, "engine_set": None}


def test_retrain_ends_a_request_with_one_candidate(home, tmp_path, check):
    registry = Registry(f"sqlite:///{home}/mlflow.db", "dermray", str(home / "artifacts"))
    registry.log_candidate(tiny_bundle(tmp_path / "bundle", name="first").directory, "first", {}, {})
    task = small_population.BINARY.model_copy(update={"label_values": ["0", "1"]})
    table = small_population.lesions(patients=20, each=3).drop(columns=["fold", "label", "context"])
    table = table.rename(columns={"id": "isic_id", "group": "patient_id"})
    table["target"] = np.arange(len(table)) % 2
    pd.DataFrame(table).to_csv(home / "metadata.csv", index=False)
    values = {"images": None, "metadata": str(home / "metadata.csv"), "out": str(home / "datasets")}
    values |= {"task": task.model_dump(mode="json"), "num_folds": 2, "fold_by": None}
    (home / "prepare.yaml").write_text(json.dumps(values))
    with closing(open_store(store_of(home))) as store:
        request = request_retraining(store, "manual", "manual", "new camera", "Ada")[0]["id"]
    config = {
        "prepare": {"config": str(home / "prepare.yaml")},
        "runs": str(home / "runs"),
        "bundles": str(home / "bundles"),
        "engine_sets": str(home / "engine_sets"),
        "store_url": store_of(home),
        "tracking_uri": registry.tracking_uri,
        "artifact_root": str(home / "artifacts"),
        # Longer than any run here: the thread that renews it makes no step of its own.
        "lease_s": 3000,
        "max_attempts": 2,
    }

    def lease_ends():
        with closing(open_store(store_of(home))) as store, store.writing() as connection:
            connection.execute(sql.update(retrain_requests).values(leased_until=1))

    def state():
        fresh = Registry(registry.tracking_uri, "dermray", str(home / "artifacts"))
        found = fresh.client.search_model_versions("name = 'dermray'")
        digests = {str(version.version): fresh.resolve(str(version.version)).digest for version in found}
        # A bundle says when it was made: trained again it has another digest, which then stands everywhere.
        # Engine sets say when they were made, and how fast the engines were.
        stored = rows(store_of(home), "job_id", "content")
        for version, digest in digests.items():
            stored = {
                table: [row.replace(digest, f"bundle {version}") for row in texts] for table, texts in stored.items()
            }
        return sorted(digests), fresh.find("candidate").version, stored, files(home / "datasets")

    # MLflow's own commits are among them: more than fifty.
    assert check("retrain", config, state, stand_in_for_ray, max_points=16, after_kill=lease_ends) >= 16
    assert state()[0] == ["1", "2"] and state()[1] == "2"
    with closing(open_store(store_of(home))) as store:
        assert find_retraining(store, request)["state"] == "done"
        assert [row["model_version"] for row in list_candidates(store, 9)] == ["2"]
