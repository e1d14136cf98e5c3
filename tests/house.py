"""What the house tests share: which jobs there are, and the config class of each."""

from __future__ import annotations

import ast
import functools
import importlib
from pathlib import Path

from pydantic import BaseModel

REPO_ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    page
    for page in (REPO_ROOT / "README.md", REPO_ROOT / "CONTRIBUTING.md", *sorted((REPO_ROOT / "docs").rglob("*.md")))
    if page.exists()
]


@functools.cache
def job_models() -> dict[str, str]:
    """Verb -> name of its config class: the second argument of the `run_job` call that makes a module a job."""
    models = {}
    for file in sorted((REPO_ROOT / "ray_jobs").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "run_job":
                verb, model = node.args[:2]
                assert ast.literal_eval(verb) == file.stem, f"{file.name} calls itself {ast.literal_eval(verb)!r}"
                models[file.stem] = model.id
    return models


def model_of(verb: str) -> type[BaseModel]:
    """The config class of a job."""
    return getattr(importlib.import_module(f"ray_jobs.{verb}"), job_models()[verb])
