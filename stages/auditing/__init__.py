"""`audit`: find out what a trainer would learn from a dataset.

    from sstoken.stages.auditing import audit

    result = audit("runs/masked")              # a folder of a run, data files, or a dataset in memory
    result = audit("data.jsonl", model="Qwen/Qwen3-0.6B")    # raw conversations
    for finding in result.findings:            # most severe first
        print(finding.severity, finding.kind, finding.rows, finding.what, finding.remedy)
        if finding.example is not None:
            print(finding.example.where, finding.example.text())

`result.facts` holds counts over the dataset, `result.to_dict()` everything ready for JSON. `checks/` has a file for
each family of checks, and docs/audit.md lists them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sstoken.stages.auditing.findings import AuditResult as AuditResult
    from sstoken.stages.auditing.findings import Finding as Finding
    from sstoken.stages.auditing.run import audit as audit

_PLACES = {"audit": "run", "AuditResult": "findings", "Finding": "findings"}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
