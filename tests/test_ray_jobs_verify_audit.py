"""The audit trail is verified where it lies: each way to tamper with it is named, in one line."""

from __future__ import annotations

import fcntl
import json
import threading
import tracemalloc
from pathlib import Path

import pytest
import sqlalchemy as sql

from ray_jobs.verify_audit import VerifyAuditConfig, run
from store import audit_chain, audit_trail
from store.audit_anchors import open_anchors
from store.database import look_at_store, open_store
from store.tables import audit
from tests.old_stores import make_version_1, plain_engine

pytestmark = pytest.mark.slow

NUM_ENTRIES = 7
KEY = "a key of the auditor's"


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr(audit_trail, "_PAGE_ROWS", 3)
    monkeypatch.delenv("DERMRAY_AUDIT_KEY", raising=False)


class Trail:
    """A store with an audit trail, and someone who can write its database."""

    def __init__(self, url: str, folder: Path):
        self.url = url
        self.anchor = folder / "kept" / "anchors.jsonl"
        self.store = open_store(url)
        self.grow(NUM_ENTRIES)

    def grow(self, number: int) -> None:
        for index in range(number):
            self.store.append_audit("Ada", "promote", f"model/{index}", {"auc": 0.1, "née": [index, None]})

    def verify(self, **config) -> dict:
        return run(VerifyAuditConfig(**{"store_url": self.url, "anchor": str(self.anchor), **config}))

    def tamper(self, statement: str, **values) -> None:
        engine = plain_engine(self.url)
        with engine.begin() as connection:
            connection.execute(sql.text(statement), values)
        engine.dispose()

    def entries(self) -> list[dict]:
        return self.store.audit_entries()

    def rewrite_from(self, number: int, **changes) -> None:
        """Replaces an entry and chains all later ones anew: valid in itself."""
        entries, last = self.entries(), None
        for entry in entries:
            if entry["id"] < number:
                last = entry
                continue
            values = {**entry, **(changes if entry["id"] == number else {})}
            values = {name: values[name] for name in ("at", "actor", "action", "subject", "detail")}
            last = audit_chain.next_entry(last, **values)
            with self.store.writing() as connection:
                connection.execute(sql.update(audit).where(audit.c.id == entry["id"]).values(**last))

    def anchors(self) -> list[dict]:
        return [json.loads(line) for line in self.anchor.read_text().splitlines()]


@pytest.fixture
def trail(any_store_url, tmp_path) -> Trail:
    made = Trail(any_store_url, tmp_path)
    yield made
    made.store.close()


def test_an_untouched_trail_is_verified_and_anchored(trail):
    head = trail.entries()[-1]["hash"]
    result = trail.verify()
    assert (result["length"], result["head"]) == (NUM_ENTRIES, head)
    assert (result["anchors_checked"], result["last_anchor_at"], result["signed"]) == (0, None, False)
    trail.grow(4)
    result = trail.verify()
    assert (result["length"], result["anchors_checked"]) == (NUM_ENTRIES + 4, 1)
    assert [anchor["id"] for anchor in trail.anchors()] == [NUM_ENTRIES, NUM_ENTRIES + 4]
    assert trail.anchors()[0]["hash"] == head


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE audit SET actor = 'Eve' WHERE id = 5", "audit entry 5 was changed"),
        ("UPDATE audit SET at = at + 1 WHERE id = 1", "audit entry 1 was changed"),
        ("UPDATE audit SET detail = '{}' WHERE id = 4", "audit entry 4 was changed"),
        ("UPDATE audit SET hash = 'x' WHERE id = 7", "audit entry 7 was changed"),
        ("UPDATE audit SET previous_hash = 'x' WHERE id = 3", "audit entry 3 was changed"),
        ("DELETE FROM audit WHERE id = 6", "audit entry 6 is missing"),
        ("DELETE FROM audit WHERE id <= 2", "audit entry 1 is missing"),
        ("UPDATE audit SET id = id - 1 WHERE id = 1", "audit entry 0 was inserted"),
        (
            "INSERT INTO audit SELECT -3, at, actor, action, subject, detail, previous_hash, 'x' FROM audit WHERE id=1",
            "audit entry -3 was inserted",
        ),
        ("UPDATE audit SET id = CASE id WHEN 3 THEN 40 ELSE id END", "audit entry 3 is missing"),
    ],
)
def test_tampering_is_named(trail, statement, message):
    trail.verify()
    trail.tamper(statement)
    for anchor in (str(trail.anchor), None):
        with pytest.raises(ValueError, match=message) as caught:
            trail.verify(anchor=anchor)
        assert "\n" not in str(caught.value)
    assert len(trail.anchors()) == 1


def test_entries_that_changed_places_are_named(trail):
    for old, new in ((3, 100), (4, 3), (100, 4)):
        trail.tamper("UPDATE audit SET id = :new WHERE id = :old", old=old, new=new)
    with pytest.raises(ValueError, match="audit entry 3 was changed"):
        trail.verify()


