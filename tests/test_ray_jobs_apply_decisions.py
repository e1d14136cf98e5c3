"""What people decide at the service is done by the job, once, in their name; the gate has its say."""

from __future__ import annotations

import json
import shutil

import pytest

from modeling.registry import Registry
from ray_jobs import apply_decisions, deploy_service, export_engine, promote_model
from ray_jobs.apply_decisions import ApplyDecisionsConfig
from store.candidates import approve_candidate, find_candidate, record_candidate, reject_candidate
from store.champions import ask_rollback, champion_on_record, decisions, open_rollback
from store.database import StoreUnavailableError, open_store
from store.model_facts import find_model_facts
from tests.tiny_bundle import tiny_bundle

POOR = {"auc": {"value": 0.6, "low": 0.5, "high": 0.7}, "sensitivity": 0.4}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """A good model and a poor one, with engine sets; and one MLflow database, which takes seconds to make."""
    root = tmp_path_factory.mktemp("models")
    made = {"good": tiny_bundle(root / "good"), "poor": tiny_bundle(root / "poor", POOR)}
    for bundle in made.values():
        places = {"model": str(bundle.directory), "engine_sets": str(root / "engine_sets")}
        places |= {"tracking_uri": f"sqlite:///{root}/mlflow.db", "artifact_root": str(root / "artifacts")}
        export_engine.run(export_engine.ExportEngineConfig(rounds=1, **places))
    return root, made


class Clinic:
    """A registry, a store, and the jobs' configs; `deployed`: versions that the service was swapped to."""

    def __init__(self, root, bundles, name):
        shared, self.bundles = bundles
        self.deployed = []
        self.down = False
        places = {"tracking_uri": f"sqlite:///{shared}/mlflow.db", "artifact_root": str(root / "artifacts")}
        places |= {"model_name": name, "engine_sets": str(shared / "engine_sets")}
        places |= {"store_url": f"sqlite:///{root}/store.db"}
        self.registry = Registry(places["tracking_uri"], name, places["artifact_root"])
        self.store = open_store(places["store_url"])
        self.deploy_file, self.promote_file = root / "deploy.yaml", root / "promote.yaml"
        self.deploy_file.write_text(json.dumps(places))
        self.promote_file.write_text(json.dumps(places | {"deploy_config": str(self.deploy_file)}))

    def deploy(self, config):
        if self.down:
            raise ValueError("no Ray cluster")
        self.deployed.append(self.registry.resolve(config.model).version)
        return {"model_version": self.deployed[-1]}

    def candidate(self, name="good", approved_by="Ada"):
        found = self.registry.log_candidate(self.bundles[name].directory, "run", {}, {})
        record_candidate(self.store, found.version, found.digest, {})
        if approved_by is not None:
            approve_candidate(self.store, find_candidate(self.store, found.version), approved_by, "fewer missed")
        return found.version

    def apply(self, **values):
        return apply_decisions.run(ApplyDecisionsConfig(promote_config=str(self.promote_file), **values))

    def promote(self, *flags):
        """What an operator does by hand."""
        promote_model.run(promote_model.parse_config(promote_model.PromoteModelConfig, flags, self.promote_file))

    def decisions(self):
        return [(row["decision"], row["model_version"], row["approver"]) for row in reversed(self.store.approvals())]


@pytest.fixture
def clinic(tmp_path, bundles, monkeypatch):
    clinic = Clinic(tmp_path, bundles, tmp_path.name)
    monkeypatch.setattr(deploy_service, "run", clinic.deploy)
    return clinic


def test_an_approved_candidate_becomes_the_champion_and_the_service_is_swapped(clinic):
    clinic.candidate()
    outcome = clinic.apply()
    (done,) = outcome["done"]
    assert (done["champion"], done["approver"], done["changed"]) == ("1", "Ada", True) and outcome["refused"] == []
    assert clinic.deployed == ["1"] and clinic.registry.resolve("champion").version == "1"
    assert clinic.apply() == {"done": [], "refused": []} and clinic.deployed == ["1"]
    assert find_candidate(clinic.store, "1")["state"] == "promoted"


def test_nothing_is_promoted_that_nobody_approved(clinic):
    clinic.candidate(approved_by=None)
    assert clinic.apply() == {"done": [], "refused": []}
    assert clinic.registry.find("champion") is None


def test_a_rollback_that_was_asked_for_is_done_in_the_name_of_who_asked(clinic):
    for _ in range(2):
        clinic.candidate()
        clinic.apply()
    assert champion_on_record(clinic.store)[:2] == ("2", "1")
    ask_rollback(clinic.store, "2", "Cleo", "misses on site 4")
    (done,) = clinic.apply()["done"]
    assert (done["action"], done["champion"], done["previous"], done["approver"]) == ("rollback", "1", "2", "Cleo")
    assert clinic.registry.history()[-1]["reason"] == "misses on site 4"
    assert clinic.deployed == ["1", "2", "1"] and open_rollback(clinic.store) is None
    assert [find_candidate(clinic.store, version)["state"] for version in "12"] == ["promoted", "rejected"]
    assert clinic.apply() == {"done": [], "refused": []}


