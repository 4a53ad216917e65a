"""`export --into`: change a user's trainer configuration to train on the export, keeping its comments."""

import difflib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yaml import safe_load

from sstoken.errors import UsageError
from sstoken.stages import manifest as manifests
from sstoken.stages.exporting import TARGETS
from sstoken.stages.exporting.base import ABSENT, AtLeast, Changes, Facts, IfGiven, Target
from sstoken.stages.storage import write_atomic

_NOTHING = Facts(longest=0, fingerprint="", weights=False, shards=[])


def check_into(path: Path, target: Target) -> None:
    """Refuse, before any work, a configuration that cannot be changed.

    Raises:
        UsageError: the trainer is not configured by YAML, or the file is not a YAML mapping.
    """
    if target.settings(_NOTHING, path) is None:
        able = [name for name, other in TARGETS.items() if other.settings(_NOTHING, path) is not None]
        raise UsageError(
            f"--into: {target.name} is not configured by a YAML file alone; legal: {', '.join(able)} (the README.md of "
            "the export says how to train)"
        )
    rewritten(path, {})


def write_into(
    path: Path, target: Target, export: Path, metrics: Mapping[str, Any], *, force: bool = False
) -> tuple[Path, list[str]]:
    """Write the configuration, changed to train on a finished export, beside the user's own, as `NAME-masked.yml`.

    Returns:
        The file, and the lines of a unified diff (empty if nothing had to change).

    Raises:
        UsageError: as `rewritten`; or a file of that name exists and differs, and `force` is False.
    """
    fingerprint = manifests.finished(export, "export").fingerprint
    changes = target.settings(
        Facts(metrics["longest"], fingerprint, weights=False, shards=[]), export.resolve()
    )
    assert changes is not None, "checked before any work"
    before, after = rewritten(path, changes)
    written = path.with_name(f"{path.stem}-masked{path.suffix}")
    if written.exists() and not force and written.read_text(encoding="utf-8", errors="replace") != after:
        raise UsageError(f"{written}: exists and differs; move it, or overwrite it with --force")
    write_atomic(written, after)
    lines = before.splitlines(), after.splitlines()
    return written, list(difflib.unified_diff(*lines, str(path), str(written), lineterm="", n=1))


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
    for name, wanted in changes.items():
        if wanted is ABSENT:
            values.pop(name, None)
        elif not _holds(values, name, wanted):
            values[name] = _plainly(wanted)
    text = io.StringIO()
    yaml.dump(values, text)
    return before, text.getvalue()


def _holds(values: Mapping[str, Any], name: str, wanted: Any) -> bool:
    """Return whether a setting needs no change."""
    given = values.get(name)
    if isinstance(wanted, IfGiven):
        return name not in values or bool(given == wanted.value)
    if isinstance(wanted, AtLeast):
        if given is None:
            return wanted.or_none and name in values
        return isinstance(given, int) and not isinstance(given, bool) and given >= wanted.value
    return type(given) is type(wanted) and bool(given == wanted)


def _plainly(wanted: Any) -> Any:
    """Return the value to write.

    A text such as `no` is quoted, since trainers read YAML 1.1, where it is false, and ruamel.yaml writes 1.2.
    """
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    value = wanted.value if isinstance(wanted, AtLeast | IfGiven) else wanted
    return DoubleQuotedScalarString(value) if isinstance(value, str) and safe_load(value) != value else value


def _indents(text: str) -> tuple[int, int]:
    """Return how the file indents lists: spaces before their content, and before the dash."""
    lines = text.splitlines()
    for above, line in zip(lines, lines[1:], strict=False):
        body = line.lstrip(" ")
        if body.startswith("- ") and above.rstrip().endswith(":"):
            offset = len(line) - len(body) - (len(above) - len(above.lstrip(" ")))
            return max(offset, 0) + 2, max(offset, 0)
    return 2, 0
