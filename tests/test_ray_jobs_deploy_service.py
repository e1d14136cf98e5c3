"""What deploy_service decides before it touches a cluster: model, engine, code release, secret, address."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import zipfile
from contextlib import closing
from pathlib import Path

import pytest
from pydantic import ValidationError

from modeling.engine_parity import ParityLimits
from modeling.engine_set import Candidate, CandidateReport, EngineSet, device_key
from ray_jobs import deploy_service, service_rollout
from ray_jobs.deploy_service import (
    DeployServiceConfig,
    connect,
    ensure_patient_key,
    resolve_model,
    resolve_shadow,
    run,
    serve_settings,
)
from ray_jobs.model_swap import Deployed
from ray_jobs.service_rollout import Rollout, _reason
from ray_jobs.service_store import check_store, upgrade_store
from serve.access import is_open
from serve.release import PACKAGES, write_release
from serve.settings import ModelReference
from store.api_keys import create_api_key, revoke_api_key
from store.database import open_store
from store.tables import SCHEMA_VERSION
from tests.bundle_factory import served_bundle
from tests.house import REPO_ROOT

ONE = ModelReference(bundle_uri="/bundles/1", sha256="0" * 64, version="1")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("deploy") / "bundle")


def engine_set(digest: str, name: str, threads: int, passed: bool = True) -> EngineSet:
    candidate = Candidate(name=name, choice={"engine": "onnxruntime", "options": {"threads": threads}})
    return EngineSet(
        bundle_digest=digest,
        device=device_key(),
        cores=2,
        created_at="2024-01-01T00:00:00+00:00",
        objective="throughput",
        limits=ParityLimits(),
        candidates=[CandidateReport(candidate=candidate, passed=passed, reason="" if passed else "logits differ")],
        chosen={1: name} if passed else {},
    )


def test_without_a_champion_it_says_how_to_get_one_and_leaves_nothing_behind(dermray_home):
    with pytest.raises(ValueError, match="no champion registered for model 'dermray'.*promote"):
        run(DeployServiceConfig())
    assert list(dermray_home.iterdir()) == []


def test_a_bundle_that_was_changed_is_refused(tmp_path):
    reference = served_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "model_card.md").write_text("better than it was")
    with pytest.raises(ValueError, match="model_card.md.*refused"):
        resolve_model(DeployServiceConfig(bundle=reference.bundle_uri))


def test_the_engine_that_was_chosen_for_this_device_is_served(reference, dermray_home):
    config = DeployServiceConfig(bundle=reference.bundle_uri)
    assert resolve_model(config).engine is None
    engine_set(reference.sha256, "two", threads=2).save(dermray_home / "engine_sets")
    model = resolve_model(config)
    assert model.engine == {"engine": "onnxruntime", "options": {"threads": 2}}
    assert model.sha256 == reference.sha256 and model.version == f"bundle-{reference.sha256[:12]}"
    engine_set(reference.sha256, "two", threads=2, passed=False).save(dermray_home / "engine_sets")
    with pytest.raises(ValueError, match="no engine of bundle .* passed"):
        resolve_model(config)


def test_a_model_that_does_not_load_is_refused_before_it_reaches_the_service(reference, dermray_home):
    broken = engine_set(reference.sha256, "x", threads=1)
    broken.candidates[0].candidate.choice = {"engine": "abacus"}
    broken.save(dermray_home / "engine_sets")
    with pytest.raises(ValueError, match="unknown engine 'abacus'"):
        run(DeployServiceConfig(bundle=reference.bundle_uri))
    assert not (dermray_home / "releases").exists()


@pytest.fixture(scope="module")
def challenger(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("deploy") / "challenger", onnx_bias=1.0)


def test_a_shadow_is_resolved_as_the_champion_is(reference, challenger, dermray_home, capsys):
    def shadow_of(config):
        return resolve_shadow(config, resolve_model(config))

    assert shadow_of(DeployServiceConfig(bundle=reference.bundle_uri)) is None
    engine_set(challenger.sha256, "two", threads=2).save(dermray_home / "engine_sets")
    config = DeployServiceConfig(
        bundle=reference.bundle_uri, shadow=challenger.bundle_uri, shadowing={"fraction": 0.25}
    )
    shadow = shadow_of(config)
    assert shadow.model.sha256 == challenger.sha256 and shadow.model.version == f"bundle-{challenger.sha256[:12]}"
    assert shadow.model.engine == {"engine": "onnxruntime", "options": {"threads": 2}}
    assert shadow.settings.fraction == 0.25 and challenger.sha256[:12] in shadow.app_name
    assert "champion itself" not in capsys.readouterr().err
    shadow_of(DeployServiceConfig(bundle=reference.bundle_uri, shadow=reference.bundle_uri))
    assert "the shadow is the champion itself" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["changed", "engine", "unknown"])
def test_a_shadow_that_does_not_load_is_refused_before_anything_is_touched(
    reference, dermray_home, tmp_path, monkeypatch, fault
):
    def no_cluster(_):
        raise AssertionError("a cluster was asked for")

    monkeypatch.setattr(deploy_service, "connect", no_cluster)
    shadow = served_bundle(tmp_path / "shadow", onnx_bias=2.0)
    if fault == "changed":
        (tmp_path / "shadow" / "model_card.md").write_text("better than it was")
    if fault == "engine":
        broken = engine_set(shadow.sha256, "x", threads=1)
        broken.candidates[0].candidate.choice = {"engine": "abacus"}
        broken.save(dermray_home / "engine_sets")
    name = "17" if fault == "unknown" else shadow.bundle_uri
    expected = {"changed": "shadow = .*model_card.md", "engine": "unknown engine 'abacus'", "unknown": "shadow = '17'"}
    with pytest.raises(ValueError, match=expected[fault]):
        run(DeployServiceConfig(bundle=reference.bundle_uri, shadow=name))
    assert not (dermray_home / "releases").exists()


def test_a_shadow_changes_nothing_that_a_replica_of_the_champion_is_made_of(reference, challenger, dermray_home):
    from serve.app import build_app
    from serve.shadow_settings import ShadowReference

    def nodes(shadow):
        application = build_app(settings, reference, shadow)
        found = {}

        def walk(app):
            deployment = app._bound_deployment
            options = (deployment._version, deployment.ray_actor_options, deployment.num_replicas)
            found[deployment.name] = (options, deployment.user_config)
            for argument in deployment.init_args:
                if type(argument) is type(application):
                    walk(argument)

        walk(application)
        return found

    config = DeployServiceConfig(bundle=reference.bundle_uri, shadow=challenger.bundle_uri, shadowing={"fraction": 0.5})
    settings = serve_settings(config, dermray_home / "releases" / "x.zip")
    assert settings == serve_settings(DeployServiceConfig(bundle=reference.bundle_uri), dermray_home / "releases/x.zip")
    without, with_shadow = nodes(None), nodes(ShadowReference(model=challenger, settings=config.shadowing))
    assert {name: options for name, (options, _) in without.items()} == {
        name: options for name, (options, _) in with_shadow.items()
    }
    # A reconfigured network is loaded and warmed again; only the ingress has to know.
    changed = [name for name in without if without[name] != with_shadow[name]]
    assert changed == ["Ingress"] and len(without) == 4


def test_a_failed_deployment_is_told_in_one_line():
    message = """Failed to update the deployments
