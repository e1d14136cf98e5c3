"""Brings a store of an older release up to this release's schema, all or nothing; `--dry-run` tells what it would do.

Replicas of an older release that have the store open go on with it, but those that start later cannot open it:
`deploy_service`, which upgrades the store too, also brings the replicas that can. Back up the store first; there is no
way back. Running it again changes nothing.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ray_jobs.job import JobConfig, Location, run_job, say
from store.database import look_at_store, open_store
from store.tables import SCHEMA_VERSION


class UpgradeStoreConfig(JobConfig):
    store_url: Location = "sqlite:///store.db"
    dry_run: bool = Field(False, description="tell what would be done, and change nothing")


def _version(store_url: str) -> int:
    found = look_at_store(store_url)
    if found is None:
        raise ValueError(f"store_url: there is no store at {store_url.rpartition('@')[2]}; deploy_service makes it")
    store, version = found
    store.close()
    return version


def run(config: UpgradeStoreConfig) -> dict[str, Any]:
    """Upgrades a store.

    Returns:
        from_version, to_version: the schema's before and after, or, with `dry_run`, what it would be after;
        migrations: the steps; changed.

    Raises:
        ValueError: no store, or one of a later release.
        StoreUnavailableError: the database does not answer or is in use; the store is as it was.
    """
    from store.schema_upgrade import migrations_after

    before = _version(config.store_url)
    steps = [step._asdict() for step in migrations_after(before)]
    for step in steps:
        say(f"{'would bring' if config.dry_run else 'bringing'} schema version {step['version']}: {step['summary']}")
    if steps and not config.dry_run:
        open_store(config.store_url, create=False, upgrade=True).close()
    after = SCHEMA_VERSION if config.dry_run else _version(config.store_url)
    changed = bool(steps) and not config.dry_run
    return {"from_version": before, "to_version": after, "migrations": steps, "changed": changed}


if __name__ == "__main__":
    run_job("upgrade_store", UpgradeStoreConfig, run, __doc__)
