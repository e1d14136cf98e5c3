"""Checks that nobody has changed the audit trail, entry by entry, and leaves an anchor of its end.

Exit status 2 and one line that names the first entry which was changed, removed, inserted or moved. Entries that were
cut off the end, and a chain that was written anew, are noticed by the anchors that earlier runs left in `--anchor`;
with DERMRAY_AUDIT_KEY in the environment these are signed. The store is only read, and may be an older release's.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pydantic import Field

from ray_jobs.job import JobConfig, Location, run_job, say
from store.audit_anchors import AnchorFile, anchor_key, open_anchors
from store.audit_chain import ChainCheck
from store.audit_trail import stored_entries
from store.database import Store, look_at_store
from store.tables import now_us


class VerifyAuditConfig(JobConfig):
    store_url: Location = "sqlite:///store.db"
    anchor: Location | None = Field(
        "audit_anchors.jsonl", description="file of anchors: checked, then one is added; null: the chain alone"
    )
    max_anchor_age_h: float | None = Field(
        None, gt=0, description="hours since the last run, at most: what is older shows that anchors were cut off"
    )


def _check(store: Store, anchors: AnchorFile | None) -> ChainCheck:
    chain = ChainCheck()
    for entry in stored_entries(store):
        chain.take(entry)
        if anchors is not None:
            anchors.check_entry(entry)
    if anchors is not None:
        anchors.check_length(chain.length)
    return chain


def _anchored(config: VerifyAuditConfig, anchors: AnchorFile) -> dict[str, Any]:
    if anchors.torn:
        say(f"the last line of {anchors.path} is torn: a run was cut off while it added an anchor")
    if config.max_anchor_age_h is not None:
        anchors.check_age(config.max_anchor_age_h * 3600, now_us())
    elif not anchors.anchors:
        say(f"{anchors.path} holds no anchor yet: entries that were cut off before this run are not noticed")
    return {
        "anchors_checked": len(anchors.anchors),
        "last_anchor_at": anchors.anchors[-1].time if anchors.anchors else None,
    }


def run(config: VerifyAuditConfig) -> dict[str, Any]:
    """Checks the chain, then anchors it.

    Returns:
        length: entries in the chain; head: hash of the last one; anchors_checked, last_anchor_at: of earlier runs.

    Raises:
        ValueError: the chain or an anchor was tampered with, or there is no store.
        StoreUnavailableError: the database does not answer.
    """
    if config.anchor is None and config.max_anchor_age_h is not None:
        raise ValueError(f"max_anchor_age_h = {config.max_anchor_age_h:g}: expected null where anchor is null")
    if config.anchor is not None and "://" in config.anchor:
        raise ValueError(f"anchor = {config.anchor!r}: expected a file of this machine")
    key = anchor_key(os.environ)
    found = look_at_store(config.store_url)
    if found is None:
        raise ValueError(f"store_url: there is no store at {config.store_url.rpartition('@')[2]}; the service makes it")
    store, _ = found
    opened = nullcontext() if config.anchor is None else open_anchors(Path(config.anchor), key)
    try:
        with opened as anchors:
            earlier = {} if anchors is None else _anchored(config, anchors)
            chain = _check(store, anchors)
            if anchors is not None and chain.length:
                anchors.append(chain, now_us())
    finally:
        store.close()
    signed = config.anchor is not None and key is not None
    return {"length": chain.length, "head": chain.head, "anchor": config.anchor, "signed": signed, **earlier}


if __name__ == "__main__":
    run_job("verify_audit", VerifyAuditConfig, run, __doc__)