def test_an_entry_changed_with_its_hash_is_named(trail):
    entry = {**trail.entries()[4], "actor": "Eve"}
    trail.tamper("UPDATE audit SET actor = 'Eve', hash = :hash WHERE id = 5", hash=audit_chain.entry_hash(entry))
    with pytest.raises(ValueError, match="audit entry 6 does not follow entry 5"):
        trail.verify()


def test_a_detail_that_is_no_json_is_named(tmp_path):
    trail = Trail(f"sqlite:///{tmp_path}/store.db", tmp_path)
    trail.tamper("UPDATE audit SET detail = '{broken' WHERE id = 5")
    with pytest.raises(ValueError, match="audit entry 5 was changed"):
        trail.verify()
    trail.store.close()


def test_entries_cut_off_the_end_are_noticed(trail):
    trail.verify()
    trail.tamper("DELETE FROM audit WHERE id > 5")
    assert trail.verify(anchor=None)["length"] == 5
    with pytest.raises(
        ValueError, match=f"audit entry 6 is missing: .* ends at entry 5, and entry {NUM_ENTRIES} was anch"
    ):
        trail.verify()
    trail.tamper("DELETE FROM audit")
    with pytest.raises(ValueError, match="audit entry 1 is missing"):
        trail.verify()


def test_a_chain_written_anew_is_noticed(trail):
    trail.verify()
    trail.grow(1)
    trail.verify()
    trail.rewrite_from(3, actor="Eve")
    assert trail.verify(anchor=None)["length"] == NUM_ENTRIES + 1
    with pytest.raises(ValueError, match=f"audit entry {NUM_ENTRIES} is not the one that was anchored"):
        trail.verify()


def test_what_no_run_has_anchored_can_be_written_anew(trail):
    """As documented: an anchor protects what was there when it was written."""
    trail.verify()
    trail.grow(2)
    trail.rewrite_from(NUM_ENTRIES + 1, actor="Eve")
    assert trail.verify()["length"] == NUM_ENTRIES + 2


def test_who_writes_database_and_file_can_forge_anchors_that_are_not_signed(trail, monkeypatch):
    for key in (None, KEY):
        if key is not None:
            trail.anchor.unlink()
            monkeypatch.setenv("DERMRAY_AUDIT_KEY", key)
        trail.verify()
        trail.rewrite_from(3, actor=f"Eve {key}")
        (anchor,) = trail.anchors()
        trail.anchor.write_text(json.dumps({**anchor, "hash": trail.entries()[-1]["hash"]}) + "\n")
        if key is None:
            assert trail.verify()["anchors_checked"] == 1
        else:
            with pytest.raises(ValueError, match="line 1 is not signed with this DERMRAY_AUDIT_KEY"):
                trail.verify()


def test_signed_anchors_need_their_key(trail, monkeypatch):
    monkeypatch.setenv("DERMRAY_AUDIT_KEY", KEY)
    assert trail.verify()["signed"] is True
    assert trail.verify()["anchors_checked"] == 1
    monkeypatch.setenv("DERMRAY_AUDIT_KEY", KEY + "!")
    with pytest.raises(ValueError, match="line 1 is not signed with this"):
        trail.verify()
    monkeypatch.delenv("DERMRAY_AUDIT_KEY")
    with pytest.raises(ValueError, match="line 1 is signed; DERMRAY_AUDIT_KEY is not in the environment"):
        trail.verify()
    assert KEY not in trail.anchor.read_text() and len(trail.anchors()) == 2


def test_unsigned_anchors_do_not_pass_for_signed_ones(trail, monkeypatch):
    trail.verify()
    monkeypatch.setenv("DERMRAY_AUDIT_KEY", KEY)
    with pytest.raises(ValueError, match="line 1 is not signed with this"):
        trail.verify()
    monkeypatch.setenv("DERMRAY_AUDIT_KEY", "short")
    with pytest.raises(ValueError, match="DERMRAY_AUDIT_KEY has 5 characters; expected at least 16") as caught:
        trail.verify()
    assert "short" not in str(caught.value)


def test_anchors_cut_off_with_the_entries_are_noticed_by_their_age(trail, monkeypatch):
    monkeypatch.setenv("DERMRAY_AUDIT_KEY", KEY)
    with pytest.raises(ValueError, match="holds no anchor; expected one of the last 25 hours"):
        trail.verify(max_anchor_age_h=25)
    day = 86_400_000_000
    now = trail.entries()[-1]["at"]
    for days in (0, 1, 2):
        monkeypatch.setattr("ray_jobs.verify_audit.now_us", lambda days=days: now + days * day)
        trail.verify(max_anchor_age_h=25 if days else None)
        trail.grow(1)
    trail.anchor.write_text(trail.anchor.read_text().splitlines()[0] + "\n")
    trail.tamper(f"DELETE FROM audit WHERE id > {NUM_ENTRIES}")
    assert trail.verify(anchor=None)["length"] == NUM_ENTRIES
    with pytest.raises(ValueError, match="the newest anchor in .*: lines were cut off"):
        trail.verify(max_anchor_age_h=25)


