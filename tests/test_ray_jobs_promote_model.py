"""From candidate to champion and back: engines first, then the gate, with every decision on record."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sql
from mlflow import MlflowClient

from data_pipelines import table_scoring
from modeling.bundle import load_bundle
from modeling.engine_set import find_engine_set
from modeling.registry import Registry
from ray_jobs import deploy_service, export_engine, promote_model, promotion_evidence
from store import audit_chain
from store.candidates import approve_candidate, find_candidate, record_candidate
from store.database import open_store
from store.tables import candidates, retrain_requests
from tests.gate_lesions import bundle_of, make_lesions, stream_in_process
from tests.house import REPO_ROOT
from tests.tiny_bundle import tiny_bundle

POOR = {"auc": {"value": 0.6, "low": 0.5, "high": 0.7}, "sensitivity": 0.4}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    root = tmp_path_factory.mktemp("bundles")
    return {
        "good": tiny_bundle(root / "good"),
        "poor": tiny_bundle(root / "poor", POOR),
        "wrong_engine": tiny_bundle(root / "wrong_engine", onnx_bias=0.5),
    }


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """One MLflow database for the file: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def paths(tmp_path, database):
    return {
        "tracking_uri": database,
        "model_name": tmp_path.name,
        "artifact_root": str(tmp_path / "artifacts"),
        "engine_sets": str(tmp_path / "engine_sets"),
    }


@pytest.fixture
def registry(paths):
    return Registry(paths["tracking_uri"], paths["model_name"], paths["artifact_root"])


@pytest.fixture
def promote(paths, tmp_path):
    def call(**values):
        fields = {"approver": "Ada", "store_url": f"sqlite:///{tmp_path}/store.db"} | paths | values
        return promote_model.run(promote_model.PromoteModelConfig(**fields))

    return call


@pytest.fixture
def export(paths):
    def call(**values):
        return export_engine.run(export_engine.ExportEngineConfig(**{"rounds": 1} | paths | values))

    return call


@pytest.fixture
def store(tmp_path):
    return open_store(f"sqlite:///{tmp_path}/store.db")


def register(registry, bundle):
    return registry.log_candidate(bundle.directory, "run", {}, {})


def test_export_promote_and_roll_back(registry, bundles, promote, export, store, paths):
    first = register(registry, bundles["good"])
    exported = export()
    assert exported["model_version"] == "1"
    assert set(exported["chosen"].values()) <= {row["candidate"] for row in exported["candidates"]}
    assert find_engine_set(paths["engine_sets"], bundles["good"].digest).passed
    kept = registry.client.list_artifacts(first.run_id, "engine_sets")
    assert [os.path.basename(item.path) for item in kept if not item.is_dir] == [
        os.path.basename(exported["engine_set"])
    ]

    result = promote(reason="first model")
    assert (result["champion"], result["previous"], result["changed"]) == ("1", None, True)
    assert all(row["passed"] for row in result["gate"])
    assert registry.resolve("champion") == first
    assert load_bundle(first.uri, result["digest"]).digest == bundles["good"].digest

    register(registry, bundles["good"])
    assert promote(approver="Bob", reason="retrained")["champion"] == "2"
    back = promote(rollback=True, approver="Cleo", reason="misses on site 4")
    assert (back["champion"], back["previous"]) == ("1", "2")
    decisions = [(row["decision"], row["model_version"], row["approver"]) for row in store.approvals()]
    assert decisions == [("rollback", "1", "Cleo"), ("promote", "2", "Bob"), ("promote", "1", "Ada")]
    assert store.approvals()[1]["gate"]["results"][0]["rule"] == "bundle_hashes"
    assert [entry["actor"] for entry in store.audit_entries()] == ["Ada", "Bob", "Cleo"]
    audit_chain.verify(store.audit_entries())


