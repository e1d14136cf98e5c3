"""The job `retrain` on real jobs and a data set without pictures: from cause to candidate, cut off in between."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sqlalchemy as sql
from pydantic import ValidationError

from data_pipelines.synthetic_metadata import build_metadata
from data_pipelines.synthetic_patients import draw_latents
from modeling.registry import CHAMPION, Registry
from ray_jobs import retrain, retraining_stages, train_model
from ray_jobs.job import REPO_ROOT, parse_config, read_yaml
from ray_jobs.retrain import RetrainConfig
from store import audit_chain
from store.candidates import list_candidates
from store.database import open_store
from store.labels import NewLabel, add_label
from store.retraining import list_retrainings, request_retraining
from store.retraining_facts import count_new_labels
from store.retraining_queue import claim_retraining, fail_retraining
from store.tables import now_us, retrain_requests
from tests.log_rows import prediction_row

pytestmark = pytest.mark.slow

DAY_US = 86_400_000_000


class Killed(BaseException):
    """As of a process that is gone."""


class Place:
    """A folder with metadata of patients, a store and a registry, and the job's config there."""

    def __init__(self, home):
        self.home = home
        rng = np.random.default_rng([0, 150])
        table = build_metadata(draw_latents(150, 6.0, 0.15, rng), rng, "0000")
        table.to_csv(home / "metadata.csv", index=False)
        self.store_url = f"sqlite:///{home}/store.db"
        self.store = open_store(self.store_url)
        self.places = {
            "tracking_uri": f"sqlite:///{home}/mlflow.db",
            "artifact_root": str(home / "artifacts"),
            "model_name": "tabular",
        }
        self.registry = Registry(**{name: self.places[name] for name in self.places})

    def config(self, **values):
        data = {"images": None, "metadata": str(self.home / "metadata.csv"), "out": str(self.home / "dataset")}
        fields = {
            "prepare": {"config": "configs/prepare_dataset.yaml", "values": {**data, "num_folds": 3}},
            "train": {
                "config": "configs/train_model.yaml",
                "values": {
                    "build": {
                        "num_bootstrap": 50,
                        "fusion": {"boosters": [{"num_bags": 1}], "num_boost_round": 20},
                    }
                },
            },
            "runs": str(self.home / "runs"),
            "bundles": str(self.home / "bundles"),
            "engine_sets": str(self.home / "engine_sets"),
            "store_url": self.store_url,
        }
        return RetrainConfig(**{**fields, **self.places, **values})

    def run(self, **values):
        return retrain.run(self.config(**values))

    def requests(self):
        return list_retrainings(self.store, None, 100)

    def forget_drivers(self):
        """The leases of drivers that are gone run out."""
        with self.store.writing() as connection:
            connection.execute(sql.update(retrain_requests).values(leased_until=0))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("retrain"))


@pytest.fixture
def manual():
    return {"trigger": "manual", "reason": "new camera", "requested_by": "Ada"}


def test_a_training_that_was_cut_off_after_it_had_registered_leads_to_one_candidate(place, manual, monkeypatch):
    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train_model, "record_candidate", die)
        with pytest.raises(Killed):
            place.run(**manual)
    assert place.registry.find("candidate").version == "1" and list_candidates(place.store, 9) == []
    # Its lease has not run out: nothing is done, and nothing is asked for twice.
    assert place.run(**manual) == {"requested": None, "causes": [], "retrainings": [], "open": 1}
    place.forget_drivers()
    result = place.run(**manual)
    (done,) = result["retrainings"]
    assert (done["state"], done["attempt"], done["model_version"], result["open"]) == ("done", 2, "1", 0)
    (row,) = place.requests()
    stages = row["detail"]["stages"]
    assert list(stages) == ["prepare", "train", "export", "gate"]
    assert stages["export"] == {"skipped": "the model sees metadata alone"}
    assert stages["gate"]["passed"] is done["gate_passed"] and stages["gate"]["results"]
    (candidate,) = list_candidates(place.store, 9)
    origin = {name: candidate[name] for name in ("model_version", "requested_by", "retrain_id", "dataset_digest")}
    assert origin == {
        "model_version": "1",
        "requested_by": "Ada",
        "retrain_id": row["id"],
        "dataset_digest": stages["prepare"]["digest"],
    }
    assert candidate["gate_metrics"] == stages["train"]["gate"]
    assert place.registry.find("2") is None and place.registry.find(CHAMPION) is None
    assert audit_chain.verify(place.store.audit_entries()) == 2


