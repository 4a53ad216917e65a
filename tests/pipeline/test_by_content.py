"""What a stage reads is known by its content: by another path nothing is done again; other content is another input."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sstoken.pipeline import api
from sstoken.pipeline.job import Result
from tests.pipeline.worlds import World, copy_model


def encode(place: Path, world: World, out: Path, **options: Any) -> Result:
    return api.encode(
        data=str(place / "data.jsonl"),
        model=str(place / "base"),
        chat_template=str(place / "template.jinja"),
        out=out,
        workers=1,
        **options,
    )


def anchor(place: Path, world: World, out: Path, **options: Any) -> Result:
    return api.anchor(
        tokens=world.tokens, model=str(place / "base"), out=out, max_steps=1, snapshots=1, **options
    )


def score(place: Path, world: World, out: Path, **options: Any) -> Result:
    return api.score(tokens=world.tokens, checkpoints=[f"it={place / 'base'}"], out=out, **options)


STAGES: dict[str, Callable[..., Result]] = {"encode": encode, "anchor": anchor, "score": score}


@pytest.mark.parametrize("name", STAGES)
def test_the_same_content_at_another_path(
    name: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, first = STAGES[name], tmp_path / "first"
    shutil.copytree(world.base, first / "base")
    shutil.copyfile(world.data, first / "data.jsonl")
    (first / "template.jinja").write_text(
        "{% for message in messages %}{{ message.role }} : {{ message.content }} </s> {% endfor %}"
    )
    assert not stage(first, world, tmp_path / "out").skipped
    shutil.copytree(first, tmp_path / "second")
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "second", Path("second"), Path("first/../second")):
        assert stage(place, world, tmp_path / "out").skipped, place
    shutil.rmtree(tmp_path / "second/base")
    changed = copy_model(world.base, tmp_path / "second/base", lambda w: w["model.norm.weight"].mul_(2))
    config = changed / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{", '{"model_max_length": 50,', 1))
    with pytest.raises(api.UsageError, match="other settings or inputs"):
        stage(tmp_path / "second", world, tmp_path / "out")