Traceback (most recent call last):
  File "image_scorer.py", line 44, in __init__
    raise ValueError("unknown")
ValueError: engine choice: unknown engine 'abacus'; known engines: ['onnxruntime']

The replicas were retried 3 times."""

    class Told:
        def __init__(self, message, deployments=()):
            self.message, self.deployments = message, dict(deployments)

    nodes = {"ImageScorer": Told(message), "Ingress": Told("")}
    assert _reason(Told("longer", nodes), "dermray") == (
        "ImageScorer: ValueError: engine choice: unknown engine 'abacus'; known engines: ['onnxruntime']"
    )
    assert _reason(Told("not\nenough CPUs"), "dermray") == "dermray: not enough CPUs"


def test_replicas_are_told_absolute_places_only(dermray_home, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    release = dermray_home / "releases" / "x.zip"
    settings = serve_settings(DeployServiceConfig(), release)
    for place in settings.storage.model_dump().values():
        assert str(dermray_home) in place
    assert settings.runtime_env["working_dir"] == release.as_uri()
    assert settings.runtime_env["env_vars"]["DERMRAY_HOME"] == str(dermray_home)
    with pytest.raises(ValidationError, match="relative"):
        settings.storage.model_validate(settings.storage.model_dump() | {"spool_dir": "spool"})


def test_replicas_are_told_how_to_work_through_submissions(dermray_home):
    config = DeployServiceConfig(submissions={"max_pending": 5, "lease_s": 90})
    told = serve_settings(config, dermray_home / "releases" / "x.zip").submissions
    assert (told.max_pending, told.lease_s) == (5, 90)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::"])
def test_an_open_service_listens_on_loopback_only(host):
    with pytest.raises(ValidationError, match=f"host {host} is not a loopback address.*access.require_keys: true"):
        DeployServiceConfig(host=host)
    assert DeployServiceConfig(host=host, access={"require_keys": True}).host == host


@pytest.mark.parametrize("host", ["example.org", "localhost", "", "127.0.0.1/8"])
def test_the_host_is_an_address(host):
    with pytest.raises(ValidationError, match="expected an IP address"):
        DeployServiceConfig(host=host, access={"require_keys": True})


def test_a_service_that_requires_keys_needs_one_that_is_live(dermray_home):
    config = DeployServiceConfig(host="0.0.0.0", access={"require_keys": True})
    store = open_store(config.store_url)
    revoked, _ = create_api_key(store, "clinic", "caller", "Ada")
    revoke_api_key(store, revoked.id, "Ada")
    with pytest.raises(ValueError, match="no live API key; make one with python -m ray_jobs.manage_api_keys"):
        check_store(config.store_url, True)
    check_store(config.store_url, False)
    create_api_key(store, "clinic", "caller", "Ada")
    check_store(config.store_url, True)


def test_without_a_live_key_nothing_is_deployed(reference, dermray_home, monkeypatch):
    def no_cluster(_):
        raise AssertionError("a cluster was asked for")

    monkeypatch.setattr(deploy_service, "connect", no_cluster)
    with pytest.raises(ValueError, match="no live API key"):
        run(DeployServiceConfig(bundle=reference.bundle_uri, host="0.0.0.0", access={"require_keys": True}))


@pytest.fixture
def version_1(dermray_home):
    """The service's store, as the first release made it; a look at the schema versions that it had."""
    with closing(sqlite3.connect(dermray_home / "store.db")) as database:
        database.executescript((REPO_ROOT / "tests" / "store_version_1.sql").read_text())

    def versions() -> list[int]:
        with closing(sqlite3.connect(dermray_home / "store.db")) as database:
            return [version for (version,) in database.execute("SELECT version FROM schema_version ORDER BY version")]

    assert versions() == [1]
    return versions


