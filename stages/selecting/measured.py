"""Check that all signals of a selection were measured, and give the command that measures the missing ones."""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from sstoken.errors import SstokenError, UsageError
from sstoken.methods import Input
from sstoken.signals import ATTENTION, get_signal, get_signals, is_signal
from sstoken.stages import tables
from sstoken.stages.manifest import read_manifest
from sstoken.stages.model_options import ModelOptions
from sstoken.stages.selecting.shard import column_of, supplier_of

_OPTIONS = ("dtype", "layer", "backend")
"""Settings that change what is measured."""


def check_measured(method: str, inputs: Iterable[str], scores: Mapping[str, Path], tokens: Path) -> None:
    """Refuse a selection if a signal that its method reads (`inputs`, as `role.signal`) was not measured.

    Raises:
        UsageError: there are no scores for a role.
        SstokenError: names the missing signals, and one command that measures them and those that exist again.
    """
    missing: dict[Path, list[str]] = {}
    named: list[Input] = []
    for name in map(Input, inputs):
        role = supplier_of(name, scores)
        if role is None:
            raise UsageError(
                f"method {method!r} needs {name}, and no scores were given for {name.role!r}; say --role "
                f"{name.role}=NAME"
            )
        folder, column = scores[role], column_of(name, scores)
        parts = tables.parts(folder)
        if not parts or column in tables.columns(parts[0]):
            continue
        if get_signal(column).needs == "generation":
            raise SstokenError(
                f"{folder}: method {method!r} needs {name}, which was not measured; run sstoken-curate {column} "
                f"--tokens {_word(tokens)} --ckpt {_word(_checkpoint(folder))} --out {_word(folder.parent / column)}, "
                f"then select with --role {role}={column}"
            )
        named.append(name)
        missing.setdefault(folder, []).append(column)
    if missing:
        first, number = next(iter(missing)), len(named)
        raise SstokenError(
            f"{first}: method {method!r} needs {_listed(named)}, which {'was' if number == 1 else 'were'} not "
            f"measured; there are {', '.join(_signals(first)) or 'none'}; run {_command(missing, scores, tokens)}"
        )


def _command(missing: Mapping[Path, list[str]], scores: Mapping[str, Path], tokens: Path) -> str:
    """Return the `score` command that measures the missing signals, and those that exist again.

    It also scores checkpoints that a signal compares with, since `kl@NAME` refers to a checkpoint of the command.
    """
    first = next(iter(missing))
    signals = dict.fromkeys(column for columns in missing.values() for column in columns)
    places = {folder.name: folder for folder in scores.values()}
    named: dict[str, str] = {}
    waiting = [folder.name for folder in missing]
    while waiting:  # existing signals may compare with further checkpoints
        name = waiting.pop()
        folder = places.get(name, first.parent / name)
        named[name] = _checkpoint(folder) or _references(first).get(name, name)
        signals = dict.fromkeys([*_signals(folder), *signals])
        compared = {get_signal(s).argument for s in signals if get_signal(s).needs == "second checkpoint"}
        waiting += sorted(str(other) for other in compared if other not in {*named, *waiting})
    words = ["sstoken-curate", "score", "--tokens", str(tokens)]
    for name in sorted(named, key=lambda n: first.parent / n in missing):
        words += ["--ckpt", f"{name}={named[name]}"]
    for signal in get_signals(signals):
        words += ["--signal", signal.name]
    if ATTENTION not in signals:
        words += ["--attention-from", "none"]
    manifest = read_manifest(first)
    defaults = {name: field.default for name, field in ModelOptions.model_fields.items()}
    for option in _OPTIONS:
        value = None if manifest is None else manifest.settings.get(option)
        if value not in (None, defaults.get(option)):
            words += [f"--{option}", str(value)]
    return shlex.join([*words, "--out", str(first.parent), "--force"])


def _references(folder: Path) -> dict[str, str]:
    """Return the checkpoints that a folder's signals compare with, by name."""
    manifest = read_manifest(folder)
    return {} if manifest is None else dict(manifest.settings.get("references") or {})


def _signals(folder: Path) -> list[str]:
    """Return the signals that `score` measured in a folder; [] if there is none."""
    parts = tables.parts(folder) if folder.is_dir() else []
    columns = tables.columns(parts[0]) if parts else []
    return [c for c in columns if is_signal(c) and get_signal(c).needs != "generation"]


def _checkpoint(folder: Path) -> str | None:
    parts = tables.parts(folder) if folder.is_dir() else []
    return str(tables.read_metadata(parts[0])["checkpoint"]) if parts else None


def _word(value: object) -> str:
    return shlex.quote(str(value))


def _listed(names: list[Input]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
