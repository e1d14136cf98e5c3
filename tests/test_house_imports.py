"""Imports point down, and importing anything of ours does nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("store", "modeling", "data_pipelines", "monitoring", "training", "tune", "serve", "ray_jobs", "local")


def modules_of(*packages: str) -> list[str]:
    files = [file for package in packages for file in sorted((REPO_ROOT / package).rglob("*.py"))]
    names = [".".join(file.relative_to(REPO_ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def run_python(code: str, *arguments: str, cwd: Path) -> str:
    """Runs code in a fresh interpreter, which ends with one JSON line; returns that line."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(cwd),
            "PYTHONPATH": str(REPO_ROOT),
            "DERMRAY_HOME": str(cwd / "home"),
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_import_directions_hold():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


LIST_LOADED = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize(
    ("packages", "absent"),
    [
        # What a replica and a database tool load: none of it may pull in a training stack, however indirectly.
        (("store",), {"ray", "mlflow", "torch", "evidently", "pandas"}),
        (("serve",), {"mlflow", "evidently", "torch", "training", "data_pipelines", "albumentations", "optuna"}),
    ],
)
def test_a_package_loads_without_what_it_does_not_need(packages, absent, tmp_path):
    loaded = set(json.loads(run_python(LIST_LOADED, *modules_of(*packages), cwd=tmp_path)))
    assert not loaded & absent


IMPORT_ALL = """
import importlib, json, os, sys
before = dict(os.environ)
for name in sys.argv[1:]:
    importlib.import_module(name)
import ray
ours = {name for name in os.environ if os.environ[name] != before.get(name)}
print(json.dumps({
    "ray_started": ray.is_initialized(),
    "environment": sorted(name for name in ours if name.startswith(("DERMRAY", "MLFLOW"))),
    "files": sorted(os.listdir(".")),
    "mlflow": "mlflow" in sys.modules,
    "evidently": "evidently" in sys.modules,
}))
"""


def test_importing_every_module_does_nothing(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    state = json.loads(run_python(IMPORT_ALL, *modules_of(*PACKAGES), cwd=empty))
    assert not state["ray_started"]
    assert state["environment"] == []
    # Matplotlib and others may write a cache below HOME, which is this folder; nothing of ours may appear.
    assert [name for name in state["files"] if not name.startswith(".")] == []
    # 4-9 s each to import: jobs load them inside functions.
    assert not state["mlflow"]
    assert not state["evidently"]