@pytest.mark.parametrize("refusal", ["keys", "cluster", "room", "port", "shadow", "model"])
def test_a_deploy_that_is_refused_leaves_the_store_to_the_release_that_runs(
    reference, challenger, dermray_home, version_1, monkeypatch, refusal
):
    def refuse(*_, **__):
        raise ValueError("refused")

    config = {"bundle": reference.bundle_uri, "shadow": challenger.bundle_uri}
    for name in ("connect", "cluster_nodes", "check_room", "start_serve"):
        monkeypatch.setattr(deploy_service, name, lambda *_: None)
    running = Deployed(serve_settings(DeployServiceConfig(), write_release(REPO_ROOT, dermray_home / "releases")), ONE)
    monkeypatch.setattr(deploy_service, "running_service", lambda: running)
    monkeypatch.setattr(service_rollout, "kept_model", lambda: None)
    monkeypatch.setattr(Rollout, "start_shadow", lambda *_: None)
    monkeypatch.setattr(service_rollout, "_take_back_shadow", lambda *_: None)
    if refusal == "keys":
        config["access"] = {"require_keys": True}
    elif refusal == "shadow":
        monkeypatch.setattr(Rollout, "start_shadow", refuse)
    elif refusal == "model":
        monkeypatch.setattr(service_rollout, "prepare_replicas", refuse)
    else:
        name = {"cluster": "connect", "room": "check_room", "port": "start_serve"}[refusal]
        monkeypatch.setattr(deploy_service, name, refuse)
    with pytest.raises(ValueError, match="no live API key" if refusal == "keys" else "refused"):
        run(DeployServiceConfig(**config))
    assert version_1() == [1]


def test_the_store_is_upgraded_before_the_service_changes(reference, dermray_home, version_1, monkeypatch, capsys):
    for name in ("connect", "cluster_nodes", "check_room", "start_serve", "running_service"):
        monkeypatch.setattr(deploy_service, name, lambda *_: None)
    at_deploy = []
    monkeypatch.setattr(Rollout, "_deploy", lambda *_: at_deploy.extend(version_1()))
    monkeypatch.setattr(Rollout, "model_card", lambda _: None)
    run(DeployServiceConfig(bundle=reference.bundle_uri))
    assert at_deploy == [1, SCHEMA_VERSION]
    line = f"schema version 1 to {SCHEMA_VERSION}: running replicas of an older release go on"
    assert line in capsys.readouterr().err
    assert upgrade_store(DeployServiceConfig().store_url) is False and capsys.readouterr().err == ""


