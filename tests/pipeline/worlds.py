"""A small world with everything that a verb reads, made once, and the command line called in this process."""

import atexit
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from sstoken.pipeline import api, cli
from sstoken.stages import manifest as manifests
from tests import factories
from tests.support import messages

SHARD_ROWS = 10
GOOD_ROW = '{"question": "w1 w2", "answer": "w3 w4"}\n'
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class World:
    """Read-only: copy what a test alters."""

    base: Path
    later: Path
    """`base`, other weights."""
    data: Path
    """24 rows."""
    tokens: Path
    """Three shards."""
    scores: Path
    """Scores of `base`, and of `later` with attention."""


@dataclass(frozen=True)
class Outcome:
    """What a command gave."""

    code: int
    out: str
    err: str


@cache
def make_world() -> World:
    """The same one for every test of this process."""
    folder = Path(mkdtemp(prefix="sstoken-world-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    base = factories.save_model(folder / "base")
    later = copy_model(
        base, folder / "later", lambda w: [v.add_(0.1 * torch.randn_like(v)) for v in w.values()]
    )
    data = folder / "data.jsonl"
    data.write_text(
        "".join(
            json.dumps({"question": f"w{i} w{i + 1} w3", "answer": f"w{i} w{2 * i} w9"}) + "\n"
            for i in range(1, 25)
        )
    )
    tokens, scores = folder / "tokens", folder / "scores"
    api.encode(data=str(data), model=str(base), out=tokens, shard_rows=SHARD_ROWS, workers=1)
    api.score(tokens=tokens, checkpoints=[str(base), str(later)], out=scores)
    return World(base, later, data, tokens, scores)


def copy_model(source: Path, folder: Path, change: Callable[[Weights], Any] = lambda w: None) -> Path:
    """A checkpoint whose weights are changed in place."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def damage(path: Path) -> None:
    """Overwrite some bytes in the middle: the size and the Parquet footer stand."""
    content = bytearray(path.read_bytes())
    content[60:160] = b"\xff" * 100
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Keep the first half."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


class CommandLine:
    """Calls the command line in this process, as fast as a function."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture
        logging.set_verbosity_error()  # what the environment says in a process of its own
        logging.disable_progress_bar()

    def __call__(self, *arguments: object) -> Outcome:
        """Run a verb to its end, whatever that is."""
        self._capture.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = self._capture.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, out, err)

    def fails(self, code: int, *arguments: object) -> str:
        """Run a verb that has to fail with one line; that line."""
        outcome = self(*arguments)
        assert outcome.code == code, outcome
        lines = messages(outcome.err)
        assert len(lines) == 1, outcome.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in outcome.out + outcome.err
        return lines[0]

    def works(self, *arguments: object) -> str:
        """Run a verb that has to succeed; what it printed."""
        outcome = self(*arguments)
        assert outcome.code == 0, outcome.err
        return outcome.out


def no_trace(out: Path) -> None:
    """Nothing at `out` or beside it that a later run would trust or go on from."""
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file's inode, time and size: equal where nothing was written anew."""
    stats = {p.relative_to(folder).as_posix(): p.stat() for p in folder.rglob("*") if p.is_file()}
    return {name: (s.st_ino, s.st_mtime_ns, s.st_size) for name, s in stats.items()}


def list_anew(folder: Path) -> None:
    """Have a finished folder's manifest list what is there now, as only its stage should."""
    manifest = manifests.read_manifest(folder)
    assert manifest is not None
    files = manifests.list_files(folder)
    manifests.write_manifest(folder, manifest.model_copy(update={"files": files}))
