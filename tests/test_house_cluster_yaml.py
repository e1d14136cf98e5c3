"""cluster.yaml is valid for Ray's autoscaler, offline, and agrees with the pinned versions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

REPO_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cluster() -> dict:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((REPO_ROOT / "cluster.yaml").read_text()))
    validate_config(config)
    return config


def test_gpu_workers_scale_from_zero_and_only_they_work(cluster):
    types = cluster["available_node_types"]
    workers = {name: spec for name, spec in types.items() if name != cluster["head_node_type"]}
    assert workers
    for spec in workers.values():
        assert spec["min_workers"] == 0
        assert 0 < spec["max_workers"] <= cluster["max_workers"]
        # g and p are the EC2 families with an NVIDIA GPU; Ray reads GPU and CPU counts from the instance type.
        assert spec["node_config"]["InstanceType"][0] in "gp"
    assert cluster["docker"]["worker_image"].endswith("-gpu")


def test_images_hold_the_pinned_ray_and_a_supported_python(cluster):
    pinned = re.search(r"^ray==(\S+)$", (REPO_ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
    for image in (cluster["docker"]["head_image"], cluster["docker"]["worker_image"]):
        version, python = re.fullmatch(r"rayproject/ray:([\d.]+)-py(\d+)(?:-gpu)?", image).groups()
        assert version == pinned
        assert python in ("311", "312", "313")


def test_the_dashboard_is_not_open_to_the_network_and_needs_the_token(cluster):
    (start,) = [command for command in cluster["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert any(path.endswith(".ray/auth_token") for path in cluster["file_mounts"])


def test_a_wrong_key_would_be_found(cluster):
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    wrong = yaml.safe_load((REPO_ROOT / "cluster.yaml").read_text())
    wrong["idle_minutes"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idle_minutes"):
        validate_config(prepare_config(wrong))
