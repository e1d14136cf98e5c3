"""Timers: cron, systemd and Kubernetes submit the same jobs, and each command is one that the jobs accept."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
from datetime import UTC, datetime

import pytest
import yaml

from ray_jobs.job import parse_config
from ray_jobs.submit_job import SubmitJobConfig, period_key, split_arguments
from tests.house import REPO_ROOT, job_models, model_of

DEPLOY = REPO_ROOT / "deploy"
CRONTAB = (DEPLOY / "cron" / "dermray.crontab").read_text(encoding="utf-8").splitlines()
SERVICES = sorted((DEPLOY / "systemd").glob("*.service"))
CRONJOBS = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "cronjobs.yaml").read_text(encoding="utf-8")))
MODULE = ["-m", "ray_jobs.submit_job"]
FIELD = re.compile(r"(\*|\d+(-\d+)?)(/\d+)?(,(\d+(-\d+)?))*")
BOUNDS = [(0, 59), (0, 23), (1, 31), (1, 12), (0, 7)]


def cron_lines():
    """(five fields, arguments of submit_job) of each line that runs something."""
    found = []
    for line in CRONTAB:
        if line and not line.startswith("#") and not re.match(r"[A-Z_]+=", line):
            *fields, command = line.split(None, 5)
            # cron ends a command at an unescaped percent sign.
            assert "%" not in command
            words = shlex.split(command)
            at = words.index("-m")
            assert words[at : at + 2] == MODULE
            found.append((fields, words[at + 2 :]))
    return found


def unit(path):
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read(path, encoding="utf-8")
    return parser


def service_arguments(path):
    words = shlex.split(unit(path)["Service"]["ExecStart"])
    assert words[1:3] == MODULE and words[0].startswith("/")
    return words[3:]


def pod_of(cronjob):
    return cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]


def container_of(cronjob):
    (container,) = pod_of(cronjob)["containers"]
    return container


def every_command():
    found = [pytest.param(arguments, id=f"cron {arguments[1]}") for _, arguments in cron_lines()]
    found += [pytest.param(service_arguments(path), id=path.name) for path in SERVICES]
    return found + [pytest.param(container_of(job)["args"], id=f"k8s {job['metadata']['name']}") for job in CRONJOBS]


def test_cron_systemd_and_kubernetes_run_the_same():
    cron = sorted(arguments for _, arguments in cron_lines())
    assert cron == sorted(map(service_arguments, SERVICES)) == sorted(container_of(job)["args"] for job in CRONJOBS)
    verbs = {words[words.index("--") + 1] for words in cron}
    assert {"check_drift", "retrain", "apply_decisions", "apply_retention", "erase_patient", "verify_audit"} <= verbs


@pytest.mark.parametrize("arguments", every_command())
def test_every_command_is_accepted_by_its_job(arguments):
    flags, verb, of_job = split_arguments(arguments)
    config = parse_config(SubmitJobConfig, flags)
    assert verb in job_models()
    parse_config(model_of(verb), of_job, REPO_ROOT / "configs" / f"{verb}.yaml")
    # One job per period: the key holds the date, whoever submits it, however often.
    noon = datetime(2026, 11, 21, 12, tzinfo=UTC)
    assert config.per is not None and "2026-11-21" in period_key(config.key, config.per, noon)


def test_a_wrong_command_would_be_found():
    with pytest.raises(ValueError, match="no_such_verb"):
        split_arguments(["--key", "x", "--", "no_such_verb"])
    with pytest.raises(ValueError, match="no_such_flag"):
        parse_config(model_of("retrain"), ["--no-such-flag", "1"], None)


@pytest.mark.parametrize("fields", [fields for fields, _ in cron_lines()], ids=" ".join)
def test_cron_fields(fields):
    assert len(fields) == 5
    for field, (low, high) in zip(fields, BOUNDS, strict=True):
        assert FIELD.fullmatch(field), field
        assert all(low <= int(number) <= high for number in re.findall(r"(?<!/)\b\d+", field)), field


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_every_service_has_its_timer_and_does_not_run_as_root(path):
    service, timer = unit(path), unit(path.with_suffix(".timer"))
    assert service["Service"]["Type"] == "oneshot" and service["Service"]["User"] not in ("", "root")
    assert service["Unit"]["Description"] and service["Service"]["NoNewPrivileges"] == "true"
    # A host that was off at the time runs it when it is back.
    assert timer["Timer"]["Persistent"] == "true" and timer["Timer"]["OnCalendar"].endswith("UTC")
    assert timer["Install"]["WantedBy"] == "timers.target"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd")
def test_systemd_reads_the_units(tmp_path):
    calendars = [unit(path.with_suffix(".timer"))["Timer"]["OnCalendar"] for path in SERVICES]
    subprocess.run(["systemd-analyze", "calendar", *calendars], check=True, capture_output=True, timeout=30)
    # Only the paths of an installation are missing here.
    for path in (DEPLOY / "systemd").iterdir():
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE)
        text = re.sub(r"^(User|WorkingDirectory)=.*\n", "", text, flags=re.MULTILINE)
        (tmp_path / path.name).write_text(text)
    files = sorted(str(path) for path in tmp_path.iterdir() if path.is_file())
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *files], capture_output=True, text=True, timeout=50, check=False
    )
    ours = [line for line in done.stderr.splitlines() if "dermray" in line]
    assert not ours, ours


@pytest.mark.parametrize("job", CRONJOBS, ids=lambda job: job["metadata"]["name"])
def test_cron_jobs_do_not_pile_up_and_have_no_more_rights_than_they_need(job):
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "CronJob")
    spec, pod, container = job["spec"], pod_of(job), container_of(job)
    fields = spec["schedule"].split()
    assert fields in [fields for fields, _ in cron_lines()] and spec["timeZone"] == "Etc/UTC"
    assert spec["concurrencyPolicy"] == "Forbid" and spec["startingDeadlineSeconds"] >= 600
    assert spec["jobTemplate"]["spec"]["backoffLimit"] >= 1 and pod["restartPolicy"] == "Never"
    assert container["command"] == ["python", *MODULE]
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["automountServiceAccountToken"] is False
    own = container["securityContext"]
    assert own["readOnlyRootFilesystem"] is True and own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert set(container["resources"]) == {"requests", "limits"}
    assert pod["volumes"][0]["secret"]["secretName"] and pod["volumes"][0]["secret"]["defaultMode"] == 0o440
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["RAY_AUTH_TOKEN_PATH"].startswith(container["volumeMounts"][0]["mountPath"])
    assert environment["DERMRAY_HOME"].startswith("/") and "RAY_AUTH_TOKEN" not in environment
