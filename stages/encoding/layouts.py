"""Dataset layouts: which column plays which role."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple, get_args

from sstoken.errors import SstokenError, UsageError
from sstoken.stages.encoding.column_names import is_media
from sstoken.stages.encoding.marks import PROMPTS_TOO, ROW_MARKS
from sstoken.stages.encoding.preference import wanted

Format = Literal["auto", "messages", "sharegpt", "prompt-completion", "alpaca", "qa"]
Preference = Literal["stop", "take"]

REQUIRED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "qa": ("question", "answer"),
}
"""The required roles of each format, in the order in which formats are tried."""
OPTIONAL: dict[str, tuple[str, ...]] = {
    "messages": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "context", "system", "history", "reasoning", "tools"),
    "prompt-completion": ("context", "system", "history", "reasoning", "tools"),
    "qa": ("context", "system", "history", "reasoning", "tools"),
}
OTHER_NAMES = {
    "conversations": ("conversation",),
    "output": ("response",),
    "completion": ("response",),
    "question": ("query",),
    "answer": ("response",),
    "context": ("passage",),
    "system": ("system_prompt", "system_message", "systemPrompt"),
    "reasoning": ("reasoning_content", "thinking"),
    "tools": ("functions",),
}
"""Alternative column names for a role, used if no column has the role's own name."""


class Beside(NamedTuple):
    """The columns of a row that play no role in its layout."""

    media: tuple[str, ...]
    """Columns named like media; whether they contain any depends on the row."""
    marks: tuple[str, ...]
    """Columns listed in `ROW_MARKS`."""
    others: tuple[str, ...]
    """All other columns except the row's own id."""


@lru_cache(maxsize=1000)
def _beside(columns: tuple[str, ...], used: frozenset[str]) -> Beside:
    columns = tuple(c for c in columns if c not in used)
    return Beside(
        tuple(filter(is_media, columns)),
        tuple(name for name in ROW_MARKS if name in columns),
        tuple(c for c in columns if c not in ROW_MARKS and c not in PROMPTS_TOO and c != "example_id"),
    )


@dataclass(frozen=True)
class Layout:
    """How the rows of a dataset hold conversations."""

    format: str
    """A `Format` other than `auto`."""
    columns: Mapping[str, str]
    """Each role of the format and the column that plays it, whether present or not."""
    ignored: frozenset[str] = frozenset()
    """Columns and message keys that the user wants ignored."""
    preference: Preference = "stop"
    """Whether to refuse preference rows or take their wanted answers."""

    def get(self, row: Mapping[str, Any], role: str) -> Any:
        """Return the row's value for `role`, or None."""
        return row.get(self.columns.get(role, ""))

    def beside(self, row: Mapping[str, Any]) -> Beside:
        """Classify the columns of a row that play no role."""
        return _beside(tuple(row), self._used)

    @cached_property
    def _used(self) -> frozenset[str]:
        return frozenset(self.columns.values())


class NoLayout(SstokenError):  # noqa: N818 (the dataset has none; the error is what is raised about it)
    """The columns of a row match no layout."""


def _formats(format: str) -> list[str]:
    return list(REQUIRED) if format == "auto" else [format]


def check_columns(format: str, columns: Mapping[str, str]) -> None:
    """Refuse roles that the format does not have, with a UsageError that lists those it has."""
    legal = sorted({role for name in _formats(format) for role in REQUIRED[name] + OPTIONAL[name]})
    for role in columns:
        if role not in legal:
            raise UsageError(f"column {role!r}: format {format} has the columns {', '.join(legal)}")


def detect_layout(
    row: Any,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    ignored: frozenset[str] = frozenset(),
    preference: Preference = "stop",
) -> Layout:
    """Detect the layout of a dataset from its first row.

    `auto` is the first format whose required columns are all present. `columns` says which column plays a role, where
    its name differs.

    Raises:
        NoLayout: no known layout has these columns, or `format` needs a column that is missing.
        BadRow: as `wanted`.
    """
    given = columns or {}
    row, _ = wanted(row, ignored, take=preference == "take")
    for name in _formats(format):
        resolved = {role: _column(row, role, given) for role in REQUIRED[name] + OPTIONAL[name]}
        if all(resolved[role] in row for role in REQUIRED[name]):
            return Layout(name, resolved, ignored, preference)
    known = "; ".join(f"{name} ({', '.join(REQUIRED[name])})" for name in _formats(format))
    if set(row) - {"example_id", "meta", "id", "source"} == {"text"}:
        raise NoLayout(
            "the column text alone matches no layout: which part of a text is the answer cannot be told; give the "
            "messages that it was made from, or cut it into prompt and completion"
        )
    raise NoLayout(
        f"the columns {', '.join(map(str, row)) or '(none)'} match no known layout: {known}; {_way_out(row, format)}"
    )


def _way_out(row: Mapping[str, Any], format: str) -> str:
    """Return what to do about columns that match no layout."""
    names = [str(name) for name in row]
    if len(names) == 1 and (mark := next((m for m in ";\t|" if m in names[0]), None)):
        return f"they look separated by {mark!r}; save the file with commas"
    inside = [n for n, v in row.items() if isinstance(v, list) and v and isinstance(v[0], Mapping)]
    if len(names) - len(inside) <= 1 and inside:
        name = str(inside[0])
        return f"the rows seem to be in {name!r}: save that list alone; if it has turns, --column messages={name}"
    lowered = {name.lower().replace("-", "_").replace(" ", "_"): name for name in names}
    for each in _formats(format):
        found = {role: lowered.get(_column(lowered, role, {}), "") for role in REQUIRED[each]}
        if all(found.values()):
            return f"say which is which: --format {each} {_options(found)}"
    first, second = (*names, "COLUMN", "COLUMN")[:2]
    options = _options({"question": first, "answer": second})
    return f"say which column is which with --format and --column, e.g. --format qa {options}"


def _options(columns: Mapping[str, str]) -> str:
    return " ".join(f"--column {shlex.quote(f'{role}={name}')}" for role, name in columns.items())


def _column(row: Mapping[str, Any], role: str, given: Mapping[str, str]) -> str:
    names = [given[role]] if role in given else [role, *OTHER_NAMES.get(role, ())]
    taken = set(given.values()) if role not in given else set()
    return next((name for name in names if name in row and name not in taken), names[0])


assert set(REQUIRED) == set(get_args(Format)) - {"auto"}
