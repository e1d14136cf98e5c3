"""Every job has a default config, and every YAML in configs/ is one that its job accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ray_jobs.job import parse_config
from tests.house import REPO_ROOT, job_models, model_of

VERBS = job_models()
CONFIGS = sorted((REPO_ROOT / "configs").rglob("*.yaml"))


def verb_of(config: Path) -> str:
    """The job that a config belongs to: the longest verb that its file name starts with."""
    fitting = [verb for verb in VERBS if config.stem == verb or config.stem.startswith(f"{verb}_")]
    assert fitting, f"{config.relative_to(REPO_ROOT)} is not named after a job ({', '.join(VERBS)})"
    return max(fitting, key=len)


@pytest.mark.parametrize("verb", VERBS)
def test_every_job_has_a_default_config(verb):
    assert (REPO_ROOT / "configs" / f"{verb}.yaml").exists()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda file: str(file.relative_to(REPO_ROOT / "configs")))
def test_every_config_is_accepted_by_its_job(config):
    model = model_of(verb_of(config))
    values = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    # Fields that a caller has to give on the command line (--out, --approver) may be missing, nothing else.
    missing = [name for name, field in model.model_fields.items() if field.is_required() and name not in values]
    parse_config(model, [part for name in missing for part in (f"--{name}", "given-by-flag")], config)


def test_an_unknown_key_would_be_found(tmp_path):
    verb = next(iter(VERBS))
    file = tmp_path / f"{verb}.yaml"
    file.write_text("no_such_key: 1\n")
    with pytest.raises(ValueError, match="no_such_key"):
        parse_config(model_of(verb), [], file)
