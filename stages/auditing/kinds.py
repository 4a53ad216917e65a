"""The registry of checks: what each kind of finding means, how grave it is and what to do about it.

A family of checks declares its kinds with `kind(...)` at the top of its file. The table in docs/audit.md is written
from this registry.
"""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""From the gravest: an error trains something else than was meant; a warning probably does; a note only counts."""
Needs = Literal["ids", "tokenizer", "template", "raw"]
"""What a check needs: token ids alone; a tokenizer; a chat template whose turns are found in the rows; raw rows."""


@dataclass(frozen=True)
class Kind:
    """One kind of finding."""

    name: str
    """Stable, in kebab case."""
    family: str
    severity: Severity
    what: str
    """What is wrong, to be read after a number of rows: "rows in which ..."."""
    remedy: str
    """What to do."""
    needs: Needs = "ids"


KINDS: dict[str, Kind] = {}
"""By name, in the order of the documentation."""


def kind(name: str, family: str, severity: Severity, what: str, remedy: str, needs: Needs = "ids") -> Kind:
    """Declare a kind of finding."""
    assert name not in KINDS, name
    KINDS[name] = Kind(name, family, severity, what, remedy, needs)
    return KINDS[name]
