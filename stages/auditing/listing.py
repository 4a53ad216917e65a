"""The tables of all checks in docs/audit.md.

Run in the repository, `python -m sstoken.stages.auditing.listing` brings the page's tables up to date.
"""

from pathlib import Path

from sstoken.stages.auditing.checks import (
    answers,
    labels,
    lengths,
    packs,
    parts,
    rows,
    signals,
    special_tokens,
    template,
    turn_ends,
)
from sstoken.stages.auditing.findings import Family

_MODULES = (rows, packs, labels, turn_ends, special_tokens, parts, template, lengths, answers, signals)
"""In the order of the page."""

_NEEDS = {"ids": "", "tokenizer": "a tokenizer", "template": "a chat template", "raw": "raw conversations"}


def page(text: str) -> str:
    """Bring a copy of docs/audit.md up to date: its tables follow the line `<!-- checks -->`."""
    before, mark, _ = text.partition("<!-- checks -->\n")
    return "\n".join([before + mark, *(_table(module.FAMILY) for module in _MODULES)])


def _table(family: Family) -> str:
    lines = [f"### {family.name.capitalize()}", ""]
    lines += ["| kind | severity | what it counts | what to do | needs |", "|---|---|---|---|---|"]
    lines += [
        f"| `{k.name}` | {k.severity} | {_cell(k.what)} | {_cell(k.remedy)} | {_NEEDS[k.needs]} |"
        for k in family.kinds
    ]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    for given, escaped in (("|", "\\|"), ("{", "&#123;"), ("<", "&lt;")):
        text = text.replace(given, escaped)
    return text


if __name__ == "__main__":
    file = Path("docs/audit.md")
    file.write_text(page(file.read_text(encoding="utf-8")), encoding="utf-8")