def test_a_second_run_changes_nothing(registry, bundles, promote, export, store):
    register(registry, bundles["good"])
    export()
    promote()
    again = promote(approver="Bob")
    assert again["changed"] is False and again["approver"] == "Ada"
    register(registry, bundles["good"])
    promote()
    for _ in range(2):
        back = promote(rollback=True, model="2", approver="Cleo")
    assert back["changed"] is False and back["champion"] == "1"
    assert len(store.approvals()) == len(registry.history()) == 3


def test_a_record_that_was_cut_off_is_written_by_the_next_run(registry, bundles, promote, export, store, monkeypatch):
    register(registry, bundles["good"])
    export()
    with monkeypatch.context() as patch:
        patch.setattr(promote_model, "_record", lambda *_: (_ for _ in ()).throw(RuntimeError("cut off")))
        with pytest.raises(RuntimeError):
            promote()
    assert store.approvals() == []
    assert promote()["changed"] is False
    assert [row["model_version"] for row in store.approvals()] == ["1"]


def test_a_poor_model_is_refused_with_the_failed_rules_and_the_refusal_is_audited(
    registry, bundles, promote, export, store
):
    register(registry, bundles["poor"])
    export()
    with pytest.raises(ValueError, match=r"min_auc \(image_only\) = 0.6, required >= 0.75.*; min_sensitivity"):
        promote()
    assert registry.find("champion") is None
    assert store.approvals() == []
    entry = store.audit_entries()[-1]
    assert (entry["action"], entry["subject"]) == ("promotion_refused", "model/1")
    assert entry["detail"]["passed"] is False


def test_engines_come_first_and_must_agree(registry, bundles, promote, export):
    register(registry, bundles["wrong_engine"])
    with pytest.raises(ValueError, match="no engine set; run export_engine"):
        promote()
    with pytest.raises(ValueError, match="no engine .* passed .* logit differs by 0.5"):
        export()
    with pytest.raises(ValueError, match="require_engine_parity = refused on"):
        promote()


def test_a_damaged_candidate_is_refused(registry, bundles, promote, export):
    found = register(registry, bundles["good"])
    export()
    card = os.path.join(found.uri.removeprefix("file://"), "model_card.md")
    with open(card, "a") as file:
        file.write("improved")
    with pytest.raises(ValueError, match="model_card.md has sha256"):
        promote()
    assert registry.find("champion") is None


def test_rollback_says_what_it_cannot_do(registry, bundles, promote, export):
    with pytest.raises(ValueError, match="no champion registered"):
        promote(rollback=True)
    register(registry, bundles["good"])
    export()
    promote()
    with pytest.raises(ValueError, match="no earlier champion"):
        promote(rollback=True)
    register(registry, bundles["good"])
    with pytest.raises(ValueError, match="version 2 is not the champion, 1 is"):
        promote(rollback=True, model="2")


def test_a_bundle_path_is_exported_without_a_registry(bundles, export, paths):
    result = export(model=str(bundles["good"].directory), tracking_uri="sqlite:////nowhere/mlflow.db")
    assert result["model_version"] is None and set(result["chosen"]) == {1, 8, 32}
    json.dumps(result)


def approve(store, version, approver="Ada"):
    """What POST /v1/candidates/{version}/approve does."""
    return approve_candidate(store, find_candidate(store, version), approver, "fewer missed melanomas")


def candidate_state(store, version):
    return find_candidate(store, version)["state"]


def test_without_an_approver_the_person_decides_who_approved_the_version(registry, bundles, promote, export, store):
    found = register(registry, bundles["good"])
    record_candidate(store, found.version, found.digest, {})
    export()
    with pytest.raises(ValueError, match="nobody has approved version 1; give --approver NAME, or POST /v1/candidates"):
        promote(approver=None)
    assert registry.find("champion") is None
    approve(store, "1")
    result = promote(approver=None)
    assert (result["champion"], result["approver"], result["changed"]) == ("1", "Ada", True)
    assert registry.history()[-1]["reason"] == "fewer missed melanomas"
    assert [(row["decision"], row["approver"]) for row in store.approvals()] == [("promote", "Ada"), ("approve", "Ada")]
    assert candidate_state(store, "1") == "promoted"


