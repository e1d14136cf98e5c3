"""From candidate to champion and back: engines first, then the gate, with every decision on record."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from modeling.bundle import load_bundle
from modeling.engine_set import find_engine_set
from modeling.registry import Registry
from ray_jobs import export_engine, promote_model
from store import audit_chain
from store.candidates import approve_candidate, find_candidate, record_candidate
from store.database import open_store
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
def paths(request, tmp_path, database):
    return {
        "tracking_uri": database,
        "model_name": request.node.name[:60],
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
    with pytest.raises(ValueError, match=r"min_auc \(image_only\) = 0.6, required >= 0.75; .*min_sensitivity"):
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
