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
    with pytest.raises(ValueError, match="audit entry 4 was changed"):
        audit_chain.verify(changed)


def test_a_removed_entry_is_found(chain):
    with pytest.raises(ValueError, match="audit entry 3 is missing"):
        audit_chain.verify(chain[:2] + chain[3:])