def test_a_champion_that_was_rolled_back_does_not_return_on_its_old_approval(registry, bundles, promote, export, store):
    for _ in range(2):
        found = register(registry, bundles["good"])
        record_candidate(store, found.version, found.digest, {})
        export()
        approve(store, found.version)
        promote(approver=None)
    promote(rollback=True, approver="Cleo")
    assert [candidate_state(store, version) for version in "12"] == ["promoted", "rejected"]
    with pytest.raises(ValueError, match="nobody has approved version 2"):
        promote(approver=None)
    assert promote(approver="Cleo")["champion"] == "2"
    assert candidate_state(store, "2") == "promoted"


def test_the_gates_refusal_rejects_a_candidate_unless_only_engines_are_wanting(registry, bundles, promote, store):
    for name, version, state in (("good", "1", "candidate"), ("poor", "2", "rejected")):
        found = register(registry, bundles[name])
        record_candidate(store, found.version, found.digest, {})
        # No engine set yet: the good one's only fault.
        with pytest.raises(ValueError, match="does not pass the gate"):
            promote()
        assert candidate_state(store, version) == state


@pytest.mark.parametrize("approver", ["", "   ", "true"])
def test_the_approver_needs_a_name(approver):
    with pytest.raises(ValueError, match="name of the person who approves"):
        promote_model.PromoteModelConfig(approver=approver)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no candidate registered for model 'dermray'"),
        (["--rollback"], "approver is missing; expected --approver"),
        (["--approver", "Ada"], "no candidate registered for model 'dermray'"),
        (["--approver", "Ada", "--force", "true"], "unknown config key 'force'"),
        (["--approver", "Ada", "--rules.min-auc", "2"], "rules.min_auc = 2"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(tmp_path, flags, message):
    environment = os.environ | {"DERMRAY_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "ray_jobs.promote_model", *flags]
    answer = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True)
    assert answer.returncode == 2
    assert message in answer.stderr.splitlines()[-1] and "Traceback" not in answer.stderr


# On the same lesions


class Killed(BaseException):
    """Ends a run where it stands, as SIGKILL would: nothing catches it."""


@pytest.fixture(scope="module")
def lesions(tmp_path_factory):
    """A data set, a champion that guesses and two models that know its labels."""
    folder = tmp_path_factory.mktemp("lesions")
    version = make_lesions(folder / "raw")
    made = {name: bundle_of(folder / name, version, seed) for name, seed in (("guess", 3), ("know", 0))}
    made["know_too"] = bundle_of(folder / "know_too", version, onnx_bias=0.01, torch_bias=0.01)
    return version, made


# The tiny bundles' stated metrics are made up, and their calibration and engines' times say nothing.
LOOSE = {"max_auc_mismatch": None, "max_latency_ratio": None, "require_engine_parity": False}
LOOSE |= {"max_specificity_drop": None, "max_sensitivity_drop": 1.0, "max_subgroup_sensitivity_drop": None}


@pytest.fixture
def rivals(lesions, registry, promote, monkeypatch):
    """`rivals(champion, candidate, **config)` promotes the first and then tries the second on the data set."""
    monkeypatch.setattr(table_scoring, "stream_scores", stream_in_process())
    monkeypatch.setattr(promotion_evidence, "connect_ray", lambda: None)
    version, made = lesions

    def call(champion, candidate, rules=None, **config):
        if registry.find("champion") is None:
            register(registry, made[champion])
            promote(rules=LOOSE)
            register(registry, made[candidate])
        fields = {"approver": "Bob", "dataset": str(version.path.parent), "num_bootstrap": 100}
        return promote(rules=LOOSE | (rules or {}), **fields | config)

    return call


def rule_of(result, name):
    (found,) = [row for row in result["gate"] if row["rule"] == name]
    return found


def test_a_better_candidate_is_promoted_on_the_same_lesions(rivals, lesions, registry, store):
    result = rivals("guess", "know", {"require_superiority": True})
    assert result["champion"] == "2" and result["paired"] is True
    version, _ = lesions
    assert rule_of(result, "require_paired")["value"].startswith(f"{len(version.gate_positions)} lesions, ")
    assert rule_of(result, "max_pauc_drop")["value"] < -0.05
    assert rule_of(result, "require_superiority")["value"] > 0
    assert store.approvals()[0]["gate"]["results"] == result["gate"]
    # The registry's tag has room for 5,000 characters; the whole table lies beside the version.
    event = registry.history()[-1]
    assert event["gate"]["paired"] is True and "results" not in event["gate"] and len(json.dumps(event)) < 2000
    kept = {item.path for item in registry.client.list_artifacts(registry.resolve("2").run_id, "promotion_gate")}
    assert {Path(path).suffix for path in kept} == {".json", ".md"}
    page = Path(result["report"]).with_suffix(".md").read_text()
    assert page.startswith("# Version 2: passed") and "champion: version 1" in page and "require_superiority" in page


def test_a_worse_candidate_is_refused_whatever_its_own_metrics_say(rivals, registry, store):
    with pytest.raises(ValueError, match=r"max_pauc_drop \(image_only\) = .*drop's 95 % interval") as refusal:
        rivals("know", "guess")
    assert "max_auc_drop" in str(refusal.value) and "min_auc " not in str(refusal.value)
    assert registry.resolve("champion").version == "1"
    before = store.audit_entries()
    with pytest.raises(ValueError, match="does not pass the gate"):
        rivals("know", "guess")
    assert store.audit_entries() == before, "the same refusal is one decision"
    with pytest.raises(ValueError, match="does not pass the gate"):
        rivals("know", "guess", approver="Cleo")
    assert [entry["actor"] for entry in store.audit_entries()[len(before) :]] == ["Cleo"]
    audit_chain.verify(store.audit_entries())


def test_scores_are_kept_for_the_next_run(rivals, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(table_scoring, "stream_scores", stream_in_process(calls))
    for _ in range(2):
        with pytest.raises(ValueError, match="does not pass the gate"):
            rivals("know", "guess")
    assert len(calls) == 2  # one per model


def test_without_the_data_set_the_table_says_unpaired(rivals):
    with pytest.raises(ValueError, match="require_paired = unpaired: no data set given"):
        rivals("know", "know_too", {"require_paired": True}, dataset=None)
    result = rivals("know", "know_too", dataset=None)
    assert result["paired"] is False and rule_of(result, "max_pauc_drop")["detail"] == "unpaired"


def test_a_candidate_refused_for_want_of_a_comparison_may_come_again(rivals, registry, store):
    with pytest.raises(ValueError, match="unpaired"):
        rivals("know", "know_too", {"require_paired": True}, dataset=None)
    found = registry.resolve("2")
    record_candidate(store, "2", found.digest, {})
    with pytest.raises(ValueError, match="unpaired"):
        rivals("know", "know_too", {"require_paired": True}, dataset=None)
    assert candidate_state(store, "2") == "candidate"
    assert rivals("know", "know_too", {"require_paired": True})["champion"] == "2"
    assert candidate_state(store, "2") == "promoted"


def test_another_data_set_is_refused_by_its_digest(rivals, lesions, tmp_path):
    other = make_lesions(tmp_path / "raw", number=180)
    digest = lesions[0].digest[:12]
    with pytest.raises(ValueError, match=f"dataset {other.path} holds no version {digest}, which the candidate was"):
        rivals("know", "know_too", dataset=str(other.path))


def test_a_champion_whose_bundle_is_gone_is_one_clear_line_and_can_be_left(rivals, registry):
    rivals("guess", "know")
    champion = registry.resolve("champion")
    shutil.rmtree(champion.uri.removeprefix("file://"))
    register_again = registry.resolve("1")
    registry.client.set_registered_model_alias(registry.model_name, "candidate", register_again.version)
    with pytest.raises(ValueError, match="champion version 2 cannot be compared with: no bundle at .*--rollback first"):
        rivals("guess", "know")
    assert rivals("guess", "know", rollback=True)["champion"] == "1"


def test_a_champion_of_other_columns_cannot_be_paired(rivals, lesions, registry, promote, tmp_path):
    version, made = lesions
    task = made["know"].task.model_dump()
    task["columns"]["tbp_lv_A"] = {"kind": "numeric"}
    register(registry, bundle_of(tmp_path / "wide", version, task=task))
    promote(rules=LOOSE)
    register(registry, made["know"])
    with pytest.raises(ValueError, match="unpaired: the champion cannot be scored .* it reads tbp_lv_A"):
        rivals("", "")


def test_a_shadow_that_ran_is_judged(rivals, store, monkeypatch):
    from store.shadow_agreement import ShadowAgreement

    asked = []

    def agreement(opened, champion, shadow, since_us):
        asked.append((champion, shadow))
        pairs = 500 if shadow == "2" else 0
        return ShadowAgreement(champion, shadow, pairs, rank_correlation=0.9, same_band=1.0, raised=0.0, lowered=0.2)

    monkeypatch.setattr(promotion_evidence, "shadow_agreement", agreement)
    with pytest.raises(ValueError, match="shadow.max_lowered = 0.2, required <= 0.05"):
        rivals("know", "know_too")
    assert asked[0] == ("1", "2") and asked[1][1].startswith("bundle-")


# Who decides


def asked_by(store, version, name, retrain=None):
    """What the retrain job writes beside its candidate."""
    with store.writing() as connection:
        if retrain is not None:
            row = {"id": "r1", "dedupe_key": "k", "trigger": "manual", "reason": "x", "requested_by": retrain}
            row |= {"requested_at": 1, "state": "done", "attempt": 1, "detail": {}}
            connection.execute(sql.insert(retrain_requests).values(**row))
        values = {"requested_by": name, "retrain_id": None if retrain is None else "r1"}
        connection.execute(sql.update(candidates).where(candidates.c.model_version == version).values(**values))


@pytest.mark.parametrize(
    ("candidate", "retrain", "approver"),
    [("Ada Weber", None, "ada  weber "), (None, "Ada", "ADA"), ("Bob", "Ada", "Bob")],
)
def test_who_asked_for_the_training_cannot_promote_it(
    registry, bundles, promote, export, store, candidate, retrain, approver
):
    found = register(registry, bundles["good"])
    record_candidate(store, found.version, found.digest, {})
    asked_by(store, "1", candidate, retrain)
    export()
    for _ in range(2):
        with pytest.raises(ValueError, match="approver = .* asked for version 1; expected another person's approval"):
            promote(approver=approver)
    assert registry.find("champion") is None
    (entry,) = store.audit_entries()
    assert (entry["actor"], entry["action"], entry["subject"]) == (approver.strip(), "approval_refused", "model/1")
    assert promote(approver="Cleo")["approver"] == "Cleo"


def test_an_approval_by_who_asked_does_not_count(registry, bundles, promote, export, store):
    found = register(registry, bundles["good"])
    record_candidate(store, found.version, found.digest, {})
    export()
    approve(store, "1", "Bob")
    approve(store, "1", "Ada")
    asked_by(store, "1", "ada")
    assert promote(approver=None)["approver"] == "Bob"
    found = register(registry, bundles["good"])
    record_candidate(store, found.version, found.digest, {})
    approve(store, "2", "Ada")
    asked_by(store, "2", "Ada")
    with pytest.raises(ValueError, match="nobody has approved version 2 but Ada, who asked for it"):
        promote(approver=None)


ALLOWED = {"allow": True, "configured_by": "Dana"}


def test_auto_promotes_on_the_same_lesions_where_the_config_allows_it(rivals, store):
    result = rivals("guess", "know", approver=None, auto=True, auto_promotion=ALLOWED)
    assert (result["champion"], result["approver"], result["paired"]) == ("2", "auto (configured by Dana)", True)
    assert store.audit_entries()[-1]["actor"] == "auto (configured by Dana)"
    assert rivals("guess", "know", approver=None, auto=True, auto_promotion=ALLOWED)["changed"] is False


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"auto_promotion": {}}, "auto_promotion.allow is false; expected --approver NAME"),
        ({"auto_promotion": {"allow": True}}, "configured_by is blank"),
        ({"auto_promotion": ALLOWED, "approver": "Bob"}, "auto and approver are both given"),
        ({"auto_promotion": ALLOWED, "rollback": True}, "auto and rollback are both given"),
        ({"auto_promotion": ALLOWED, "dataset": None}, "require_paired = unpaired"),
        ({"auto_promotion": ALLOWED, "dataset": None, "rules": {"require_paired": False}}, "require_paired = unpaired"),
    ],
)
def test_auto_does_nothing_else(rivals, registry, config, message):
    with pytest.raises(ValueError, match=message):
        rivals("guess", "know", **({"approver": None, "auto": True} | config))
    assert registry.resolve("champion").version == "1"