def test_going_back_comes_before_what_was_approved(clinic):
    for _ in range(2):
        clinic.candidate()
        clinic.apply()
    clinic.candidate()
    ask_rollback(clinic.store, "2", "Cleo", "misses on site 4")
    assert [row["champion"] for row in clinic.apply()["done"]] == ["1", "3"]


def test_the_gate_refuses_whatever_was_approved(clinic):
    clinic.candidate("poor")
    clinic.candidate("good")
    outcome = clinic.apply()
    assert [row["champion"] for row in outcome["done"]] == ["2"]
    (refused,) = outcome["refused"]
    assert "min_auc (image_only) = 0.6" in refused["refused"]
    assert find_candidate(clinic.store, "1")["state"] == "rejected"
    gate = find_model_facts(clinic.store, [clinic.bundles["poor"].digest])[clinic.bundles["poor"].digest].gate
    assert not gate["passed"] and "min_auc" in [row["rule"] for row in gate["results"] if not row["passed"]]


def test_what_a_person_rejected_is_not_promoted_by_any_other_way(clinic):
    clinic.candidate()
    reject_candidate(clinic.store, find_candidate(clinic.store, "1"), "Bob", "scars look like melanoma to it")
    assert clinic.apply() == {"done": [], "refused": []}
    config = promote_model.parse_config(promote_model.PromoteModelConfig, ["--approver", "Ada"], clinic.promote_file)
    with pytest.raises(ValueError, match=r"version 1 was rejected by Bob \(scars look like melanoma to it\)"):
        promote_model.run(config)
    assert clinic.registry.find("champion") is None


class Killed(BaseException):
    """As if the process had ended here."""


@pytest.mark.parametrize("stage", ["_record", "_mark", "_deploy", "note_deployed"])
@pytest.mark.parametrize("way", ["promote", "rollback"])
def test_a_decision_cut_off_at_any_stage_is_finished_by_the_next_run(clinic, monkeypatch, stage, way):
    clinic.candidate()
    if way == "rollback":
        clinic.apply()
        clinic.candidate()
        clinic.apply()
        ask_rollback(clinic.store, "2", "Cleo", "misses on site 4")

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(promote_model, stage, kill)
        clinic.apply()
    clinic.apply()
    assert clinic.registry.resolve("champion").version == "1" == clinic.deployed[-1]
    expected = [("approve", "1", "Ada"), ("promote", "1", "Ada")]
    if way == "rollback":
        expected += [("approve", "2", "Ada"), ("promote", "2", "Ada"), ("ask_rollback", "2", "Cleo")]
        expected += [("rollback", "1", "Cleo")]
        assert find_candidate(clinic.store, "2")["state"] == "rejected"
    assert clinic.decisions() == expected and find_candidate(clinic.store, "1")["state"] == "promoted"
    swaps = len(clinic.deployed)
    assert clinic.apply() == {"done": [], "refused": []} and len(clinic.deployed) == swaps


def test_a_service_that_did_not_swap_is_swapped_by_the_next_run(clinic):
    clinic.candidate()
    clinic.down = True
    assert "no Ray cluster" in clinic.apply()["refused"][0]["refused"]
    clinic.down = False
    (done,) = clinic.apply()["done"]
    assert done["champion"] == "1" and done["changed"] is False and clinic.deployed == ["1"]


def once_before(monkeypatch, owner, name, act):
    """Has `act` happen when `name` is called next, before it does anything."""
    real = getattr(owner, name)

    def first(*arguments, **values):
        monkeypatch.setattr(owner, name, real)
        act()
        return real(*arguments, **values)

    monkeypatch.setattr(owner, name, first)


def test_two_jobs_that_go_back_at_once_go_back_by_one(clinic, monkeypatch):
    for _ in range(3):
        clinic.candidate()
        clinic.apply()
    ask_rollback(clinic.store, "3", "Cleo", "misses on site 4")
    once_before(monkeypatch, promote_model, "load_bundle", clinic.apply)
    clinic.apply()
    assert clinic.registry.resolve("champion").version == "2"
    assert [row[0] for row in clinic.decisions()].count("rollback") == 1
    assert champion_on_record(clinic.store)[:2] == ("2", "1")


def test_two_jobs_that_promote_at_once_record_it_once(clinic, monkeypatch):
    clinic.candidate()
    once_before(monkeypatch, type(clinic.store), "record_approval", clinic.apply)
    clinic.apply()
    assert clinic.decisions() == [("approve", "1", "Ada"), ("promote", "1", "Ada")]


