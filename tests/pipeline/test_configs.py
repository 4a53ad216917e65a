"""The configurations that come with the project need nothing but what a user has."""

from pathlib import Path

import pytest
import yaml

from sstoken.pipeline import api
from sstoken.pipeline.config import RunConfig, load_config
from sstoken.stages.encoding.sources import locate
from tests.pipeline.worlds import World
from tests.support import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAPER = sorted((ROOT / "configs" / "paper").glob("*.yaml"))
SECTIONS = [path for path in CONFIGS if "steps" not in yaml.safe_load(path.read_text())]
"""The others are run by tests/pipeline/test_steps.py."""
MADE_BY_THE_DEMO = ("runs/demo/data.jsonl", "runs/demo/base")


def places(config: RunConfig) -> list[str]:
    """What the run reads from outside."""
    named = config.named
    read = [getattr(section, field, None) for section in named.values() for field in ("data", "model")]
    return [place for place in read if place and place.partition("/")[0] not in named]


@pytest.mark.parametrize("path", [*CONFIGS, *PAPER], ids=lambda path: path.stem)
def test_what_it_reads_is_there_for_everybody(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in places(load_config(path)):
        if place not in MADE_BY_THE_DEMO:
            locate(place, "train")  # on the Hub: a path would have to be there
            assert not place.startswith((".", "/")), place


@pytest.mark.parametrize("path", [*SECTIONS, PAPER[0]], ids=lambda path: path.stem)
def test_it_runs(path: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert set(yaml.safe_load(path.read_text())) >= {"out", "encode", "anchor", "select"}
    here = [
        f"encode.data={world.data}",
        f"encode.model={world.base}",
        "anchor.max_steps=4",
        "anchor.snapshots=2",
    ]
    here += ["encode.max_length=64", "encode.workers=1"]
    results = api.run(path, overrides=here)
    assert list(results) == ["encode", "anchor", "score/step-0", "score/step-4", "select"]
    assert results["select"].metrics["examples"] == 24
    assert all(result.skipped for result in api.run(path, overrides=here).values())


def test_the_papers_settings_are_the_same_for_each_model() -> None:
    assert len(PAPER) == 4
    for path in PAPER:
        config = load_config(path)
        assert config.anchor is not None
        assert config.encode is not None
        anchor = config.anchor
        assert (anchor.lora_rank, anchor.lora_alpha, anchor.lora_dropout) == (64, 16, 0.1)
        assert (anchor.learning_rate, anchor.schedule, anchor.epochs) == (1e-4, "linear", 1)
        assert anchor.batch_size * anchor.gradient_accumulation * 8 == 48
        assert config.encode.max_length == 2048
        assert (config.select.method, config.select.rho, config.select.gamma) == ("sstoken", 0.6, 0.5)