def test_auto_makes_no_first_champion_unless_told_so(registry, bundles, promote, export, store):
    register(registry, bundles["good"])
    export()
    with pytest.raises(ValueError, match="auto: there is no champion to compare with"):
        promote(approver=None, auto=True, auto_promotion=ALLOWED)
    first = promote(approver=None, auto=True, auto_promotion=ALLOWED | {"first_champion": True})
    assert first["approver"] == "auto (configured by Dana)"


def test_auto_does_not_approve_what_its_configurer_asked_for(rivals, lesions, registry, store):
    rivals("guess", "know", {"max_ms_per_image": None})
    register(registry, lesions[1]["know_too"])
    found = registry.resolve("candidate")
    record_candidate(store, found.version, found.digest, {})
    asked_by(store, found.version, "dana")
    with pytest.raises(ValueError, match="auto_promotion.configured_by = 'Dana' asked for version 3"):
        rivals("", "", approver=None, auto=True, auto_promotion=ALLOWED)


# Killed at any stage


def decided(registry, store):
    """What two runs must agree on; times apart."""
    history = [{name: value for name, value in event.items() if name != "at"} for event in registry.history()]
    approvals = [(row["decision"], row["model_version"], row["approver"], row["reason"]) for row in store.approvals()]
    tables = [[line["rule"] for line in row["gate"].get("results", [])] for row in store.approvals()]
    actions = [(entry["actor"], entry["action"], entry["subject"]) for entry in store.audit_entries()]
    states = [candidate_state(store, version) for version in "12"]
    return history, approvals, tables, actions, states, registry.resolve("champion").version


