"""The registry of findings: what each kind means, how severe it is and what to do about it.

A family of checks declares its kinds with `FAMILY.kind(...)` at the top of its file; docs/audit.md is generated
from them.
"""

from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""Most severe first. An error trains something unintended, a warning probably does, a note only counts."""
Needs = Literal["ids", "tokenizer", "template", "raw"]
"""What a check needs: only token ids, a tokenizer, a chat template whose turns are found in the rows, or raw rows."""


@dataclass(frozen=True)
class Kind:
    """One kind of finding."""

    name: str
    """Stable, in kebab case."""
    severity: Severity
    what: str
    """What is wrong; follows a number of rows: "rows in which ..."."""
    remedy: str
    """What to do."""
    needs: Needs = "ids"


KINDS: dict[str, Kind] = {}
"""By name, in the order of the documentation."""


@dataclass(frozen=True)
class Family:
    """Checks that a file has together."""

    name: str
    kinds: list[Kind] = field(default_factory=list)

    def kind(self, name: str, severity: Severity, what: str, remedy: str, needs: Needs = "ids") -> Kind:
        """Declare a kind of finding."""
        assert name not in KINDS, name
        KINDS[name] = Kind(name, severity, what, remedy, needs)
        self.kinds.append(KINDS[name])
        return KINDS[name]
