"""What the documentation tells people to type exists, and every job is in the README."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from ray_jobs.submit_job import SubmitJobConfig
from tests.house import PAGES, REPO_ROOT, job_models, model_of

VERBS = job_models()
MAKE_TARGETS = set(re.findall(r"^([a-z0-9-]+):.*## ", (REPO_ROOT / "Makefile").read_text(), re.MULTILINE))


def code_of(page: Path) -> list[str]:
    """Lines of fenced blocks (continuation lines joined) and inline code spans."""
    text = page.read_text(encoding="utf-8")
    lines = []
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines += block.replace("\\\n", " ").splitlines()
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    return lines


def commands(pattern: str) -> list[tuple[str, re.Match]]:
    found = [(page, match) for page in PAGES for line in code_of(page) for match in re.finditer(pattern, line)]
    return [(str(page.relative_to(REPO_ROOT)), match) for page, match in found]


def test_there_is_a_readme():
    assert (REPO_ROOT / "README.md").exists()


def test_documented_make_targets_exist():
    unknown = [(page, match[1]) for page, match in commands(r"\bmake ([a-z0-9-]+)") if match[1] not in MAKE_TARGETS]
    assert not unknown


def test_documented_modules_exist():
    def exists(dotted: str) -> bool:
        path = REPO_ROOT / dotted.replace(".", "/")
        return path.with_suffix(".py").exists() or (path / "__main__.py").exists()

    ours = r"python3? -m ((?:ray_jobs|local|benchmarks)\.\w+)"
    unknown = [(page, match[1]) for page, match in commands(ours) if not exists(match[1])]
    assert not unknown


def field_exists(model: type[BaseModel], dotted: str) -> bool:
    head, _, rest = dotted.partition(".")
    if head not in model.model_fields:
        return False
    annotation = model.model_fields[head].annotation
    nested = [part for part in (annotation, *typing.get_args(annotation)) if isinstance(part, type)]
    nested = [part for part in nested if issubclass(part, BaseModel)]
    return not rest or not nested or any(field_exists(part, rest) for part in nested)


def test_documented_flags_exist():
    unknown = []
    for page, match in commands(r"python3? -m ray_jobs\.(\w+)([^#|&;]*)"):
        # What stands behind ` -- ` is the job that `submit_job` submits, and its flags.
        own, _, submitted = match[2].partition(" -- ")
        for verb, flags in ((match[1], own), submitted.partition(" ")[::2]):
            for flag in re.findall(r"--([A-Za-z][\w.-]*)", flags):
                name = flag.replace("-", "_")
                known = {"submit_job": SubmitJobConfig}.get(verb) or (verb in VERBS and model_of(verb))
                if known and name not in ("config", "help") and not field_exists(known, name):
                    unknown.append((page, verb, flag))
    assert not unknown


def test_documented_configs_exist():
    unknown = [(page, match[0]) for page, match in commands(r"\bconfigs/[\w/-]+\.yaml")]
    assert not [(page, path) for page, path in unknown if not (REPO_ROOT / path).exists()]


@pytest.mark.parametrize("verb", VERBS)
def test_every_job_is_in_the_readme(verb):
    assert (
        f"ray_jobs.{verb}" in (REPO_ROOT / "README.md").read_text()
        or f"`{verb}`" in (REPO_ROOT / "README.md").read_text()
    ), f"README.md does not mention {verb}"


def test_make_help_lists_every_target_and_the_readme_names_it():
    phony = re.search(r"^\.PHONY: (.*)$", (REPO_ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    assert MAKE_TARGETS == set(phony.split())
    assert "make help" in (REPO_ROOT / "README.md").read_text()
