"""The gate's table for people: aligned on a terminal, and as a Markdown page."""

from __future__ import annotations

from monitoring.promotion_gate import GateReport

_HEADER = ("", "rule", "context", "value", "required", "detail")


def _rows(report: GateReport) -> list[tuple[str, ...]]:
    return [("passed" if r.passed else "FAILED", r.rule, r.context, r.shown, r.limit, r.detail) for r in report.results]


def table_lines(report: GateReport) -> list[str]:
    """One line per rule, columns aligned, header first."""
    rows = [_HEADER, *_rows(report)]
    # The last column may be long: nothing stands behind it.
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)), row[-1]]).rstrip()
        for row in rows
    ]


def markdown(report: GateReport, version: str, champion: str | None, notes: list[str]) -> str:
    """The table as a page, with the verdict and the rules that failed first.

    Args:
        version, champion: registry versions.
        notes: sentences about how the figures came to be.
    """

    def line(cells: tuple[str, ...]) -> str:
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

    failed = [f"- {result}" for result in report.failed]
    beside = "no champion yet" if champion is None else f"champion: version {champion}, {report.champion_digest}"
    return "\n".join(
        [
            f"# Version {version}: {'passed' if report.passed else f'refused, {len(failed)} rules failed'}",
            "",
            f"Candidate {report.bundle_digest}; {beside}.",
            *notes,
            *(["", "Failed:", "", *failed] if failed else []),
            "",
            line(("verdict", *_HEADER[1:])),
            line(("---",) * len(_HEADER)),
            *(line(row) for row in _rows(report)),
            "",
        ]
    )
