"""Flags of a dataset: the findings of `audit`, and those that only a mask and its scores can show."""

from typing import Any

from sstoken.errors import SstokenError
from sstoken.stages.report.statistics import FLAGS, Statistics

AUDITED_ROWS = 10_000
"""Most rows that are audited, from the first; `audit` itself reads all."""


def flags(stats: Statistics) -> list[dict[str, Any]]:
    """Return every flag that applies, most severe first.

    Returns:
        `title`, `severity` (`error`, `warning`, `note`), `examples` (a count), `of` (examples checked), `about`, and
        `rows`, some examples that have it.
    """
    found = _audited(stats)
    known = {flag["kind"] for flag in found}
    for name, (count, rows) in stats.flags.items():
        title, about, same = FLAGS[name]
        if count and same not in known:
            facts = {"title": title, "about": about, "examples": count, "rows": rows}
            found.append({"kind": name, "severity": "note", "of": stats.examples, **facts})
    return found


def _audited(stats: Statistics) -> list[dict[str, Any]]:
    from sstoken.stages.auditing.run import audit

    try:
        result = audit(stats.folders.first.path, limit=AUDITED_ROWS)
    except SstokenError as error:
        stats.folders.notes.append(f"Not audited: {error}")
        return []
    looked_at = min(AUDITED_ROWS, stats.examples)
    return [
        {
            "kind": finding.kind,
            "severity": finding.severity,
            "title": finding.kind.replace("-", " ").capitalize(),
            "examples": finding.rows,
            "of": looked_at,
            "about": f"{finding.what[:1].upper()}{finding.what[1:]}. What to do: {finding.remedy}.",
            "rows": [] if finding.example is None else [finding.example.row],
        }
        for finding in result.findings
    ]
