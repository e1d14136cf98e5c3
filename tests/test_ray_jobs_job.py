"""Config from YAML and flags, paths, and one-line errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, Field, ValidationError

from ray_jobs.job import REPO_ROOT, JobConfig, Location, dermray_home, parse_config, resolve_location, validation_lines


class Inner(BaseModel):
    model_config = {"extra": "forbid"}
    size: int = Field(8, ge=4)
    weights: Location | None = None


class Config(JobConfig):
    out: Location = "results"
    store_url: Location = "sqlite:///store.db"
    inner: Inner = Field(default_factory=Inner)
    flag: bool = False


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DERMRAY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    return tmp_path / "home"


def test_yaml_paths_start_from_home_and_flag_paths_from_the_working_directory(tmp_path, monkeypatch, home):
    file = tmp_path / "c.yaml"
    file.write_text("out: a/b\n")
    monkeypatch.chdir(tmp_path)
    assert parse_config(Config, ["--config", str(file)]).out == str(home / "a/b")
    assert parse_config(Config, ["--config", str(file), "--out", "x.csv"]).out == str(tmp_path / "x.csv")
    assert parse_config(Config, ["--inner.weights", "../w.pt"]).inner.weights == str(tmp_path.parent / "w.pt")


def test_in_a_submitted_job_flags_start_from_home_because_the_working_directory_is_temporary(monkeypatch, home):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert parse_config(Config, ["--out", "x.csv"]).out == str(home / "x.csv")
    monkeypatch.delenv("DERMRAY_HOME")
    with pytest.raises(ValueError, match="DERMRAY_HOME is not set"):
        dermray_home()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sqlite:///store.db", "sqlite:////base/store.db"),
        ("sqlite:////abs.db", "sqlite:////abs.db"),
        ("s3://bucket/x", "s3://bucket/x"),
        ("postgresql://u@h/db", "postgresql://u@h/db"),
        ("../data/x.hdf5", "/data/x.hdf5"),
    ],
)
def test_locations(given, expected):
    assert resolve_location(given, Path("/base")) == expected


def test_flags_override_yaml_and_nested_fields_are_dotted(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("inner:\n  size: 16\n")
    assert parse_config(Config, ["--config", str(file), "--inner.size=32", "--flag"]).inner.size == 32
    assert parse_config(Config, ["--config", str(file), "--flag"]).flag is True


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--inner.size", "2"], "inner.size = 2: Input should be greater than or equal to 4"),
        (["--nonsense", "2"], "unknown config key 'nonsense'"),
        (["--inner.colour", "2"], "unknown config key 'inner.colour'"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(argv, message):
    with pytest.raises(ValidationError) as error:
        parse_config(Config, argv)
    assert message in validation_lines(error.value)


@pytest.mark.parametrize(("text", "message"), [("- a\n", "expected a mapping"), ("a: [", "is not YAML")])
def test_a_bad_config_file_is_one_line(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_config(Config, ["--config", str(file)])


JOB = """
import sys
from ray_jobs.job import JobConfig, run_job
class C(JobConfig):
    fail: str = ""
def run(config):
    if config.fail == "user":
        raise ValueError("images file x does not exist;\\n  expected HDF5")
    if config.fail == "bug":
        raise RuntimeError("boom")
    return {"answer": 42}
run_job("probe", C, run)
"""


@pytest.mark.parametrize(("fail", "code"), [("", 0), ("user", 2), ("bug", 1), ("unknown-key", 2)])
def test_exit_status_and_streams(tmp_path, fail, code):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    flags = ["--other", "1"] if fail == "unknown-key" else ["--fail", fail] if fail else []
    done = subprocess.run(
        [sys.executable, str(script), *flags], capture_output=True, text=True, env={"PYTHONPATH": str(REPO_ROOT)}
    )
    assert done.returncode == code
    if code == 0:
        assert json.loads(done.stdout.splitlines()[-1])["answer"] == 42
    else:
        assert done.stdout == ""
    if code == 2:
        assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
    if code == 1:
        assert "Traceback" in done.stderr