def test_a_look_at_the_store_makes_none(dermray_home):
    check_store(DeployServiceConfig().store_url, False)
    with pytest.raises(ValueError, match="no live API key"):
        check_store(DeployServiceConfig().store_url, True)
    assert list(dermray_home.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "reason"), [("text" * 300, "is not an SQLite database"), (None, "cannot be made: .* is no folder")]
)
def test_what_is_no_store_is_refused_at_the_first_look(tmp_path, content, reason):
    (tmp_path / "file").write_text(content or "")
    url = f"sqlite:///{tmp_path}/file" + ("" if content else "/store.db")
    with pytest.raises(ValueError, match=reason):
        check_store(url, False)


def test_a_store_of_a_later_release_is_refused_at_the_first_look(dermray_home, version_1):
    with closing(sqlite3.connect(dermray_home / "store.db")) as database, database:
        database.execute("UPDATE schema_version SET version = 99")
    with pytest.raises(ValueError, match="schema version 99; this release reads version"):
        check_store(DeployServiceConfig().store_url, False)


def test_replicas_are_told_who_may_call(dermray_home):
    access = {"require_keys": True, "refresh_s": 2, "requests_per_s": 3, "burst": 4}
    settings = serve_settings(DeployServiceConfig(access=access), dermray_home / "x.zip")
    assert settings.access.model_dump() == access


def test_the_address_is_a_url():
    assert DeployServiceConfig(port=8123).url == "http://127.0.0.1:8123"
    assert DeployServiceConfig(host="::1", port=8123).url == "http://[::1]:8123"


def test_a_service_on_all_addresses_is_asked_on_loopback():
    access = {"require_keys": True}
    assert DeployServiceConfig(host="0.0.0.0", port=8123, access=access).url == "http://127.0.0.1:8123"
    assert DeployServiceConfig(host="::", port=8123, access=access).url == "http://[::1]:8123"
    assert DeployServiceConfig(host="10.1.2.3", port=8123, access=access).url == "http://10.1.2.3:8123"


def test_the_deploy_job_asks_nothing_that_needs_a_key():
    source = Path(service_rollout.__file__).read_text()
    asked = re.findall(r'_get\(f"\{self\.url\}(/[^"]+)"\)', source)
    assert {"/readyz", "/v1/model"} == set(asked)
    assert all(is_open(path) for path in asked)


def test_a_batch_that_can_never_fill_is_refused():
    with pytest.raises(ValidationError, match="max_ongoing_requests is 8"):
        DeployServiceConfig(scorer={"max_batch_size": 32, "max_ongoing_requests": 8})


def test_the_secret_is_made_once_and_for_its_owner_only(tmp_path):
    path = tmp_path / "secrets" / "key"
    ensure_patient_key(path)
    secret = path.read_bytes()
    assert len(secret) == 32 and path.stat().st_mode & 0o077 == 0
    ensure_patient_key(path)
    assert path.read_bytes() == secret
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        ensure_patient_key(path)


def test_without_a_cluster_that_outlives_the_job_nothing_is_deployed(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match="no Ray cluster"):
        connect(None)


def test_a_release_is_the_same_file_for_the_same_code_and_another_for_other_code(tmp_path):
    first = write_release(REPO_ROOT, tmp_path / "releases")
    assert write_release(REPO_ROOT, tmp_path / "releases") == first
    assert [file.name for file in (tmp_path / "releases").iterdir()] == [first.name]
    names = zipfile.ZipFile(first).namelist()
    assert {name.split("/")[0] for name in names} == set(PACKAGES)
    assert not [name for name in names if "__pycache__" in name]
    checkout = tmp_path / "checkout"
    for package in PACKAGES:
        (checkout / package).mkdir(parents=True)
        (checkout / package / "__init__.py").touch()
    assert write_release(checkout, tmp_path / "releases") != first
    (checkout / "store" / "__init__.py").unlink()
    with pytest.raises(ValueError, match="no package 'store'"):
        write_release(checkout, tmp_path / "releases")


def test_a_release_imports_by_itself_and_without_training_code(tmp_path):
    zipfile.ZipFile(write_release(REPO_ROOT, tmp_path)).extractall(tmp_path / "code")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import serve.app, monitoring.prediction_log, modeling.context_model, modeling.engines
assert serve.app.__file__.startswith(sys.argv[1]), serve.app.__file__
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"torch", "mlflow", "evidently", "training", "data_pipelines", "ray_jobs"}, loaded
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "code")], check=True, env=environment, cwd=Path(tmp_path)
    )


def test_the_addresses_of_other_tools_reach_the_service(dermray_home):
    links = {"ray_dashboard": "http://head.example:8265", "grafana": "https://figures.example/d/dermray"}
    told = serve_settings(DeployServiceConfig(links=links), dermray_home / "releases" / "x.zip").links
    assert (told.ray_dashboard, told.grafana, told.mlflow) == (*links.values(), None)
