"""The store of a service that is about to be deployed: looked at first, and made or upgraded last."""

from __future__ import annotations

from ray_jobs.job import say
from store.api_keys import list_api_keys
from store.database import StoreUnavailableError, look_at_store, open_store
from store.tables import SCHEMA_VERSION


def check_store(store_url: str, require_keys: bool) -> None:
    """Looks whether this release can use the store, and whether someone could call the service. Leaves the store as it
    is: a deploy that is refused after this must not have upgraded it under a service of an older release.

    Raises:
        ValueError: not a store or one of a later release, it does not answer, or keys are required and there is no
            live one.
    """
    try:
        found = look_at_store(store_url)
        keys = []
        if found is not None:
            store, _ = found
            try:
                keys = list_api_keys(store, live_only=True) if require_keys else []
            finally:
                store.close()
    except StoreUnavailableError as error:
        raise ValueError(f"store_url: {error}") from error
    if require_keys and not keys:
        raise ValueError(
            "access.require_keys: the store has no live API key; make one with "
            "python -m ray_jobs.manage_api_keys --action create --name NAME --role ROLE --actor YOU"
        )


def upgrade_store(store_url: str) -> bool:
    """Makes the store, or brings it up to this release's schema; the last step before the service changes.

    Not left to the replicas, whose first requests would wait for it. An upgrade only adds tables, indexes, and columns
    that may be left out, so replicas of an older release that have the store open, in this service or in another one,
    go on with it. One of theirs that starts later, or is put back, refuses it: then only a release that reads the new
    schema helps.

    Returns:
        Whether there was a store of an older release.

    Raises:
        ValueError: it cannot be made or upgraded; it is as it was.
    """
    try:
        found = look_at_store(store_url)
        if found is not None:
            found[0].close()
        older = found is not None and found[1] < SCHEMA_VERSION
        if older:
            say(
                f"the store goes from schema version {found[1]} to {SCHEMA_VERSION}: running replicas of an older "
                "release go on with it, but those that start later, or are put back, cannot open it"
            )
        open_store(store_url, upgrade=True).close()
    except StoreUnavailableError as error:
        raise ValueError(f"store_url: {error}") from error
    return older
