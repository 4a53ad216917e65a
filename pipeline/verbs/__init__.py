"""The verbs. Each is defined once, in a file of this folder, as a function and a command.

The index below is parsed from the source text, so that `--help` and `from sstoken import curate` import nothing heavy.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

GROUPS = (
    "runs",
    "planning",
    "configuring",
    "stages",
    "trajectory",
    "hub",
    "looking",
    "auditing",
    "reporting",
)
"""The files of this folder that define verbs, in the order of the help."""


@dataclass(frozen=True)
class Entry:
    """The index's entry of a public name."""

    module: str
    about: str | None
    """The first line of its docstring; None: it is no verb but, for example, a result's type."""


@cache
def index() -> dict[str, Entry]:
    """Index every public name of the Python API."""
    return {
        name: Entry(f"{__name__}.{group}", about)
        for group in GROUPS
        for name, about in _names((Path(__file__).parent / f"{group}.py").read_text(encoding="utf-8"))
    }


@cache
def verbs() -> dict[str, str]:
    """Each verb of the command line with its line of help."""
    return {name: entry.about for name, entry in index().items() if entry.about is not None}


def _names(source: str) -> Iterator[tuple[str, str | None]]:
    """Yield the names in `__all__`, verbs in file order, each verb with the first line of its docstring.

    A verb is a function followed by its `@command(...)`, or `name = verb(Call)`.
    """
    classes: dict[str, str] = {}
    found: dict[str, str] = {}
    listed: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            about = (ast.get_docstring(node) or "").partition("\n")[0]
            if isinstance(node, ast.FunctionDef):
                found[node.name] = about
            else:
                classes[node.name] = about
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
            if name == "__all__":
                listed = ast.literal_eval(value)
            elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "verb":
                assert isinstance(value.args[0], ast.Name)
                found[name] = classes[value.args[0].id]
    listed.sort(key=lambda name: list(found).index(name) if name in found else len(found))
    return ((name, found.get(name)) for name in listed)
