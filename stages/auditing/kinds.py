"""The registry of findings: what each kind means, how severe it is and what to do about it.

A family of checks declares its kinds at the top of its file, such as `FAMILY.error(...)`;
docs/audit.md is generated from them.
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
    needs: Needs


KINDS: dict[str, Kind] = {}
"""By name, in the order of the documentation."""


@dataclass(frozen=True)
class Family:
    """Checks that a file has together."""

    name: str
    needs: Needs = "ids"
    """What its checks need, unless a kind says otherwise."""
    kinds: list[Kind] = field(default_factory=list)

    def error(self, name: str, what: str, remedy: str, needs: Needs | None = None) -> Kind:
        """Declare a kind of error."""
        return self._declare(Kind(name, "error", what, remedy, needs or self.needs))

    def warning(self, name: str, what: str, remedy: str, needs: Needs | None = None) -> Kind:
        """Declare a kind of warning."""
        return self._declare(Kind(name, "warning", what, remedy, needs or self.needs))

    def note(self, name: str, what: str, remedy: str, needs: Needs | None = None) -> Kind:
        """Declare a kind of note."""
        return self._declare(Kind(name, "note", what, remedy, needs or self.needs))

    def _declare(self, kind: Kind) -> Kind:
        assert kind.name not in KINDS, kind.name
        KINDS[kind.name] = kind
        self.kinds.append(kind)
        return kind
