"""The verbs: each is written once, in one file of this folder, as a function and as a command.

The index below is read from the source text, so that `--help` and `from sstoken import curate` load nothing heavy.
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
    """What the index knows of a public name."""

    module: str
    about: str | None
    """The first line of its docstring; None: not a verb, such as the type of a result."""


@cache
def index() -> dict[str, Entry]:
    """Every public name of the Python API."""
    return {
        name: Entry(f"{__name__}.{group}", about)
        for group in GROUPS
        for name, about in _names((Path(__file__).parent / f"{group}.py").read_text(encoding="utf-8"))
    }


@cache
def verbs() -> dict[str, str]:
    """What the help says of each verb of the command line, by name."""
    return {name: entry.about for name, entry in index().items() if entry.about is not None}


def _names(source: str) -> Iterator[tuple[str, str | None]]:
    """The names in `__all__`, with the first line of a verb's docstring; the verbs as they follow in the file.

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
