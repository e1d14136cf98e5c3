"""Keys from the command line: shown in the last line and nowhere else, listed without their text, revoked by id."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from modeling.locations import SUBMITTED
from ray_jobs.manage_api_keys import ManageApiKeysConfig, run
from store.api_keys import hash_key, list_api_keys
from store.database import open_store
from tests.house import REPO_ROOT


@pytest.fixture
def manage(dermray_home):
    def call(action, **values):
        return run(ManageApiKeysConfig(action=action, **values))

    return call


@pytest.fixture
def keys(dermray_home):
    return lambda: list_api_keys(open_store(f"sqlite:///{dermray_home}/store.db"))


def command(*flags, home):
    environment = os.environ | {"DERMRAY_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-m", "ray_jobs.manage_api_keys", *flags],
        cwd=REPO_ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_a_new_key_is_in_the_last_line_only_and_works_by_its_hash(dermray_home, keys):
    done = command("--action", "create", "--name", "clinic", "--role", "caller", "--actor", "Ada", home=dermray_home)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    (stored,) = keys()
    assert stored.key_hash == hash_key(result["key"])
    assert (result["id"], result["name"], result["role"]) == (stored.id, "clinic", "caller")
    assert (done.stdout + done.stderr).count(result["key"]) == 1


def test_a_list_shows_everything_but_keys(manage):
    made = manage("create", name="clinic", role="admin", actor="Ada")
    other = manage("create", name="lab", role="caller", actor="Ada")
    manage("revoke", id=other["id"], actor="Bob")
    listed = manage("list")["keys"]
    assert [(row["name"], row["role"], row["revoked_at"] is None) for row in listed] == [
        ("clinic", "admin", True),
        ("lab", "caller", False),
    ]
    assert made["key"] not in str(listed) and hash_key(made["key"]) not in str(listed)


def test_revoking_says_whether_it_changed_anything(manage, keys):
    made = manage("create", name="clinic", role="caller", actor="Ada")
    assert manage("revoke", id=made["id"], actor="Bob")["changed"] is True
    assert manage("revoke", id=made["id"], actor="Bob")["changed"] is False
    assert keys()[0].revoked_at is not None


def test_a_submitted_job_whose_output_is_kept_writes_the_key_to_a_file(manage, keys, monkeypatch, tmp_path):
    monkeypatch.setenv(SUBMITTED, "{}")
    fields = {"name": "clinic", "role": "caller", "actor": "Ada"}
    with pytest.raises(ValueError, match="--key-file is missing"):
        manage("create", **fields)
    file = tmp_path / "keys" / "clinic"
    result = manage("create", key_file=str(file), **fields)
    text = file.read_text().strip()
    assert "key" not in result and text not in str(result)
    assert keys()[0].key_hash == hash_key(text)
    assert file.stat().st_mode & 0o077 == 0
    with pytest.raises(ValueError, match="key_file .*clinic: File exists"):
        manage("create", key_file=str(file), **fields)
    assert len(keys()) == 1 and file.read_text().strip() == text


def test_a_key_that_cannot_be_leaves_no_file(manage, tmp_path):
    with pytest.raises(ValueError, match="role is 'root'"):
        manage("create", name="x", role="root", actor="Ada", key_file=str(tmp_path / "key"))
    assert not (tmp_path / "key").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--action", "create", "--name", "x"], "--role is missing; action create needs --name, --role, --actor"),
        (["--action", "revoke", "--id", "x", "--actor"], "--actor is missing; action revoke needs --id, --actor"),
        (["--name", "x"], "--name x: action list takes no --name"),
        (["--action", "delete"], "action = 'delete'"),
        (["--action", "create", "--name", "x", "--role", "boss", "--actor", "A"], "role is 'boss'; expected one of"),
        (["--action", "revoke", "--id", "12", "--actor", "A"], "store.db does not exist"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(tmp_path, flags, message):
    answer = command(*flags, home=tmp_path / "home")
    assert answer.returncode == 2
    assert message in answer.stderr and len(answer.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "home" / "store.db").exists() or "boss" in flags