STAGES = {
    "scored": (promote_model, "check_gate"),
    "judged": (promote_model, "_write_report"),
    "report written": (Registry, "promote"),
    "event written": (MlflowClient, "set_model_version_tag"),
    "version tagged": (MlflowClient, "set_registered_model_alias"),
    "alias moved": (promote_model, "_record"),
    "decision recorded": (promote_model, "_mark"),
}


def killed_then_run(monkeypatch, stage, call):
    """Runs into the stage's end, then again; without a stage just runs."""

    def kill(*_, **__):
        raise Killed

    if stage is not None:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(*STAGES[stage], kill)
            call()
    call()
    call()


@pytest.fixture
def two_versions(rivals, lesions, registry, promote, store):
    """A champion, and a better candidate that the store knows."""
    for name in ("guess", "know"):
        found = register(registry, lesions[1][name])
        record_candidate(store, found.version, found.digest, {})
        if name == "guess":
            promote(rules=LOOSE)


EXPECTED_PROMOTION = [("promote", "2", "Bob", "better"), ("promote", "1", "Ada", "")]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, *STAGES])
def test_a_promotion_killed_at_any_stage_and_run_again_ends_the_same(
    two_versions, rivals, registry, store, monkeypatch, stage
):
    killed_then_run(monkeypatch, stage, lambda: rivals("", "", reason="better"))
    history, approvals, tables, actions, states, champion = decided(registry, store)
    assert champion == "2" and states == ["promoted", "promoted"] and approvals == EXPECTED_PROMOTION
    assert [(event["event"], event["version"], event["previous"]) for event in history] == [
        (1, "1", None),
        (2, "2", "1"),
    ]
    assert "require_paired" in tables[0]
    assert actions == [("Ada", "promote", "model/1"), ("Bob", "promote", "model/2")]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, "event written", "version tagged", "alias moved", "decision recorded"])
