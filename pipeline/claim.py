"""`run.json` marks a folder as the run of some data and model, so that runs of others are never mixed into it."""

import json
import os
from pathlib import Path, PurePath
from typing import Any

from sstoken.errors import SstokenError, UsageError
from sstoken.pipeline.config import RunConfig
from sstoken.pipeline.disk import check_writable
from sstoken.stages import plain_json, storage
from sstoken.stages.anchor import Anchor
from sstoken.stages.encode import Encode
from sstoken.stages.encoding.sources import shown
from sstoken.stages.manifest import Digests
from sstoken.stages.storage import UNFINISHED, expanded, write_atomic

_RUN_FILE = "run.json"


def claim(config: RunConfig, digests: Digests, *, anew: bool) -> None:
    """Mark a folder as this configuration's run; refuse one that `check_claim` refuses.

    With `anew`, the folder of another run is taken over.

    Raises:
        UsageError: the folder holds another run, or was not written by a run.
        SstokenError: `run.json` is damaged, or the folder cannot be written to.
    """
    folder = config.folder
    path = folder / _RUN_FILE
    if (identity := check_claim(config, digests, anew=anew)) is not None:
        check_writable(path)
        storage.of(folder).make_folder(folder)
        for leftover in filter(_is_unfinished, folder.iterdir()):
            storage.of(leftover).delete(leftover)
        write_atomic(path, json.dumps(identity, indent=1))
    digests.save()


def check_claim(config: RunConfig, digests: Digests, *, anew: bool = False) -> dict[str, Any] | None:
    """Refuse a folder that holds the run of other data or another model; return what `run.json` lacks to mark it.

    Data and model count as the same if either their content or their path is the same: a run goes on after they, the
    run or the working directory were moved, and after a file was edited in place.

    Raises:
        UsageError, SstokenError: as `claim`.
    """
    folder = config.folder
    path = folder / _RUN_FILE
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; `out` has to be a folder")
    held = _read(path) if path.is_file() else None
    if held is None and folder.is_dir() and not all(_is_unfinished(path) for path in folder.iterdir()):
        raise UsageError(f"{folder}: exists and was not written by a run; set another `out`")
    with digests.held():
        identity = _identity(config, digests)
    same = held is None or all(_same(held.get(key), identity[key], folder) for key in identity)
    if held is not None and not same and not anew:
        raise UsageError(
            f"{folder}: holds the run of data {_shown(folder, held.get('data'))!r} and model "
            f"{_shown(folder, held.get('model'))!r}; set another `out`, or --force encode to run it all again here"
        )
    return None if held == identity else identity


def _is_unfinished(path: Path) -> bool:
    """Whether a file is a `run.json` whose writing was interrupted."""
    return path.name.startswith(_RUN_FILE) and path.name.endswith(UNFINISHED)


def _identity(config: RunConfig, digests: Digests) -> dict[str, dict[str, str]]:
    encodes = [section for section in config.named.values() if isinstance(section, Encode)]
    trained = [
        section.sources(digests)
        for section in config.named.values()
        if isinstance(section, Anchor) and section.model.partition("/")[0] not in config.named
    ]
    if not encodes:
        raise UsageError("no step encodes data; a run begins with one of `stage: encode`")
    sources = encodes[0].sources(digests)
    found = {
        "data": (encodes[0].data, sources["data"]),
        "model": (encodes[0].model, [sources["tokenizer"], trained[0] if trained else None]),
    }
    return {
        key: {"place": _place(name, config.folder), "content": plain_json.digest(content)[:16]}
        for key, (name, content) in found.items()
    }


def _place(name: str, folder: PurePath) -> str:
    """A path relative to the run's folder, or absolute if that is remote; a Hub id unchanged; a URL without secrets."""
    if "://" in name:
        return shown(name)
    path = expanded(name)
    if path.exists() or any(sign in name for sign in "*?["):
        if not isinstance(folder, Path):
            return path.absolute().as_posix()
        return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()
    return name


def _same(held: Any, found: dict[str, str], folder: Path) -> bool:
    if isinstance(held, str):  # older versions wrote the path as it was typed
        held = {"place": _place(held, folder)}
    return isinstance(held, dict) and any(held.get(key) == value for key, value in found.items())


def _shown(folder: PurePath, held: Any) -> str:
    if not isinstance(held, dict):
        return str(held)
    place = str(held.get("place"))
    if "://" in place or not isinstance(folder, Path) or not (folder / place).exists():
        return place
    return os.path.normpath(folder / place)


def _read(path: Path) -> dict[str, Any]:
    try:
        return plain_json.parse_object(path.read_bytes())
    except ValueError:
        raise SstokenError(f"{path}: damaged; remove this file to go on with the run") from None