def test_new_labels_train_once_and_a_failed_stage_leaves_the_champion_and_raises_an_alarm(place, monkeypatch, manual):
    place.registry.promote("1", "Ada", "first", {"passed": True})
    store = place.store
    store.insert_predictions([prediction_row(f"p{number}", model_version="1") for number in range(3)])
    for number in range(3):
        add_label(store, NewLabel(f"p{number}", "malignant", True, "Ada"), "Ada")
    rules = {"drift": None, "schedule": None, "new_labels": {"count": 3}}
    before = len(place.requests())
    assert place.run(triggers=rules | {"cool_down_days": 7})["causes"] == []

    def broken(*_):
        raise ValueError("the disk is full of lesion ISIC_7")

    with monkeypatch.context() as patch:
        patch.setattr(retraining_stages.promote_model, "judge_candidate", broken)
        patch.setattr(retraining_stages.prepare_dataset, "run", lambda _: _first(place)["prepare"])
        patch.setattr(retraining_stages.train_model, "run", lambda _: _first(place)["train"])
        with pytest.raises(ValueError, match="stage gate failed: the disk is full of lesion ISIC_7"):
            place.run(triggers=rules | {"cool_down_days": 0})
    row = place.requests()[0]
    assert (row["state"], row["stage"], row["error"]) == ("failed", "gate", "the disk is full of lesion ISIC_7")
    assert (row["trigger"], row["requested_by"]) == ("new_labels", retrain.ASKED_BY)
    assert row["detail"]["causes"] == {"new_labels": {"new_labels": 3, "needed": 3}}
    assert place.registry.find(CHAMPION).version == "1"
    (alarm,) = store.alarms()
    assert (alarm["kind"], alarm["dedupe_key"]) == ("retraining", f"retraining:{row['id']}")
    assert "stage gate" in alarm["message"] and "ISIC_7" not in json.dumps(alarm["detail"]) + alarm["message"]
    assert len(place.requests()) == before + 1
    # After the cool-down it is tried again, since it failed; the alarm is not repeated.
    with monkeypatch.context() as patch:
        patch.setattr(retraining_stages.prepare_dataset, "run", lambda _: _first(place)["prepare"])
        patch.setattr(retraining_stages.train_model, "run", lambda _: _first(place)["train"])
        (done,) = place.run(triggers=rules | {"cool_down_days": 0})["retrainings"]
        assert done["state"] == "done"
        # The cause has led to a candidate: it asks no more, whatever the cool-down.
        assert place.run(triggers=rules | {"cool_down_days": 0})["retrainings"] == []
    assert len(place.requests()) == before + 2 and len(store.alarms()) == 1


def test_a_cause_that_fails_again_in_the_same_stage_is_quiet(tmp_path):
    store = open_store(f"sqlite:///{tmp_path}/store.db")
    for trigger, stage in (("drift", "train"), ("drift", "train"), ("drift", "gate"), ("manual", "train")):
        request_retraining(store, trigger, trigger, "why", "Ada")
        fail_retraining(store, claim_retraining(store, 1_000_000, 3), stage, "no")
        retrain.raise_alarms(store)
        retrain.raise_alarms(store)
    told = [(alarm["topic"], alarm["detail"]["stage"], alarm["quieted_by"]) for alarm in store.alarms()[::-1]]
    assert told == [
        ("retraining:drift", "train", None),
        ("retraining:drift", "train", 1),
        ("retraining:drift", "gate", None),
        ("retraining:manual", "train", None),
    ]


def _first(place):
    return place.requests()[-1]["detail"]["stages"]


def test_labels_of_the_service_reach_the_data_that_is_trained_on(tmp_path):
    place = Place(tmp_path)
    config = place.config()
    config.prepare.values["add_labels"] = {"patient_key_file": None, "require": "agreed"}
    # Asked for before anything is labelled: the files alone.
    base = retraining_stages.prepare(config, {})
    place.store.insert_predictions([prediction_row(f"p{number}") for number in range(4)])
    for number, reader in ((0, "Ada"), (0, "Bob"), (1, "Ada"), (1, "Bob"), (2, "Ada"), (3, "Ada"), (3, "Bob")):
        label = "benign" if (number, reader) == (3, "Bob") else "malignant"
        add_label(place.store, NewLabel(f"p{number}", label, label == "malignant", reader), reader)
    now = now_us() + DAY_US
    # Two of four: one has a single reader, of one the readers disagree.
    assert count_new_labels(place.store, base["digest"], now, retrain.labels_required(config)) == 2
    made = retraining_stages.prepare(config, {})
    assert made["num_rows"] == base["num_rows"] + 2 and made["digest"] != base["digest"]
    assert count_new_labels(place.store, made["digest"], now, "agreed") == 0
    assert count_new_labels(place.store, made["digest"], now, "single") == 1