def test_who_rejects_while_the_gate_judges_is_heard(clinic, monkeypatch):
    clinic.candidate()

    def reject():
        reject_candidate(clinic.store, find_candidate(clinic.store, "1"), "Bob", "scars")

    once_before(monkeypatch, promote_model, "judge_candidate", reject)
    assert "version 1 was rejected by Bob" in clinic.apply()["refused"][0]["refused"]
    assert clinic.registry.find("champion") is None and find_candidate(clinic.store, "1")["state"] == "rejected"


def test_a_promotion_cut_off_before_its_record_is_recorded_before_another(clinic, monkeypatch):
    clinic.candidate()
    clinic.apply()
    clinic.candidate()

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(promote_model, "_record", kill)
        clinic.apply()
    clinic.candidate(approved_by=None)
    clinic.promote("--approver", "Eve", "--model", "3")
    assert clinic.decisions()[2:] == [("approve", "2", "Ada"), ("promote", "2", "Ada"), ("promote", "3", "Eve")]
    # Its approval was used: it does not come back over the one who followed.
    assert clinic.apply() == {"done": [], "refused": []}
    assert find_candidate(clinic.store, "2")["state"] == "promoted"
    assert champion_on_record(clinic.store)[:2] == ("3", "2") == ("3", clinic.registry.previous_champion().version)


def test_of_two_approved_candidates_the_one_approved_last_has_the_last_word(clinic):
    """As if the job had run after each."""
    for _ in range(2):
        clinic.candidate()
    assert [row["champion"] for row in clinic.apply()["done"]] == ["1", "2"]


def test_a_champion_set_by_other_means_is_not_swapped_in_again_and_again(clinic):
    clinic.candidate()
    clinic.down = True
    clinic.apply()
    clinic.down = False
    clinic.candidate(approved_by=None)
    clinic.registry.client.set_registered_model_alias(clinic.registry.model_name, "champion", "2")
    for _ in range(2):
        (refused,) = clinic.apply()["refused"]
        assert "version 2 is the champion by no decision on record" in refused["refused"]
    assert clinic.deployed == []


def test_a_rollback_that_cannot_be_done_says_why_where_people_look(clinic):
    for _ in range(2):
        clinic.candidate()
        clinic.apply()
    ask_rollback(clinic.store, "2", "Cleo", "misses on site 4")
    shutil.rmtree(clinic.registry.resolve("1").uri.removeprefix("file://"))
    for _ in range(2):
        assert "no bundle at" in clinic.apply()["refused"][0]["refused"]
    rows = [row for row in decisions(clinic.store, 50) if row["action"] == "rollback_refused"]
    assert [(row["model_version"], row["person"]) for row in rows] == [("2", "Cleo")]
    assert "no bundle at" in rows[0]["reason"] and open_rollback(clinic.store) is not None


def test_what_fails_in_an_unforeseen_way_holds_up_nothing_else(clinic, monkeypatch):
    for _ in range(2):
        clinic.candidate()

    def down():
        raise ConnectionError("no registry")

    once_before(monkeypatch, promote_model, "gather_evidence", down)
    outcome = clinic.apply()
    assert outcome["refused"][0]["refused"] == "ConnectionError: no registry"
    assert [row["champion"] for row in outcome["done"]] == ["2"]


class Seen(Exception):
    """What the watch did; it would go on for an hour."""


def test_while_it_watches_a_decision_is_done_soon(clinic, monkeypatch):
    look = apply_decisions.apply_next
    clinic.candidate(approved_by=None)

    def looks(*arguments):
        outcome = look(*arguments)
        if outcome is not None:
            raise Seen(outcome["champion"])
        approve_candidate(clinic.store, find_candidate(clinic.store, "1"), "Ada", "fewer missed")

    monkeypatch.setattr(apply_decisions, "apply_next", looks)
    with pytest.raises(Seen, match="1"):
        clinic.apply(watch_s=3600, poll_s=0.1)
    assert clinic.deployed == ["1"]


def test_while_it_watches_a_store_that_is_down_for_a_moment_delays_a_decision_only(clinic, monkeypatch):
    clinic.candidate()

    def down():
        raise StoreUnavailableError("locked")

    once_before(monkeypatch, promote_model, "run", down)
    look = apply_decisions.apply_next

    def looks(*arguments):
        outcome = look(*arguments)
        raise Seen("tried again" if outcome is not None else "given up")

    def fails_first(*arguments):
        monkeypatch.setattr(apply_decisions, "apply_next", looks)
        return look(*arguments)

    monkeypatch.setattr(apply_decisions, "apply_next", fails_first)
    with pytest.raises(Seen, match="tried again"):
        clinic.apply(watch_s=3600, poll_s=0.1)
    assert clinic.deployed == ["1"]


def test_a_config_that_decides_something_itself_is_refused(clinic):
    clinic.promote_file.write_text(json.dumps({"approver": "Ada"}))
    with pytest.raises(ValueError, match="sets approver; expected what people decide at the service to do so"):
        clinic.apply()
