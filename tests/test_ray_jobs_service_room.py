"""A replica that no node can ever hold is refused before anything is deployed, by the field that asks too much."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from ray_jobs import deploy_service
from ray_jobs.deploy_service import DeployServiceConfig, run, serve_settings
from ray_jobs.service_room import check_room
from serve.app import build_app
from tests.bundle_factory import served_bundle

SMALL, WITH_GPU = {"CPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}


def settings(home, **fields):
    return serve_settings(DeployServiceConfig(**fields), home / "releases" / "x.zip")


@pytest.mark.parametrize(
    ("nodes", "fields", "message"),
    [
        ([SMALL], {"scorer": {"num_gpus": 0.5}}, "scorer.num_gpus = 0.5: no node of the cluster has a GPU"),
        ([WITH_GPU, SMALL], {"scorer": {"num_gpus": 2}}, "scorer.num_gpus = 2: .* more than 1 GPU"),
        ([SMALL, SMALL], {"ingress": {"num_cpus": 3}}, "ingress.num_cpus = 3: .* more than 2 CPU"),
        (
            [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 8.0}],
            {"scorer": {"num_gpus": 1, "num_cpus": 4}},
            "scorer.num_cpus = 4 and scorer.num_gpus = 1: no node of the cluster has both",
        ),
        ([], {}, "scorer.num_cpus = 0.5: no node of the cluster has a CPU"),
    ],
)
def test_what_no_node_has_is_named(dermray_home, nodes, fields, message):
    with pytest.raises(ValueError, match=message):
        check_room(settings(dermray_home, **fields), nodes)


def test_what_fits_a_node_is_fine_whoever_holds_it_now(dermray_home):
    check_room(settings(dermray_home), [SMALL])
    check_room(settings(dermray_home, scorer={"num_gpus": 0.5, "max_replicas": 9}), [SMALL, WITH_GPU])


def test_a_part_of_a_gpu_reaches_the_replicas_and_one_and_a_half_is_refused(dermray_home, tmp_path):
    reference = served_bundle(tmp_path / "bundle")
    ingress = build_app(settings(dermray_home, scorer={"num_gpus": 0.5}), reference)._bound_deployment
    scorer = ingress.init_args[0]._bound_deployment
    assert scorer.name == "ImageScorer"
    assert (scorer.ray_actor_options["num_gpus"], ingress.ray_actor_options["num_gpus"]) == (0.5, 0)
    with pytest.raises(ValidationError, match="num_gpus is 1.5; expected a part of one GPU, or whole ones"):
        DeployServiceConfig(scorer={"num_gpus": 1.5})


def test_the_job_refuses_before_it_touches_serve(dermray_home, tmp_path, monkeypatch):
    def touched(*_):
        raise AssertionError("Serve was touched")

    monkeypatch.setattr(deploy_service, "connect", lambda _: None)
    monkeypatch.setattr(deploy_service, "cluster_nodes", lambda: [SMALL])
    monkeypatch.setattr(deploy_service, "start_serve", touched)
    bundle = served_bundle(tmp_path / "bundle")
    with pytest.raises(ValueError, match="no node of the cluster has a GPU"):
        run(DeployServiceConfig(bundle=bundle.bundle_uri, scorer={"num_gpus": 0.5}))
