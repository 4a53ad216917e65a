"""The tables of all checks in docs/audit.md.

Run in the repository, `python -m sstoken.stages.auditing.listing` brings the page's tables up to date.
"""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from sstoken.stages.auditing import checks
from sstoken.stages.auditing.findings import Family

_NEEDS = {"ids": "", "tokenizer": "a tokenizer", "template": "a chat template", "raw": "raw conversations"}


def page(text: str) -> str:
    """Bring a copy of docs/audit.md up to date: its tables follow the line `<!-- checks -->`."""
    before, mark, _ = text.partition("<!-- checks -->\n")
    families = [import_module(f"{checks.__name__}.{m.name}").FAMILY for m in iter_modules(checks.__path__)]
    return "\n".join([before + mark, *map(_table, families)])


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
