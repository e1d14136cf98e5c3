"""Versions resolve to bundles that verify; the champion moves only by a recorded decision; jobs may start at once."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from modeling.bundle import load_bundle
from modeling.registry import Registry, find_model
from tests.house import REPO_ROOT
from tests.tiny_bundle import tiny_bundle

PASSED = {"passed": True, "results": []}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("registry")


# Imports MLflow once; its four children meet the empty database at the same moment.
FOUR_JOBS = """
import multiprocessing, sys
import mlflow
from modeling.registry import Registry

def job(number):
    Registry(sys.argv[1], "first", sys.argv[2]).start_parent(f"run {number}", {"number": number})

context = multiprocessing.get_context("fork")
children = [context.Process(target=job, args=(number,)) for number in range(4)]
for child in children:
    child.start()
for child in children:
    child.join()
sys.exit(sum(child.exitcode != 0 for child in children))
"""


@pytest.fixture(scope="module")
def uri(home):
    """MLflow's database, made by four processes at once: MLflow's own migrations break then."""
    uri = f"sqlite:///{home}/deep/mlflow.db"
    command = [sys.executable, "-c", FOUR_JOBS, uri, str(home / "artifacts")]
    answer = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, f"{answer.returncode} of 4 jobs failed: {answer.stderr[-2000:]}"
    return uri


@pytest.fixture(scope="module")
def bundle(home):
    return tiny_bundle(home / "bundle")


@pytest.fixture
def registry(request, uri, home):
    """A registry of its own model name in the shared database."""
    return Registry(uri, request.node.name[:60], str(home / "artifacts"))


def log(registry, bundle, **kwargs):
    values = {"run_name": "run", "params": {"lr": 0.1}, "metrics": {"auc": 0.9}} | kwargs
    return registry.log_candidate(bundle.directory, **values)


def test_four_jobs_may_meet_an_empty_database(uri, home):
    registry = Registry(uri, "first", str(home / "artifacts"))
    experiment = registry.client.get_experiment_by_name("first")
    assert len(registry.client.search_runs([experiment.experiment_id])) == 4


def test_a_candidate_is_a_copy_that_verifies_with_its_params_metrics_and_report(registry, bundle, tmp_path):
    (tmp_path / "evaluation.json").write_text("{}")
    params = {"model": {"backbone": "linear", "input_size": 16}, "note": "x" * 7000}
    metrics = {"none.gate.auc": 0.9, "undefined": float("nan")}
    first = log(registry, bundle, params=params, metrics=metrics, artifacts_dir=tmp_path)
    second = log(registry, bundle)
    assert (first.version, second.version) == ("1", "2")
    assert registry.resolve("candidate") == second and registry.resolve("1") == first
    assert load_bundle(first.uri, first.digest).digest == bundle.digest
    assert first.uri.startswith("file://")
    run = registry.client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"none.gate.auc": 0.9}
    assert run.data.params["model.input_size"] == "16" and run.data.params["model.backbone"] == "linear"
    names = {item.path for item in registry.client.list_artifacts(first.run_id)}
    assert names == {"bundle", "report", "params.json"}
    assert registry.client.get_model_version(registry.model_name, "1").tags["synthetic"] == "true"


def test_a_damaged_bundle_is_never_registered(registry, bundle, tmp_path):
    import shutil

    damaged = shutil.copytree(bundle.directory, tmp_path / "damaged")
    (damaged / "model_card.md").write_text("changed")
    with pytest.raises(ValueError, match="model_card.md has sha256"):
        registry.log_candidate(damaged, "run", {}, {})
    assert registry.find("candidate") is None


def test_what_is_missing_is_named_with_the_way_to_get_it(registry, home, tmp_path):
    with pytest.raises(ValueError, match="no champion registered for model .*promote one with python -m ray_jobs"):
        registry.resolve("champion")
    with pytest.raises(ValueError, match="no candidate registered .*train one with"):
        registry.resolve("candidate")
    with pytest.raises(ValueError, match="no version 99 registered"):
        registry.resolve("99")
    mistyped = f"sqlite:///{tmp_path}/typo/mlflow.db"
    with pytest.raises(ValueError, match="no champion registered for model 'dermray' in sqlite"):
        Registry(mistyped, "dermray", str(home)).resolve("champion")
    assert not (tmp_path / "typo").exists()


def test_promotions_are_traceable_and_rollbacks_undo_them_one_by_one(registry, bundle):
    for _ in range(3):
        log(registry, bundle)
    gate = PASSED | {"results": [{"rule": "min_auc", "value": 0.9}]}
    first = registry.promote("1", "Ada", "first", gate)
    assert (first["event"], first["previous"], first["changed"]) == (1, None, True)
    with pytest.raises(ValueError, match="no earlier champion"):
        registry.rollback("Ada", "nothing before")
    registry.promote("2", "Ada", "better", gate)
    registry.promote("3", "Ada", "better still", gate)
    assert registry.rollback("Bob", "worse on site 4")["version"] == "2"
    assert registry.resolve("champion").version == "2"
    assert registry.rollback("Bob", "also worse")["version"] == "1"
    with pytest.raises(ValueError, match="no earlier champion"):
        registry.rollback("Bob", "again")
    assert [(event["action"], event["version"], event["approver"]) for event in registry.history()] == [
        ("promote", "1", "Ada"),
        ("promote", "2", "Ada"),
        ("promote", "3", "Ada"),
        ("rollback", "2", "Bob"),
        ("rollback", "1", "Bob"),
    ]
    tags = registry.client.get_model_version(registry.model_name, "3").tags
    assert tags["promote.approver"] == "Ada" and tags["promote.reason"] == "better still"
    assert '"min_auc"' in tags["promote.gate"]


def test_promoting_the_champion_again_changes_nothing(registry, bundle):
    log(registry, bundle)
    first = registry.promote("1", "Ada", "first", PASSED)
    again = registry.promote("1", "Bob", "retry", PASSED)
    assert again == first | {"changed": False}
    assert len(registry.history()) == 1


@pytest.mark.parametrize("action", ["promote", "rollback"])
def test_a_decision_that_was_cut_off_is_finished_once(registry, bundle, action, monkeypatch):
    for version in ("1", "2"):
        log(registry, bundle)
        registry.promote(version, "Ada", "", PASSED)
    log(registry, bundle)

    def act():
        return registry.promote("3", "Ada", "", PASSED) if action == "promote" else registry.rollback("Ada", "")

    def crash(*_):
        raise RuntimeError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(registry.client, "set_registered_model_alias", crash)
        with pytest.raises(RuntimeError):
            act()
    assert registry.resolve("champion").version == "2"
    act()
    assert registry.resolve("champion").version == ("3" if action == "promote" else "1")
    assert len(registry.history()) == 3


def test_two_people_who_promote_at_once_leave_one_consistent_history(registry, bundle, uri, home):
    log(registry, bundle)
    log(registry, bundle)
    others = [Registry(uri, registry.model_name, str(home / "artifacts")) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: others[i].promote(str(i + 1), f"person {i}", "", PASSED), range(2)))
    history = registry.history()
    assert [event["event"] for event in history] == [1, 2]
    assert history[1]["previous"] == history[0]["version"]
    assert registry.resolve("champion").version == history[1]["version"]


def test_no_promotion_without_a_name_a_gate_or_a_model(registry, bundle):
    log(registry, bundle)
    with pytest.raises(ValueError, match="approver is blank"):
        registry.promote("1", "  ", "", PASSED)
    for gate in ({}, {"passed": False}, {"passed": "yes"}):
        with pytest.raises(ValueError, match="did not pass the gate"):
            registry.promote("1", "Ada", "", gate)
    with pytest.raises(ValueError, match="no version 7 registered"):
        registry.promote("7", "Ada", "", PASSED)
    assert registry.find("champion") is None and registry.history() == []


def test_trials_are_children_with_one_step_per_report(registry):
    parent = registry.start_parent("search", {"num_trials": 2}, {"search": "here"})
    trial = registry.start_child(parent, "trial_0", {"lr": 0.1}, {"state": "running"})
    registry.log_metrics(trial, [{"pauc": 0.1}, {"pauc": 0.15}])
    registry.log_metrics(trial, {"pauc": 0.2}, first_step=2)
    registry.log_metrics(registry.start_child(parent, "trial_1", {}), {"pauc": None})
    registry.finish(parent, "FAILED")
    history = registry.client.get_metric_history(trial, "pauc")
    assert [(point.step, point.value) for point in history] == [(0, 0.1), (1, 0.15), (2, 0.2)]
    tags = registry.client.get_run(trial).data.tags
    assert tags["mlflow.parentRunId"] == parent and tags["state"] == "running"
    assert registry.client.get_run(parent).info.status == "FAILED"
    assert sorted(run.info.run_name for run in registry.children(parent)) == ["trial_0", "trial_1"]


def test_a_run_is_found_by_its_tags(registry):
    run = registry.start_parent("search", {}, {"search": "/home/o/searches/a", "kind": "search"})
    registry.start_parent("search", {}, {"search": "/home/o/searches/b"})
    assert registry.find_run({"search": "/home/o/searches/a", "kind": "search"}) == run
    assert registry.find_run({"search": "/home/o/searches/c"}) is None
    registry.client.delete_run(run)
    assert registry.find_run({"search": "/home/o/searches/a"}) is None


def test_an_engine_set_is_kept_beside_the_version(registry, bundle, tmp_path):
    found = log(registry, bundle)
    (tmp_path / "cpu.json").write_text("{}")
    registry.log_artifact_file("1", tmp_path / "cpu.json", "engine_sets")
    assert [item.path for item in registry.client.list_artifacts(found.run_id, "engine_sets")] == [
        "engine_sets/cpu.json"
    ]
    load_bundle(found.uri, found.digest)


def test_a_job_names_a_model_by_alias_version_or_path(registry, bundle, uri, home, monkeypatch):
    found = log(registry, bundle)

    def look(ref):
        return find_model(ref, uri, registry.model_name, str(home / "artifacts"))

    assert look("candidate") == look("1") == found
    by_path = look(str(bundle.directory))
    assert (by_path.version, by_path.digest) == ("", bundle.digest)
    monkeypatch.setenv("DERMRAY_HOME", str(home))
    assert look("bundle") == look(bundle.directory.as_uri()).__class__("", str(home / "bundle"), bundle.digest, "")
    with pytest.raises(ValueError, match="no such bundle directory"):
        look("bundles/none")
    with pytest.raises(ValueError, match="no chmpion registered"):
        look("chmpion")
