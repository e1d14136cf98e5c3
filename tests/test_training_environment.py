"""A run's record of where it was made: enough to explain another score, nothing that names a machine or a person."""

import json
import platform
import socket
import sys
from importlib import metadata
from pathlib import Path

import ray

from training.environment import PACKAGES, describe_environment


def test_it_names_python_packages_and_processors():
    found = describe_environment()
    assert found["python"] == platform.python_version() and found["machine"] == platform.machine()
    assert found["cpus"] >= 1 and found["torch_threads"] >= 1 and isinstance(found["gpus"], list)
    assert set(found["packages"]) == set(PACKAGES) and None not in found["packages"].values()
    assert found["packages"]["scikit-learn"] == metadata.version("scikit-learn")


def test_it_names_no_host_and_no_path():
    text = json.dumps(describe_environment(), allow_nan=False)
    assert socket.gethostname() not in text and str(Path.home()) not in text
    assert sys.prefix not in text and "/" not in text


def test_the_cluster_s_processors_are_named_without_its_addresses(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    resources = {"CPU": 16.0, "GPU": 1.0, "accelerator_type:H100": 1.0, "node:10.0.0.3": 1.0, "memory": 1e9}
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    assert describe_environment()["ray_resources"] == {"CPU": 16.0, "GPU": 1.0, "accelerator_type:H100": 1.0}
