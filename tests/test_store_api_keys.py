"""A key is shown once, found by nothing but its text, revoked for good, and each change is in the audit trail."""

from __future__ import annotations

import re
import sqlite3

import pytest

from store import audit_chain
from store.api_keys import ROLES, create_api_key, hash_key, list_api_keys, revoke_api_key
from store.database import Store, StoreUnavailableError, open_store


@pytest.fixture
def store(tmp_path):
    opened = open_store(f"sqlite:///{tmp_path}/store.db")
    yield opened
    opened.close()


def test_the_text_of_a_key_is_random_and_nowhere_on_disk(store, tmp_path):
    texts = {create_api_key(store, "clinic", "caller", "Ada")[1] for _ in range(3)}
    assert len(texts) == 3
    assert all(re.fullmatch(r"drk_[\w-]{43}", text) for text in texts)
    store.close()
    on_disk = b"".join(file.read_bytes() for file in tmp_path.glob("store.db*"))
    for text in texts:
        assert text.encode() not in on_disk
        assert hash_key(text).encode() in on_disk
        assert hash_key(text) == hash_key(text.encode())


def test_keys_are_listed_oldest_first_and_a_revoked_one_is_not_live(store):
    (first, _), (second, _) = (create_api_key(store, name, "caller", "Ada") for name in ("a", "b"))
    assert list_api_keys(store, live_only=True) == list_api_keys(store) == [first, second]
    revoked, changed = revoke_api_key(store, first.id, "Bob")
    assert changed and revoked.revoked_at >= first.created_at
    assert list_api_keys(store, live_only=True) == [second]
    assert list_api_keys(store) == [revoked, second]


def test_revoking_again_changes_nothing(store):
    key, _ = create_api_key(store, "clinic", "caller", "Ada")
    first, _ = revoke_api_key(store, key.id, "Bob")
    assert revoke_api_key(store, key.id, "Cleo") == (first, False)
    assert len(store.audit_entries()) == 2
    with pytest.raises(ValueError, match="id is 'nothing'; no API key has it"):
        revoke_api_key(store, "nothing", "Bob")


def test_who_made_and_who_revoked_is_in_the_audit_trail_and_the_key_is_not(store):
    key, text = create_api_key(store, " clinic ", "reviewer", "Ada")
    revoke_api_key(store, key.id, "Bob")
    entries = store.audit_entries()
    assert [(entry["actor"], entry["action"], entry["subject"]) for entry in entries] == [
        ("Ada", "create_api_key", f"api_key/{key.id}"),
        ("Bob", "revoke_api_key", f"api_key/{key.id}"),
    ]
    assert entries[0]["detail"] == {"name": "clinic", "role": "reviewer"}
    assert text not in str(entries) and key.key_hash not in str(entries)
    assert audit_chain.verify(entries) == 2


@pytest.mark.parametrize("change", ["create", "revoke"])
def test_without_its_audit_entry_no_change_is_made(store, monkeypatch, change):
    key, _ = create_api_key(store, "clinic", "caller", "Ada")

    def disk_full(*_):
        raise sqlite3.OperationalError("disk full")

    monkeypatch.setattr(Store, "_append_audit", disk_full)
    with pytest.raises((StoreUnavailableError, sqlite3.OperationalError)):
        if change == "create":
            create_api_key(store, "other", "caller", "Ada")
        else:
            revoke_api_key(store, key.id, "Ada")
    assert list_api_keys(store) == [key]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": " "}, "name is ' '"),
        ({"name": "x" * 256}, "1 to 255 printable"),
        ({"name": "a\nb"}, "name is"),
        ({"name": "a\ud800"}, "name is"),
        ({"name": "Anonymous"}, "stands for callers without a key"),
        ({"role": "root"}, "role is 'root'; expected one of caller, reviewer, approver, admin"),
        ({"actor": ""}, "actor is ''"),
    ],
)
def test_a_key_that_cannot_be_is_refused_by_name(store, values, message):
    fields = {"name": "clinic", "role": ROLES[0], "actor": "Ada"} | values
    with pytest.raises(ValueError, match=message):
        create_api_key(store, **fields)
    assert list_api_keys(store) == store.audit_entries() == []
