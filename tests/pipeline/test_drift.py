"""What changed between two runs, or during one, is seen by its content: with the same size and time, too.

`plan` says what changed; a run whose inputs change under it keeps nothing that is of two contents.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sstoken import curate
from sstoken.errors import SstokenError
from sstoken.stages import tables
from tests.pipeline.worlds import make_world

CHANGES: dict[str, tuple[Callable[[bytes], bytes], str, str]] = {
    "data.jsonl": (lambda b: b.replace(b"w1 ", b"w2 ", 1), "encode", "encode.data, whose content changed"),
    "base/tokenizer.json": (
        lambda b: b.replace(b'"w90"', b'"x90"'),
        "encode",
        "encode.tokenizer, whose content",
    ),
    "base/config.json": (
        lambda b: b.replace(b"1e-06", b"1e-05"),
        "anchor",
        "anchor.model, whose content changed",
    ),
    "base/model.safetensors": (
        lambda b: b[:-2] + bytes([b[-2] ^ 8]) + b[-1:],
        "anchor",
        "anchor.model, whose content",
    ),
    "template.jinja": (
        lambda b: b.replace(b"User", b"Asks"),
        "encode",
        "encode.chat_template, whose content changed",
    ),
    "run.yaml": (lambda b: b.replace(b"rho: 0.4", b"rho: 0.5"), "select", "select.rho 0.4 -> 0.5"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world, folder = make_world(), tmp_path_factory.mktemp("drift")
    shutil.copytree(world.base, folder / "base")
    shutil.copy(world.data, folder / "data.jsonl")
    (folder / "template.jinja").write_text(
        "{% for m in messages %}{{ 'User ' if m.role == 'user' else '' }}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    (folder / "run.yaml").write_text(
        "out: out\nencode: {data: data.jsonl, model: base, chat_template: template.jinja, shard_rows: 10, workers: 1}\n"
        "anchor: {max_steps: 2, snapshots: 1}\nselect: {rho: 0.4}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        curate.run("run.yaml")
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_plan_sees_and_says_what_changed(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, step, words = CHANGES[name]
    shutil.copytree(run, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert {planned.state for planned in curate.plan("run.yaml")} == {"finished"}
    _change(Path(name), change)
    planned = {each.step: each for each in curate.plan("run.yaml")}
    assert words in "; ".join(planned[step].changed)
    order = ["encode", "anchor", "select"]
    for earlier in order[: order.index(step)]:
        assert planned[earlier].state == "finished"
    for later in order[order.index(step) :]:
        assert planned[later].state != "finished"


def _change(file: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file's content, and leave its size and time."""
    before, content = file.stat(), file.read_bytes()
    changed = change(content)
    assert changed != content
    file.write_bytes(changed)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@dataclass(frozen=True)
class During:
    """A verb, and what is changed as soon as it has written a shard."""

    call: Callable[[], object]
    changed: str
    """A file or folder, as the error names it."""
    change: Callable[[], object]


def _change_of(name: str) -> Callable[[], None]:
    return partial(_change, Path(name), CHANGES[name][0])


_SELECT = partial(
    curate.select, tokens="out/tokens", scores="out/scores", history="step-0", current="step-2", workers=1
)
DURING = {
    "encode": During(
        partial(curate.encode, data="data.jsonl", model="base", out="new", shard_rows=10, workers=1),
        "data.jsonl",
        _change_of("data.jsonl"),
    ),
    "score": During(
        partial(curate.score, tokens="out/tokens", checkpoints=["base"], out="new"),
        "base/model.safetensors",
        _change_of("base/model.safetensors"),
    ),
    "export": During(
        partial(curate.export, masked="out/masked", to="jsonl", out="new", workers=1),
        "out/masked",
        partial(_SELECT, out="out/masked", rho=0.9, force=True),
    ),
}


@pytest.mark.parametrize("verb", DURING)
def test_nothing_of_two_contents_is_kept(
    verb: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    during = DURING[verb]
    shutil.copytree(run, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    write, written = tables.write_row_groups, []

    def write_and_change(path: Path, *arguments: Any, **options: Any) -> None:
        write(path, *arguments, **options)
        written.append(path)
        if len(written) == 1:
            during.change()

    with monkeypatch.context() as patch:
        patch.setattr(tables, "write_row_groups", write_and_change)
        with pytest.raises(SstokenError, match=rf"^[^ ]*{during.changed}: \w+ while it was read"):
            during.call()
    assert len(written) > 1
    assert not [*Path().rglob("new*/**/part-*"), *Path().rglob("new*/**/manifest.json")]