@pytest.mark.parametrize("cut", [1, 30, "whole line without its break"])
def test_a_run_that_died_while_it_added_an_anchor_is_no_tampering(trail, cut, capsys):
    trail.verify()
    whole = trail.anchor.read_bytes()
    trail.grow(1)
    trail.verify()
    second = trail.anchor.read_bytes()[len(whole) :]
    trail.anchor.write_bytes(whole + (second[:-1] if isinstance(cut, str) else second[:cut]))
    result = trail.verify()
    assert (result["length"], result["anchors_checked"]) == (NUM_ENTRIES + 1, 1)
    assert "is torn" in capsys.readouterr().err
    assert [anchor["id"] for anchor in trail.anchors()] == [NUM_ENTRIES, NUM_ENTRIES + 1]
    assert trail.anchor.read_bytes().startswith(whole)


@pytest.mark.parametrize(
    "line",
    [
        "torn in the middle",
        "[1]",
        '{"id": 1}',
        '{"id": "1", "hash": "x", "at": 1}',
        '{"id": 1, "hash": "x", "at": 1.5}',
    ],
)
def test_a_damaged_line_before_the_last_is_named(trail, line):
    trail.verify()
    trail.anchor.write_text(line + "\n" + trail.anchor.read_text())
    with pytest.raises(ValueError, match="line 1 is no anchor"):
        trail.verify()


def test_anchors_that_contradict_are_named(trail):
    trail.verify()
    (anchor,) = trail.anchors()
    with trail.anchor.open("a") as file:
        file.write(json.dumps({**anchor, "hash": "0" * 64}) + "\n")
    with pytest.raises(ValueError, match=f"line 2 contradicts an earlier one about audit entry {NUM_ENTRIES}"):
        trail.verify()


def test_runs_at_once_and_an_audit_that_grows_meanwhile_are_no_tampering(trail):
    errors, start = [], threading.Barrier(5)

    def verify() -> None:
        start.wait()
        try:
            for _ in range(3):
                trail.verify()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=verify) for _ in range(4)]
    for thread in threads:
        thread.start()
    start.wait()
    trail.grow(20)
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert len(trail.anchors()) == 12
    result = trail.verify()
    assert (result["length"], result["anchors_checked"]) == (NUM_ENTRIES + 20, 12)


def test_an_old_store_is_verified_as_it_is(any_store_url, tmp_path):
    make_version_1(any_store_url)
    assert run(VerifyAuditConfig(store_url=any_store_url, anchor=str(tmp_path / "anchors")))["length"] == 1
    store, version = look_at_store(any_store_url)
    store.close()
    assert version == 1


def test_an_empty_trail_is_not_anchored(tmp_path):
    url = f"sqlite:///{tmp_path}/store.db"
    open_store(url).close()
    result = run(VerifyAuditConfig(store_url=url, anchor=str(tmp_path / "anchors")))
    assert (result["length"], result["head"]) == (0, "0" * 64)
    assert (tmp_path / "anchors").read_bytes() == b""


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"store_url": "sqlite:///none.db"}, "there is no store at .*none.db"),
        ({"anchor": "s3://bucket/x"}, "anchor = 's3://bucket/x': expected a file"),
        ({"anchor": "store.db/x"}, "anchor = .* cannot be opened"),
        ({"anchor": "."}, "anchor = .* cannot be opened: Is a directory"),
        ({"anchor": None, "max_anchor_age_h": 3}, "max_anchor_age_h = 3: expected null"),
    ],
)
def test_wrong_settings_are_named(dermray_home, config, message):
    open_store(f"sqlite:///{dermray_home}/store.db").close()
    with pytest.raises(ValueError, match=message):
        run(VerifyAuditConfig(**config))


def test_a_long_trail_is_read_in_the_memory_of_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_trail, "_PAGE_ROWS", 50)
    url = f"sqlite:///{tmp_path}/store.db"
    store, last, entries = open_store(url), None, []
    for index in range(3_000):
        last = audit_chain.next_entry(last, index, "Ada", "label", "prediction/1", {"comment": f"{index:04d}" * 500})
        entries.append(last)
    with store.writing() as connection:
        connection.execute(sql.insert(audit), entries)
    store.close()
    del entries, last
    config = VerifyAuditConfig(store_url=url, anchor=str(tmp_path / "anchors"))
    run(config)  # statements are compiled and kept once
    tracemalloc.start()
    try:
        assert run(config)["length"] == 3_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # All entries together have 6 MB, a page of them 0.1 MB.
    assert peak < 2_000_000


def test_who_reads_the_anchors_has_them_alone(tmp_path):
    path = tmp_path / "anchors"
    with open_anchors(path, None), path.open("a") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with path.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
