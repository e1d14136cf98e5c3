"""A deploy that fails leaves the service with what it had, and says in one line what it could not do."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.schema import ApplicationStatus

from ray_jobs import model_swap, service_rollout
from ray_jobs.deploy_service import DeployServiceConfig, serve_settings
from ray_jobs.model_swap import Deployed, running_service
from ray_jobs.service_rollout import Rollout
from serve import shadow_model
from serve.settings import APP_NAME, ModelReference
from serve.shadow_settings import ShadowReference, ShadowSettings


def reference(version):
    return ModelReference(bundle_uri=f"/bundles/{version}", sha256="0" * 64, version=version)


class Cluster:
    """Notes what is prepared and deployed, and fails as told."""

    def __init__(self, monkeypatch):
        self.done, self.cannot_prepare, self.cannot_deploy = [], {}, {}
        self.upgrades, self.cannot_upgrade, self.too_many_cpus = False, None, None
        monkeypatch.setattr(service_rollout, "prepare_replicas", self.prepare)
        monkeypatch.setattr(service_rollout, "drop_prepared", lambda: self.done.append("drop prepared"))
        monkeypatch.setattr(service_rollout, "_end_shadows", self.end_shadows)
        monkeypatch.setattr(Rollout, "_deploy", lambda _, wanted: self.deploy(wanted))
        # What each shadow's application was last run with, and its state.
        self.shadows, self.states = {}, {}
        monkeypatch.setattr(shadow_model, "run_shadow", self.run_shadow)
        monkeypatch.setattr(shadow_model, "delete_shadow", lambda name: self.shadows.pop(name, None))
        monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications=self.states))

    def prepare(self, model, timeout_s):
        self.done.append(("prepare", model.version))
        if model.version in self.cannot_prepare:
            raise ValueError(self.cannot_prepare[model.version])

    def upgrade_store(self):
        self.done.append("store")
        if self.cannot_upgrade:
            raise ValueError(self.cannot_upgrade)
        return self.upgrades

    def deploy(self, wanted):
        self.done.append((wanted.settings.scorer.max_replicas, wanted.model.version))
        if wanted.model.version in self.cannot_deploy:
            raise ValueError(self.cannot_deploy[wanted.model.version])

    def run_shadow(self, settings, shadow):
        self.shadows[shadow.app_name] = settings, shadow
        failed = shadow.settings.num_cpus == self.too_many_cpus
        self.states[shadow.app_name] = SimpleNamespace(
            status=ApplicationStatus.DEPLOY_FAILED if failed else ApplicationStatus.RUNNING,
            deployments={},
            message="no room",
        )

    def end_shadows(self, but):
        self.done.append(("shadows but", but))


@pytest.fixture
def cluster(monkeypatch):
    return Cluster(monkeypatch)


@pytest.fixture
def swap(cluster, dermray_home):
    """Deploys version 2 with 3 replicas where version 1 runs with 2, or whatever `previous` says."""
    release = dermray_home / "releases" / "x.zip"
    config = DeployServiceConfig(scorer={"max_replicas": 3})
    old = Deployed(serve_settings(DeployServiceConfig(scorer={"max_replicas": 2}), release), reference("1"))

    def deploy(previous=old):
        wanted = Deployed(serve_settings(config, release), reference("2"))
        Rollout("http://127.0.0.1:1", 180).deploy_or_put_back(wanted, previous, cluster.upgrade_store)

    return deploy


def test_a_model_is_prepared_before_it_is_deployed(cluster, swap):
    swap()
    assert cluster.done == [("prepare", "2"), "store", (3, "2")]


def test_a_model_that_a_replica_cannot_load_is_not_deployed(cluster, swap):
    cluster.cannot_prepare["2"] = "ImageScorer: MemoryError: 4 GB"
    expected = "model version 2 from /bundles/2 is not served: ImageScorer: MemoryError: 4 GB; version 1 goes on"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        swap()
    assert cluster.done == [("prepare", "2")]


@pytest.mark.parametrize("running", [True, False])
def test_a_store_that_cannot_be_upgraded_leaves_the_service_as_it_was(cluster, swap, running):
    cluster.cannot_upgrade = "store_url: disk full"
    goes_on = "; version 1 goes on" if running else ""
    with pytest.raises(ValueError, match=f"^model version 2 from /bundles/2 is not served: .*disk full{goes_on}$"):
        swap(**({} if running else {"previous": None}))
    assert cluster.done == ([("prepare", "2"), "store", "drop prepared"] if running else ["store"])


@pytest.mark.parametrize("upgrades", [True, False])
def test_of_an_older_release_that_is_put_back_it_says_that_the_store_was_upgraded(
    cluster, swap, dermray_home, upgrades
):
    """Its replicas that start anew refuse the store, while readiness says that they spool."""
    cluster.cannot_deploy["2"], cluster.upgrades = "refused", upgrades
    older = serve_settings(DeployServiceConfig(), dermray_home / "releases" / "older.zip")
    expected = "version 1 answers again" + (", but new replicas of .* cannot open the store.*" if upgrades else "")
    with pytest.raises(ValueError, match=f"refused; {expected}$"):
        swap(previous=Deployed(older, reference("1")))


def test_what_was_there_before_is_put_back_with_its_settings(cluster, swap):
    cluster.cannot_deploy["2"] = "the service was not ready in 180 s"
    with pytest.raises(ValueError, match="^model version 2 from .* not ready in 180 s; version 1 answers again$"):
        swap()
    assert cluster.done == [("prepare", "2"), "store", (3, "2"), (2, "1")]


def test_what_a_killed_deploy_did_not_put_back_is_put_back_by_the_next_one(cluster, dermray_home, monkeypatch):
    torn = Deployed(serve_settings(DeployServiceConfig(), dermray_home / "x.zip"), reference("2"))
    rollout = Rollout("http://127.0.0.1:1", 180)
    monkeypatch.setattr(service_rollout, "kept_model", lambda: None)
    assert rollout.finish_putting_back(torn) == torn and cluster.done == []
    monkeypatch.setattr(service_rollout, "kept_model", lambda: reference("1"))
    assert rollout.finish_putting_back(torn) == Deployed(torn.settings, reference("1"))
    assert cluster.done == [(2, "1")]
    # A version that is gone is no reason to refuse the next one.
    cluster.cannot_deploy["1"] = "gone"
    assert rollout.finish_putting_back(torn) == torn


def test_when_nothing_can_be_put_back_the_line_has_both_reasons(cluster, swap):
    cluster.cannot_deploy = {"2": "refused", "1": "gone"}
    with pytest.raises(ValueError, match="is not served: refused; putting back version 1 failed too: gone$"):
        swap()


def test_a_first_deploy_has_nothing_to_put_back_and_leaves_no_shadow(cluster, swap):
    cluster.cannot_deploy["2"] = "refused"
    with pytest.raises(ValueError, match="^refused$"):
        swap(previous=None)
    assert cluster.done == ["store", (3, "2"), ("shadows but", None)]


def test_replicas_of_another_release_are_not_asked_to_load_the_model(cluster, swap, dermray_home):
    settings = serve_settings(DeployServiceConfig(), dermray_home / "releases" / "older.zip")
    swap(previous=Deployed(settings, reference("1")))
    assert cluster.done == ["store", (3, "2")]


@pytest.fixture
def shadow_swap(cluster, dermray_home):
    """Deploys version 2 with a shadow that takes one CPU, where version 1 runs and the shadow "a" takes half of one."""
    release = dermray_home / "releases" / "x.zip"

    def shadow(version, num_cpus):
        model = ModelReference(bundle_uri=f"/bundles/{version}", sha256=version * 64, version=version)
        return ShadowReference(model=model, settings=ShadowSettings(num_cpus=num_cpus, niceness=5))

    def deployed(max_replicas, *models):
        return Deployed(serve_settings(DeployServiceConfig(scorer={"max_replicas": max_replicas}), release), *models)

    old = deployed(2, reference("1"), shadow("a", 0.5))
    cluster.run_shadow(old.settings, old.shadow)

    def deploy(challenger):
        wanted = deployed(3, reference("2"), shadow(challenger, 1.0))
        rollout = Rollout("http://127.0.0.1:1", 180)
        rollout.start_shadow(wanted.settings, wanted.shadow, old)
        rollout.deploy_or_put_back(wanted, old, cluster.upgrade_store)

    deploy.before = {old.shadow.app_name: (old.settings, old.shadow)}
    return deploy


@pytest.mark.parametrize("challenger", ["a", "b"])
@pytest.mark.parametrize("fault", ["shadow", "prepare", "store"])
def test_a_deploy_that_is_refused_leaves_the_shadow_with_the_settings_it_had(cluster, shadow_swap, challenger, fault):
    if fault == "shadow":
        cluster.too_many_cpus = 1.0
    elif fault == "prepare":
        cluster.cannot_prepare["2"] = "refused"
    else:
        cluster.cannot_upgrade = "refused"
    with pytest.raises(ValueError, match="the shadow did not start" if fault == "shadow" else "refused"):
        shadow_swap(challenger)
    assert cluster.shadows == shadow_swap.before


def test_a_shadow_of_the_same_bundle_gets_back_its_settings_with_the_service(cluster, shadow_swap):
    cluster.cannot_deploy["2"] = "refused"
    with pytest.raises(ValueError, match="refused; version 1 answers again$"):
        shadow_swap("a")
    assert cluster.shadows == shadow_swap.before
    assert cluster.done[-1] == (2, "1")


def test_a_shadow_of_another_bundle_is_left_alone_until_the_service_is_back(cluster, shadow_swap):
    """Then all shadows end but the old one, whose copies nothing interrupted."""
    cluster.cannot_deploy["2"] = "refused"
    (before,) = cluster.shadows.values()
    with pytest.raises(ValueError, match="refused; version 1 answers again$"):
        shadow_swap("b")
    assert len(cluster.shadows) == 2 and before in cluster.shadows.values()


def test_a_shadow_that_does_not_come_back_is_told_of(cluster, shadow_swap):
    cluster.cannot_deploy["2"], cluster.too_many_cpus = "refused", 0.5
    expected = "refused; version 1 answers again, but its shadow did not start: .*no room$"
    with pytest.raises(ValueError, match=expected):
        shadow_swap("a")


class FullService:
    """Serve's handle of an HTTP node whose replicas are full: a call by its queue finds no place, and what is sent to
    all of them is answered, or not, as told."""

    def __init__(self, monkeypatch, *answers):
        self.answers = list(answers)
        applications = {APP_NAME: SimpleNamespace(status=ApplicationStatus.RUNNING)}
        monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications=applications))
        monkeypatch.setattr(model_swap, "_handle", lambda *_: self)

    def remote(self):
        return SimpleNamespace(result=self.never)

    def never(self, timeout_s):
        raise TimeoutError("no replica has a place")

    def broadcast(self, method):
        if not self.answers:
            raise DeploymentUnavailableError(DeploymentID("Ingress", APP_NAME))
        return self

    def results(self, timeout_s, return_exceptions):
        return self.answers


@pytest.fixture
def deployed(dermray_home):
    return Deployed(serve_settings(DeployServiceConfig(), dermray_home / "x.zip"), reference("1"))


NOTHING_TO_PUT_BACK = r"warning: .* \(RUNNING\) .*\({}.*\); if this deploy fails, there is nothing to put back\n$"


def test_a_full_service_says_what_it_serves(monkeypatch, deployed, capsys):
    FullService(monkeypatch, deployed.told(), deployed.told())
    assert running_service() == deployed
    assert capsys.readouterr().err == ""


def test_one_replica_that_answers_is_enough(monkeypatch, deployed):
    FullService(monkeypatch, TimeoutError("hung"), deployed.told())
    assert running_service() == deployed


def test_where_no_service_runs_there_is_nothing_to_warn_of(monkeypatch, capsys):
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications={}))
    assert running_service() is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("answers", "reason"),
    [([TimeoutError("hung")] * 2, "TimeoutError: hung"), ([], "no replica of its HTTP node runs")],
)
def test_a_service_that_does_not_answer_can_be_replaced_and_the_log_says_at_what_risk(
    monkeypatch, capsys, answers, reason
):
    FullService(monkeypatch, *answers)
    assert running_service() is None
    assert re.search(NOTHING_TO_PUT_BACK.format(reason), capsys.readouterr().err)


def test_replicas_that_differ_are_not_put_back(monkeypatch, deployed, capsys):
    FullService(monkeypatch, deployed.told(), Deployed(deployed.settings, reference("2")).told())
    assert running_service() is None
    assert re.search(NOTHING_TO_PUT_BACK.format(".*differ in model"), capsys.readouterr().err)


def test_a_service_of_a_release_with_other_settings_is_not_put_back(monkeypatch, deployed, capsys):
    """Its replicas would refuse what they do not know."""
    told = deployed.told()
    del told["settings"]["scorer"]["max_concurrent_batches"]
    FullService(monkeypatch, told)
    assert running_service() is None
    assert re.search(NOTHING_TO_PUT_BACK.format("it is of a release with other settings"), capsys.readouterr().err)


def test_the_same_model_and_settings_are_not_put_back_for_themselves(cluster, swap, dermray_home):
    cluster.cannot_deploy["2"] = "refused"
    same = serve_settings(DeployServiceConfig(scorer={"max_replicas": 3}), dermray_home / "releases" / "x.zip")
    with pytest.raises(ValueError, match="^refused$"):
        swap(previous=Deployed(same, reference("2")))
    assert cluster.done == ["store", (3, "2")]
