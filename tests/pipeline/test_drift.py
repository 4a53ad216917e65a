"""What changed between two runs is seen by its content: with the same size and time, too; and `plan` says what."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sstoken.pipeline import api
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
        "out: out\nencode: {data: data.jsonl, model: base, chat_template: template.jinja, workers: 1}\n"
        "anchor: {max_steps: 2, snapshots: 1}\nselect: {rho: 0.4}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        api.run("run.yaml")
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_plan_sees_and_says_what_changed(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, step, words = CHANGES[name]
    shutil.copytree(run, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert {planned.state for planned in api.plan("run.yaml")} == {"finished"}
    file = Path(name)
    before, content = file.stat(), file.read_bytes()
    changed = change(content)
    assert changed != content
    file.write_bytes(changed)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    planned = {each.step: each for each in api.plan("run.yaml")}
    assert words in "; ".join(planned[step].changed)
    order = ["encode", "anchor", "select"]
    for earlier in order[: order.index(step)]:
        assert planned[earlier].state == "finished"
    for later in order[order.index(step) :]:
        assert planned[later].state != "finished"
