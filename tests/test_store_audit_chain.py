"""The audit chain shows every later change."""

from __future__ import annotations

import copy

import pytest

from store import audit_chain


@pytest.fixture
def chain():
    entries: list[dict] = []
    for index in range(5):
        last = entries[-1] if entries else None
        entries.append(audit_chain.next_entry(last, 1_000 + index, "ann", "promote", f"model/{index}", {"n": (1, 2)}))
    return entries


def test_an_untouched_chain_verifies(chain):
    assert audit_chain.verify(chain) == 5
    assert audit_chain.verify([]) == 0


@pytest.mark.parametrize("field, value", [("actor", "eve"), ("detail", {"n": [1, 3]}), ("at", 7), ("hash", "0" * 64)])
def test_a_changed_entry_is_found(chain, field, value):
    changed = copy.deepcopy(chain)
    changed[2][field] = value
    with pytest.raises(ValueError, match="audit entry 3 was changed"):
        audit_chain.verify(changed)


def test_an_entry_changed_with_its_hash_breaks_the_next(chain):
    changed = copy.deepcopy(chain)
    changed[2]["actor"] = "eve"
    changed[2]["hash"] = audit_chain.entry_hash(changed[2])
    with pytest.raises(ValueError, match="audit entry 4 does not follow entry 3"):
        audit_chain.verify(changed)


def test_a_removed_entry_is_found(chain):
    with pytest.raises(ValueError, match="audit entry 3 is missing"):
        audit_chain.verify(chain[:2] + chain[3:])


def test_a_chain_with_its_start_cut_off_is_found(chain):
    with pytest.raises(ValueError, match="audit entry 1 is missing"):
        audit_chain.verify(chain[1:])


def test_an_inserted_entry_is_found(chain):
    forged = audit_chain.next_entry(chain[2], 5, "eve", "promote", "model/9", {})
    with pytest.raises(ValueError, match="audit entry 4 was inserted: entry 5 was expected"):
        audit_chain.verify([*chain[:3], forged, *chain[3:]])
    later = [{**entry, "id": entry["id"] + 1} for entry in chain[3:]]
    later = [{**entry, "hash": audit_chain.entry_hash(entry)} for entry in later]
    with pytest.raises(ValueError, match="audit entry 5 does not follow entry 4"):
        audit_chain.verify([*chain[:3], forged, *later])


def test_entries_that_changed_places_are_found(chain):
    swapped = [*chain[:1], {**chain[2], "id": 2}, {**chain[1], "id": 3}, *chain[3:]]
    with pytest.raises(ValueError, match="audit entry 2 was changed"):
        audit_chain.verify(swapped)
    rehashed = [{**entry, "hash": audit_chain.entry_hash(entry)} for entry in swapped]
    with pytest.raises(ValueError, match="audit entry 2 does not follow entry 1"):
        audit_chain.verify(rehashed)


@pytest.mark.parametrize("detail", [{"n": float("nan")}, b"x", "{", None])
def test_a_detail_that_is_no_json_is_a_change(chain, detail):
    with pytest.raises(ValueError, match="audit entry 3 was changed"):
        audit_chain.verify([*chain[:2], {**chain[2], "detail": detail}, *chain[3:]])
