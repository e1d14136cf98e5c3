"""A change at one site is found and named, sites that differ are no news, and new places and mixes are told."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from modeling.schema import TaskSpec
from monitoring.drift_columns import Columns, reference_columns
from monitoring.drift_report import DriftSettings, WindowDrift, judge_window
from tests.drift_population import columns, lesions, reference

pytestmark = pytest.mark.slow

TASK = TaskSpec(
    name="tiny",
    fold_group="patient_id",
    label_column="target",
    classes=["benign", "malignant"],
    malignant=["malignant"],
    columns={"age_approx": {"kind": "numeric"}, "sex": {"kind": "categorical"}},
)
SETTINGS = DriftSettings(num_resamples=300, num_splits=15)
SITES = ("north", "south", "east", "west")


def traffic(seed: int, num_patients: int = 240, changed: str | None = None) -> pd.DataFrame:
    """Patients spread over four sites, the east's camera always darker; `changed` has a new one from now on."""
    table = lesions(num_patients, seed, (3, 5)).rename(columns={"age_approx": "meta.age_approx", "sex": "meta.sex"})
    site = np.random.default_rng(seed).choice(SITES, num_patients, p=[0.45, 0.25, 0.2, 0.1])
    table["institution"] = site[pd.factorize(table["group"])[0]]
    table.loc[table["institution"] == "east", "brightness"] -= 0.15
    if changed is not None:
        moved = table["institution"] == changed
        table.loc[moved, "red"] += 0.12
        table.loc[moved, "blur"] -= 0.6
    return table


@pytest.fixture(scope="module")
def known() -> Columns:
    # With the share of dark pictures that the traffic has.
    table = reference(120)
    table.loc[table["group"] % 5 == 0, "brightness"] -= 0.15
    return reference_columns(table, TASK)


@pytest.fixture(scope="module")
def before() -> Columns:
    trailing = columns(traffic(100, 400), TASK)
    days = np.random.default_rng(0).integers(0, 14, 400)[trailing.groups].astype(np.int32)
    return Columns(**{**vars(trailing), "period": days})


def judged(known, table, before, was_seen=lambda column, value: False) -> WindowDrift:
    return judge_window(known, columns(table, TASK), TASK, SETTINGS, before, was_seen)[0]


def by_value(verdict: WindowDrift):
    return {segment.value: segment for segment in verdict.segments}


def test_ordinary_days_are_quiet_though_one_site_always_differs(known, before):
    for seed in (1, 2, 3):
        verdict = judged(known, traffic(seed), before)
        assert verdict.drifted == []
        assert {s.value: (s.status, s.baseline) for s in verdict.segments} == dict.fromkeys(
            SITES, ("ok", "trailing days")
        )


def test_a_camera_changed_at_one_small_site_is_named_with_what_moved(known, before):
    verdict = judged(known, traffic(4, changed="west"), before)
    segments = by_value(verdict)
    assert {"red", "blur"} <= set(segments["west"].drifted)
    assert [value for value, segment in segments.items() if segment.drifted] == ["west"]
    assert {"red", "blur"}.isdisjoint(verdict.drifted)  # the whole window hides it
    (headline,) = [name for name in verdict.drifted if "west" in name]
    assert headline.startswith("institution 'west': ") and verdict.alarm
    assert WindowDrift.from_json(verdict.to_json()) == verdict


def test_without_earlier_days_or_a_reference_of_the_site_nothing_is_claimed(known):
    verdict = judged(known, traffic(4, changed="west"), None)
    assert {segment.status for segment in verdict.segments} == {"not_judged"}
    assert all("trailing days" in segment.reason for segment in verdict.segments)
    assert not any("west" in name for name in verdict.drifted)


def test_a_reference_that_names_the_site_is_what_it_is_compared_with(before):
    named = traffic(50, 300).rename(columns=lambda name: name.removeprefix("meta."))
    named["risk_none"] = named["risk"]
    verdict = judged(reference_columns(named, TASK), traffic(4, changed="west"), before)
    assert {segment.baseline for segment in verdict.segments} == {"reference"}
    assert [segment.value for segment in verdict.segments if segment.drifted] == ["west"]


def test_a_device_no_earlier_day_has_is_told_once_it_has_rows_enough(known, before):
    table = traffic(5)
    table["institution"] = table["institution"].where(table["institution"] != "west", "island")
    verdict = judged(known, table, before)
    new = by_value(verdict)["island"]
    assert new.status == "new" and any(name.startswith("new institution 'island'") for name in verdict.drifted)
    # A row that the sample of the earlier days missed is enough to know it.
    seen = judged(known, table, before, lambda column, value: (column, value) == ("institution", "island"))
    assert by_value(seen)["island"].status == "not_judged"
    few = table.index.isin(table.index[table["institution"] == "island"][:20])
    table.loc[(table["institution"] == "island") & ~few, "institution"] = "north"
    assert "island" not in by_value(judged(known, table, before))


def test_a_mix_of_sites_that_no_earlier_day_had_is_drift(known, before):
    table = traffic(6)
    table["institution"] = np.where(pd.factorize(table["group"])[0] % 10 < 8, "west", table["institution"])
    assert "institution mix" in judged(known, table, before).drifted


def test_the_budget_is_the_whole_windows_where_no_segment_can_be_judged(known):
    table = traffic(1)
    alone = judged(known, table.drop(columns="institution"), None)
    assert judged(known, table, None).features == alone.features
