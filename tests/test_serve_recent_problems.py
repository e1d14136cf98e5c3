"""Refusals and failures are counted by the hour, for a week."""

from __future__ import annotations

from serve.recent_problems import RecentProblems


def test_problems_are_counted_in_windows_and_forgotten_after_a_week():
    clock = [1_000 * 3600.0]
    problems = RecentProblems(lambda: clock[0])
    problems.add(503, "unavailable")
    clock[0] += 2 * 3600
    problems.add(503, "unavailable")
    problems.add(401, "unauthorized")
    assert problems.counts(1) == {(503, "unavailable"): 1, (401, "unauthorized"): 1}
    assert problems.counts(24)[503, "unavailable"] == 2 and problems.began_s == 1_000 * 3600
    clock[0] += 168 * 3600
    problems.add(404, "not_found")
    assert problems.counts(10_000) == {(404, "not_found"): 1}