def test_the_shipped_config_adds_labels_from_its_own_store(tmp_path):
    flags = ["--store-url", f"sqlite:///{tmp_path}/other.db"]
    config = parse_config(RetrainConfig, flags, REPO_ROOT / "configs" / "retrain.yaml")
    job = retraining_stages._prepare_config(config, config.prepare)
    assert (job.add_labels.store_url, job.add_labels.required) == (config.store_url, False)
    assert retrain.labels_required(config) == job.add_labels.require == "agreed"


def test_drift_of_the_champion_asks_and_an_open_request_is_not_joined_by_another(place):
    config = place.config(triggers={"drift": {"windows": 2, "days": 3}, "new_labels": None, "schedule": None})
    config.triggers.cool_down_days = 0
    now = now_us()
    for age in (2, 1):
        start = now - age * DAY_US
        key = {"window_start": start, "window_end": start + DAY_US, "model_version": "1", "reference": "r"}
        plain = {"status": "drift", "num_rows": 1, "num_groups": 1, "drifted": ["age"], "statistics": {}}
        place.store.upsert_drift_report(
            key | plain | {"label_watermark": 0, "alarm": True, "input_digest": "x", "report": None}
        )
    waiting, _ = request_retraining(place.store, "manual", "manual", "new camera", "Ada")
    requested, causes = retrain.ask(config, place.store, now)
    assert requested is None and [trigger.kind for trigger in causes] == ["drift"]
    with place.store.writing() as connection:
        connection.execute(
            sql.update(retrain_requests).where(retrain_requests.c.id == waiting["id"]).values(state="done")
        )
    requested, _ = retrain.ask(config, place.store, now)
    assert retrain.ask(config, place.store, now)[0] is None
    row = next(row for row in place.requests() if row["id"] == requested)
    assert row["trigger"] == "drift" and row["reason"] == "2 windows of model 1 drifted within 3 days"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"trigger": "manual", "reason": "x"}, "requested_by is missing"),
        ({"trigger": "manual", "requested_by": "Ada", "reason": " "}, "reason is missing"),
        ({"trigger": "drift"}, "Input should be 'manual'"),
        ({"lease_s": 0}, "greater than or equal to 0.2"),
        ({"train": {"config": "x", "other": 1}}, "Extra inputs"),
    ],
)
def test_wrong_configs_are_refused(values, text):
    with pytest.raises(ValidationError, match=text):
        RetrainConfig(**values)


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ({"train": {"config": "configs/none.yaml"}}, "configs/none.yaml: No such file"),
        (
            {"train": {"config": "configs/train_model.yaml", "values": {"training": {"optimizer": {"epochs": 0}}}}},
            r"train \(configs/train_model.yaml\): training.optimizer.epochs = 0: ",
        ),
        ({"gate": {"config": "configs/promote_model.yaml", "values": {"rule": 1}}}, "unknown config key 'rule'"),
    ],
)
def test_a_wrong_step_is_refused_before_anything_is_asked(tmp_path, step, text):
    url = f"sqlite:///{tmp_path}/store.db"
    with pytest.raises(ValueError, match=text):
        retrain.run(RetrainConfig(store_url=url, trigger="manual", reason="x", requested_by="Ada", **step))
    assert not (tmp_path / "store.db").exists()


def test_flags_reach_the_steps(tmp_path):
    flags = ["--train.values.training.optimizer.epochs", "2", "--at", "2026-11-21T08:00:00Z", "--requested-by", "Ada"]
    config = parse_config(RetrainConfig, flags, REPO_ROOT / "configs" / "retrain.yaml")
    assert config.train.values == {"training": {"optimizer": {"epochs": 2}}}
    assert config.at.isoformat() == "2026-11-21T08:00:00+00:00" and config.requested_by == "Ada"
    job = retraining_stages.step_config("train", config.train, train_model.TrainModelConfig, {"run_name": "r"})
    before = read_yaml(REPO_ROOT / "configs" / "train_model.yaml")["training"]["optimizer"]
    assert job.training.optimizer.epochs == 2 and job.training.optimizer.batch_size == before["batch_size"]


def test_the_submitted_job_is_on_record(monkeypatch):
    assert retrain.job_id() is None
    facts = {"runtime_env": {}, "metadata": {"job_submission_id": "retrain-2026-11-21-1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(facts))
    assert retrain.job_id() == "retrain-2026-11-21-1"
