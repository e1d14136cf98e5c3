"""Commands of the documentation are ones that the jobs accept, values included; its links and routes lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from local import replay
from ray_jobs.job import parse_config
from ray_jobs.submit_job import SubmitJobConfig, split_arguments
from serve.access import LEAST_ROLE
from tests.house import PAGES, REPO_ROOT, job_models, model_of

LOOP = REPO_ROOT / "docs" / "loop.md"
ROLES = ("caller", "reviewer", "approver", "admin")


def text_of(page: Path) -> str:
    """A page, continuation lines joined."""
    return page.read_text(encoding="utf-8").replace("\\\n", " ")


def block_lines(page: Path) -> list[str]:
    """Lines of a page's fenced blocks."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(module, arguments) of what a page tells people to type: whole lines of blocks, and code spans with a command."""
    spans = re.findall(r"(?<!`)`(python3? -m [^`]+)`(?!`)", text_of(page))
    indented = re.findall(r"^ {4}(python3? -m .+)$", text_of(page), re.MULTILINE)
    for line in block_lines(page) + spans + indented:
        found = re.search(r"\bpython3? -m ((?:ray_jobs|local)\.\w+)(.*)", " ".join(line.split()))
        if found is not None:
            yield found[1], shlex.split(found[2], comments=True)


def accept(module: str, arguments: list[str]) -> None:
    """Raises what the command would say, were it typed; a job's own config stands in where none is named."""
    verb = module.removeprefix("ray_jobs.")
    if module == "local.replay":
        replay.parse_arguments(arguments)
    elif verb == "submit_job":
        flags, verb, of_job = split_arguments(arguments)
        parse_config(SubmitJobConfig, flags)
        accept(f"ray_jobs.{verb}", of_job)
    elif verb in job_models():
        if verb == "promote_model" and "--auto" in arguments:
            # The page says that the config has to allow it, which the default does not.
            arguments = [*arguments, "--auto_promotion.allow", "true", "--auto_promotion.configured_by", "Ada"]
        named = REPO_ROOT / "configs" / f"{verb}.yaml"
        parse_config(model_of(verb), arguments, named if named.exists() else None)
    else:
        raise ValueError(f"{module} is neither a job nor the replay client")


# A command without arguments names the job, as in the table of the README.
TYPED = [
    pytest.param(module, arguments, id=f"{page.name} {module} {' '.join(arguments)}"[:90])
    for page in PAGES
    for module, arguments in commands(page)
    if arguments
]


@pytest.mark.parametrize(("module", "arguments"), TYPED)
def test_every_documented_command_is_accepted(module, arguments, monkeypatch):
    monkeypatch.chdir(REPO_ROOT)
    accept(module, arguments)


def test_a_wrong_command_would_be_found():
    on_the_page = {module for module, _ in commands(LOOP)}
    assert {"ray_jobs.submit_job", "ray_jobs.check_drift", "ray_jobs.promote_model", "local.replay"} <= on_the_page
    with pytest.raises(ValueError, match="no_such_flag"):
        accept("ray_jobs.submit_job", ["--key", "x", "--", "check_drift", "--no-such-flag", "1"])
    with pytest.raises(ValueError, match="band"):
        accept("ray_jobs.export_label_tasks", ["--band", "none"])
    with pytest.raises(ValueError, match="lies in the future"):
        accept("ray_jobs.check_drift", ["--start", "2999-01-01"])
    with pytest.raises(SystemExit):
        accept("local.replay", ["send", "--no-such-flag"])


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as a link has them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO_ROOT)))
def test_every_link_leads_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_the_readme_leads_to_the_loop_and_the_loop_to_the_pages_that_it_does_not_repeat():
    assert "(docs/loop.md)" in (REPO_ROOT / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((\w+\.md)", LOOP.read_text(encoding="utf-8")))
    assert {
        "alarms.md",
        "labels.md",
        "promotion.md",
        "retention.md",
        "schedules.md",
        "store.md",
        "observability.md",
    } <= linked


def test_every_curl_line_of_the_loop_is_a_route_and_its_key_has_the_role():
    lines = [line for line in block_lines(LOOP) if line.startswith("curl ")]
    for line in lines:
        (key,) = re.findall(r"X-API-Key: \$([A-Z]+)\"", line)
        (path,) = re.findall(r"\$DERMRAY(/[\w/]+)", line)
        method = "POST" if "--json" in line else "GET"
        place = (method, re.sub(r"/\d+", "/{}", path))
        assert ROLES.index(key.lower()) >= ROLES.index(LEAST_ROLE[place]), line
    assert len(lines) >= 4


def test_every_kind_of_alarm_is_on_the_page():
    files = [*(REPO_ROOT / "monitoring").glob("*.py"), *(REPO_ROOT / "ray_jobs").glob("*.py")]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    kinds = set(re.findall(r'"kind": "(\w+)",\n +"severity"', code)) | {"missed_cancer"}
    assert {"drift", "quality", "retraining"} <= kinds
    text = LOOP.read_text(encoding="utf-8")
    assert kinds == {kind for kind in re.findall(r"^\| `(\w+)` \| (?:critical|warning|info) \|", text, re.MULTILINE)}
