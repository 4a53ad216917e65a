"""`export --into`: change a user's trainer configuration to train on the export, keeping its comments."""

import difflib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaml import safe_load

from sstoken.errors import UsageError
from sstoken.stages.storage import write_atomic

Changes = Mapping[str, Any]
"""What each setting has to be: a value, `ABSENT`, or one of the classes below."""
ABSENT = object()
"""The setting must not be there."""


class AtLeast(int):
    """A lower limit: a larger value of the user's stays."""

    or_none = False
    """Whether null stays, too, meaning no limit."""


class AtLeastOrNone(AtLeast):
    """A lower limit where null means no limit, and stays."""

    or_none = True


@dataclass(frozen=True)
class IfGiven:
    """A value for a setting that is changed if the user's configuration has it, but not added."""

    value: Any


NO_EVALUATION: Changes = {
    "eval_strategy": IfGiven("no"),
    "do_eval": IfGiven(False),
    "eval_on_start": IfGiven(False),
    "load_best_model_at_end": IfGiven(False),
}
"""For transformers' Trainer, which refuses to begin where it is to evaluate and has nothing to evaluate on."""


def rewritten(path: Path, changes: Changes) -> tuple[str, str]:
    """Return a YAML file's text before and after `changes`; everything else stays as it is.

    Raises:
        UsageError: the file cannot be read, is not YAML, or is not a mapping.
    """
    from ruamel.yaml import YAML, YAMLError
    from ruamel.yaml.comments import CommentedMap

    try:
        before = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not a text in UTF-8"
        raise UsageError(f"{path}: cannot be read ({why}); name your trainer's configuration") from error
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096  # long lines stay as they are
    sequence, offset = _indents(before)
    yaml.indent(mapping=2, sequence=sequence, offset=offset)
    try:
        values = yaml.load(before)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}: {getattr(error, 'problem', '')})" if mark else ""
        raise UsageError(f"{path}: not valid YAML{place}") from error
    if not isinstance(values, CommentedMap):
        raise UsageError(f"{path}: not a mapping of settings; name your trainer's configuration")
    for name, value in changes.items():
        if isinstance(value, IfGiven):
            if name in values and values[name] != value.value:
                values[name] = _plainly(value.value)
        elif value is ABSENT:
            values.pop(name, None)
        elif isinstance(value, AtLeast) and value.or_none and name in values and values[name] is None:
            continue
        elif not _holds(values.get(name), value):
            values[name] = int(value) if isinstance(value, AtLeast) else _plainly(value)
    text = io.StringIO()
    yaml.dump(values, text)
    return before, text.getvalue()


def write_into(path: Path, changes: Changes, *, force: bool = False) -> tuple[Path, list[str]]:
    """Write the changed configuration beside the user's own, as `NAME-masked.yml`.

    Returns:
        The file, and the lines of a unified diff (empty if nothing had to change).

    Raises:
        UsageError: as `rewritten`; or a file of that name exists and differs, and `force` is False.
    """
    before, after = rewritten(path, changes)
    target = path.with_name(f"{path.stem}-masked{path.suffix}")
    if target.exists() and not force and target.read_text(encoding="utf-8", errors="replace") != after:
        raise UsageError(f"{target}: exists and differs; move it, or overwrite it with --force")
    write_atomic(target, after)
    return target, list(
        difflib.unified_diff(
            before.splitlines(), after.splitlines(), str(path), str(target), lineterm="", n=1
        )
    )


def _plainly(value: Any) -> Any:
    """Quote a text such as `no`, which trainers would read as false: they read YAML 1.1, and ruamel.yaml writes 1.2."""
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    return DoubleQuotedScalarString(value) if isinstance(value, str) and safe_load(value) != value else value


def _holds(given: Any, wanted: Any) -> bool:
    if isinstance(wanted, AtLeast):
        return isinstance(given, int) and not isinstance(given, bool) and given >= wanted
    return type(given) is type(wanted) and bool(given == wanted)


def _indents(text: str) -> tuple[int, int]:
    """Return how the file indents lists: spaces before their content, and before the dash."""
    lines: Sequence[str] = text.splitlines()
    for above, line in zip(lines, lines[1:], strict=False):
        body = line.lstrip(" ")
        if body.startswith("- ") and above.rstrip().endswith(":"):
            offset = len(line) - len(body) - (len(above) - len(above.lstrip(" ")))
            return max(offset, 0) + 2, max(offset, 0)
    return 2, 0