def test_a_rollback_killed_at_any_stage_and_run_again_ends_the_same(
    two_versions, rivals, registry, store, monkeypatch, stage
):
    rivals("", "", reason="better")
    back = {"rollback": True, "model": "2", "approver": "Cleo", "reason": "misses on site 4"}
    killed_then_run(monkeypatch, stage, lambda: rivals("", "", **back))
    history, approvals, _, actions, states, champion = decided(registry, store)
    assert champion == "1" and states == ["promoted", "rejected"]
    assert approvals == [("rollback", "1", "Cleo", "misses on site 4"), *EXPECTED_PROMOTION]
    assert [event["action"] for event in history] == ["promote", "promote", "rollback"]
    assert actions[-1] == ("Cleo", "rollback", "model/1") and len(actions) == 3


def test_a_refusal_killed_before_it_is_audited_is_audited_by_the_next_run(rivals, store, monkeypatch):
    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(promote_model, "record_refusal", kill)
        rivals("know", "guess")
    assert [entry["action"] for entry in store.audit_entries()] == ["promote"]
    with pytest.raises(ValueError, match="does not pass the gate"):
        rivals("know", "guess")
    assert [entry["action"] for entry in store.audit_entries()] == ["promote", "promotion_refused"]


# The service swaps


@pytest.fixture
def service(paths, tmp_path, monkeypatch):
    """deploy_service's config with this test's places, and what was deployed."""
    file, deployed = tmp_path / "deploy.yaml", []
    values = {**paths, "store_url": f"sqlite:///{tmp_path}/store.db"}
    file.write_text(json.dumps(values))

    def run(config):
        if deployed and deployed[-1] == "down":
            raise ValueError("no Ray cluster")
        deployed.append(Registry(config.tracking_uri, config.model_name, config.artifact_root).resolve(config.model))
        return {"model_version": deployed[-1].version}

    monkeypatch.setattr(deploy_service, "run", run)
    return file, values, deployed


