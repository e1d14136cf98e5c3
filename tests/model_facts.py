"""A candidate and a champion as the jobs tell the store of them."""

from __future__ import annotations

from typing import Any

from store.candidates import PROMOTED, mark_candidate, record_candidate
from store.database import Store
from store.model_facts import record_model_facts

CHAMPION, CANDIDATE = "c" * 64, "d" * 64


def report(auc: float, dark: float) -> dict[str, Any]:
    """One context's report; `dark`: sensitivity in the subgroup of dark skin."""
    gate = {
        "n": 1007,
        "n_malignant": 115,
        "auc": {"value": auc, "low": auc - 0.04, "high": auc + 0.04},
        "pauc": {"value": 0.1, "low": 0.08, "high": 0.12},
        "sensitivity": 0.95,
        "intervals": {"sensitivity": {"low": 0.91, "high": 0.99}},
        "specificity": 0.36,
        "calibration_slope": 1.03,
        "calibration_intercept": -0.02,
        "ece": 0.02,
    }
    row = {"column": "skin tone", "n": 300, "n_malignant": 30, "auc": 0.8, "pauc": 0.1, "specificity": 0.4}
    subgroups = [row | {"value": "light", "sensitivity": 0.96}, row | {"value": "dark", "sensitivity": dark}]
    few = row | {"value": "(missing)", "n_malignant": 4, "sensitivity": None}
    return {"none": {"gate": gate, "subgroups": [*subgroups, few]}}


def verdict(passed: bool) -> dict[str, Any]:
    """What the gate said of the candidate."""
    line = {"context": "none", "detail": "95 % interval 0.86 to 0.94", "limit": ">= 0.75", "rule": "min_auc"}
    loss = {"context": "none", "detail": "0.9565 -> 0.8870", "limit": "<= 0", "rule": "max_sensitivity_drop"}
    difference = {"candidate": 0.93, "champion": 0.9, "value": 0.03, "low": 0.011, "high": 0.05}
    comparison = {"n": 1007, "n_malignant": 115, "malignant_groups": 77, "gained": 6, "lost": 2, "subgroups": []}
    comparison |= dict.fromkeys(("auc", "pauc", "sensitivity", "specificity"), difference)
    return {
        "passed": passed,
        "results": [
            line | {"value": 0.93, "passed": True},
            loss | {"value": 0.0 if passed else 0.0695, "passed": passed},
        ],
        "notes": ["Both models were trained on this version of the data set."],
        "champion_version": "3",
        "paired": True,
        "comparisons": {"none": comparison},
    }


def engines(chosen: bool = True) -> dict[str, Any]:
    """An engine set of one device: one engine agrees, one is refused."""
    times = {"ms_per_image": {"1": 6.1, "8": 4.25}, "images_per_second": {"1": 160.0, "8": 235.0}}
    int8 = {"passed": False, "reason": "differs by 0.031 of probability", "ms_per_image": {}, "images_per_second": {}}
    return {
        "chosen": {"1": "onnxruntime-cpu-1", "8": "onnxruntime-cpu-1"} if chosen else {},
        "candidates": [
            {"candidate": {"name": "onnxruntime-int8", "precision": "int8"}, **int8},
            {"candidate": {"name": "onnxruntime-cpu-1", "precision": "fp32"}, "passed": True, "reason": "", **times},
        ],
    }


def a_candidate_and_a_champion(store: Store, passed: bool = True, requested_by: str | None = "Dr Weber") -> None:
    """Version 3 is the champion after version 2, version 4 waits."""
    for version, digest in (("2", "b" * 64), ("3", CHAMPION), ("4", CANDIDATE)):
        asked = requested_by if version == "4" else None
        record_candidate(store, version, digest, {"none": {"auc": {"value": 0.9}}}, requested_by=asked)
    for version, previous, digest in (("2", None, "b" * 64), ("3", "2", CHAMPION)):
        gate = {"previous": previous, "bundle_digest": digest, "registry_event": f"{version}@then"}
        mark_candidate(store, version, digest, PROMOTED)
        store.record_approval(version, "Dr Adams", f"version {version} sees more", "promote", gate)
    record_model_facts(store, CHAMPION, "report", report(0.9, 0.95))
    record_model_facts(store, CANDIDATE, "report", report(0.93, 0.8))
    record_model_facts(store, CANDIDATE, "engines", {"amd-epyc": engines()})
    record_model_facts(store, CANDIDATE, "gate", {"": verdict(passed)})
