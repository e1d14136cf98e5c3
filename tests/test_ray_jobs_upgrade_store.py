"""A store is upgraded by a job that tells what it does, and otherwise only by a deploy."""

from __future__ import annotations

import pytest
import sqlalchemy as sql

from ray_jobs import job
from ray_jobs.manage_api_keys import ManageApiKeysConfig
from ray_jobs.manage_api_keys import run as manage_api_keys
from ray_jobs.upgrade_store import UpgradeStoreConfig, run
from store.database import look_at_store, open_store
from store.tables import SCHEMA_VERSION
from tests.old_stores import make_version_1, plain_engine, run_script


def version_of(url: str) -> int:
    store, version = look_at_store(url)
    store.close()
    return version


def test_a_dry_run_tells_and_an_upgrade_does(any_store_url, capsys):
    make_version_1(any_store_url)
    told = run(UpgradeStoreConfig(store_url=any_store_url, dry_run=True))
    assert (told["from_version"], told["to_version"], told["changed"]) == (1, SCHEMA_VERSION, False)
    assert [step["version"] for step in told["migrations"]] == list(range(2, SCHEMA_VERSION + 1))
    assert "would bring schema version 2: Candidates" in capsys.readouterr().err
    assert version_of(any_store_url) == 1
    done = run(UpgradeStoreConfig(store_url=any_store_url))
    assert done == {**told, "changed": True}
    assert "bringing schema version 2: Candidates" in capsys.readouterr().err
    again = run(UpgradeStoreConfig(store_url=any_store_url))
    assert (again["from_version"], again["migrations"], again["changed"]) == (SCHEMA_VERSION, [], False)
    open_store(any_store_url, create=False).close()


def test_where_there_is_no_store_none_is_made(any_store_url, tmp_path):
    with pytest.raises(ValueError, match="store_url: there is no store at .*; deploy_service makes it"):
        run(UpgradeStoreConfig(store_url=any_store_url))
    assert not (tmp_path / "store.db").exists()


def test_other_jobs_leave_an_old_store_to_its_service_and_name_the_upgrade(any_store_url):
    make_version_1(any_store_url)
    for config in ({"action": "list"}, {"action": "create", "name": "n", "role": "caller", "actor": "Ada"}):
        with pytest.raises(ValueError, match="schema version 1; .*python -m ray_jobs.upgrade_store"):
            manage_api_keys(ManageApiKeysConfig(store_url=any_store_url, **config))
    assert version_of(any_store_url) == 1
    run(UpgradeStoreConfig(store_url=any_store_url))
    assert [key["name"] for key in manage_api_keys(ManageApiKeysConfig(store_url=any_store_url))["keys"]] == ["clinic"]


@pytest.mark.postgres
def test_the_line_that_names_the_upgrade_shows_no_password(postgres_url):
    make_version_1(postgres_url)
    with pytest.raises(ValueError, match="schema version 1") as caught:
        open_store(postgres_url.replace("dermray@", "dermray:pass-word@"))
    assert "pass-word" not in str(caught.value)


def test_a_store_of_a_later_release_is_left_alone(any_store_url):
    make_version_1(any_store_url)
    run_script(any_store_url, "INSERT INTO schema_version VALUES (99)")
    with pytest.raises(ValueError, match=f"schema version 99; this release reads version {SCHEMA_VERSION}"):
        run(UpgradeStoreConfig(store_url=any_store_url))


def test_a_store_in_use_is_left_as_it_was(tmp_path, monkeypatch, capsys):
    url = f"sqlite:///{tmp_path}/store.db"
    make_version_1(url)
    monkeypatch.setattr("store.connection.BUSY_TIMEOUT_MS", 50)
    monkeypatch.setattr("sys.argv", ["upgrade_store", "--store-url", url])
    engine = plain_engine(url)
    with engine.connect() as writer:
        writer.execute(sql.text("UPDATE alarms SET severity = 'error'"))
        with pytest.raises(SystemExit) as ended:
            job.run_job("upgrade_store", UpgradeStoreConfig, run)
        assert ended.value.code == 2
        assert "database is locked" in capsys.readouterr().err.splitlines()[-1]
    engine.dispose()
    assert version_of(url) == 1
