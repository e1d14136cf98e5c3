"""A refusal is audited once per attempt of a person, on both databases."""

from __future__ import annotations

import pytest

from store import audit_chain
from store.database import open_store
from store.refusals import record_refusal


@pytest.fixture
def store(any_store_url):
    made = open_store(any_store_url)
    yield made
    made.close()


def test_the_same_refusal_is_audited_once(store):
    def refuse(actor="Ada", action="promotion_refused", subject="model/2", **detail):
        return record_refusal(store, actor, action, subject, {"b": 1, "a": [1, 2.5, None]} | detail)

    assert refuse() is True
    assert refuse() is False
    assert [refuse("Bob"), refuse(subject="model/3"), refuse(action="approval_refused"), refuse(b=2)] == [True] * 4
    # What was refused for another reason in between is refused anew.
    assert refuse("Bob", b=2) is True and refuse("Bob", b=2) is False
    assert audit_chain.verify(store.audit_entries()) == 6