def test_deploy_swaps_the_service_to_the_champion_also_back(registry, bundles, promote, export, service):
    file, _, deployed = service
    for _ in range(2):
        register(registry, bundles["good"])
        export()
        result = promote(deploy=True, deploy_config=str(file))
    assert result["deployed"] == {"model_version": "2"}
    assert promote(rollback=True, deploy=True, deploy_config=str(file))["deployed"] == {"model_version": "1"}
    assert [found.version for found in deployed] == ["1", "2", "1"]


def test_a_service_that_does_not_swap_is_said_and_the_next_run_swaps_it(registry, bundles, promote, export, service):
    file, _, deployed = service
    register(registry, bundles["good"])
    export()
    deployed.append("down")
    with pytest.raises(ValueError, match="version 1 is the champion, but the service goes on with what it had: no Ray"):
        promote(deploy=True, deploy_config=str(file))
    deployed.clear()
    again = promote(deploy=True, deploy_config=str(file))
    assert again["changed"] is False and again["deployed"] == {"model_version": "1"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name": "other"}, "model_name = 'other'"),
        ({"model": "7"}, "does not serve the champion"),
        ({"x": 1}, "x"),
    ],
)
def test_a_service_of_something_else_is_refused_before_anything_moves(
    registry, bundles, promote, export, service, change, message
):
    file, values, deployed = service
    file.write_text(json.dumps(values | change))
    register(registry, bundles["good"])
    export()
    with pytest.raises(ValueError, match=message):
        promote(deploy=True, deploy_config=str(file))
    assert registry.find("champion") is None and not deployed
