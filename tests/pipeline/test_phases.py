"""Trajectories: a masked dataset for each phase between two snapshots, and training on them in order."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from sstoken import UsageError, curate
from sstoken.stages.training.phases import load_phases
from tests.factories import save_model
from tests.pipeline.small_run import environment, save_conversations
from tests.support import PATIENCE

EXAMPLES, SNAPSHOTS = 12, ("step-0", "step-9", "step-10")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokens/, and the scores of three snapshots, each with its own attention."""
    folder = tmp_path_factory.mktemp("phases")
    model = AutoModelForCausalLM.from_pretrained(save_model(folder / "step-0", positions=256))
    for number, name in enumerate(SNAPSHOTS[1:]):
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / name)
    data = save_conversations(folder / "data.jsonl", EXAMPLES)
    curate.encode(
        data=str(data), model=str(folder / "step-0"), out=folder / "tokens", shard_rows=5, workers=1
    )
    given = {"checkpoints": [str(folder / name) for name in SNAPSHOTS], "signals": ["loss", "attention"]}
    curate.score(tokens=folder / "tokens", out=folder / "scores", **given)
    return folder


def masks(folder: Path) -> list[list[bool]]:
    return pl.read_parquet(folder / "part-*.parquet")["keep_mask"].to_list()


def test_each_phase_is_what_select_gives_for_its_two_snapshots(world, tmp_path):
    """Snapshots are found in the order of their steps, not of their names."""
    result = curate.phases(tokens=world / "tokens", scores=world / "scores", out=tmp_path / "phases", rho=0.4)
    assert list(result.metrics) == ["phase-1", "phase-2"]
    for number, (history, current) in enumerate([("step-0", "step-9"), ("step-9", "step-10")], 1):
        one = curate.select(
            tokens=world / "tokens",
            scores=world / "scores",
            out=tmp_path / f"one-{number}",
            rho=0.4,
            history=history,
            current=current,
        )
        assert masks(one.folder) == masks(tmp_path / "phases" / f"phase-{number}")
    assert masks(tmp_path / "phases" / "phase-1") != masks(tmp_path / "phases" / "phase-2")
    again = curate.phases(tokens=world / "tokens", scores=world / "scores", out=tmp_path / "phases", rho=0.4)
    assert again.skipped


def test_phases_are_one_dataset_in_order(world, tmp_path):
    out = tmp_path / "phases"
    curate.phases(tokens=world / "tokens", scores=world / "scores", out=out)
    dataset = load_phases(out)
    assert dataset["phase"][:] == [1] * EXAMPLES + [2] * EXAMPLES
    assert dataset["keep_mask"][:] == masks(out / "phase-1") + masks(out / "phase-2")
    few = load_phases(out, seed=1, examples=5)
    assert few["phase"][:] == [1] * 5 + [2] * 5
    known = {(row["example_id"], row["phase"]): row["labels"] for row in dataset}
    assert all(known[row["example_id"], row["phase"]] == row["labels"] for row in few)
    assert few["example_id"][:5] != dataset["example_id"][:5]
    shutil.rmtree(out / "phase-1")
    with pytest.raises(UsageError, match=r"phases are missing \(finished: phase-2\)"):
        load_phases(out)


@pytest.mark.parametrize(
    ("checkpoints", "match"),
    [
        (["step-9"], "a phase lies between two snapshots, and there is one"),
        (["step-0", "step-9", "step-0"], "names a snapshot twice"),
        (["step-0", "step-8"], "no finished scores of 'step-8'; there are: step-0, step-10, step-9"),
    ],
)
def test_snapshots_that_make_no_phase(world, tmp_path, checkpoints, match):
    with pytest.raises(UsageError, match=match):
        curate.phases(
            tokens=world / "tokens", scores=world / "scores", out=tmp_path / "p", checkpoints=checkpoints
        )
    assert not (tmp_path / "p").exists()


@pytest.mark.slow
def test_the_example_trains_phase_after_phase(world, tmp_path):
    """As a user runs it: with no more than what a clone and the demo's folders hold."""
    demo = tmp_path / "runs" / "demo"
    demo.mkdir(parents=True)
    shutil.copytree(world / "step-0", demo / "base")
    shutil.copyfile(world / "data.jsonl", demo / "data.jsonl")
    program = Path(__file__).parents[2] / "configs" / "phases.py"
    done = subprocess.run(
        [sys.executable, program, "--phases", "2", "--steps-per-phase", "1"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trained = tmp_path / "runs" / "trajectory" / "trained"
    start, end = (AutoModelForCausalLM.from_pretrained(path) for path in (demo / "base", trained))
    moved = [not torch.equal(p, q) for p, q in zip(start.parameters(), end.parameters(), strict=True)]
    assert np.mean(moved) > 0.5


def test_layers_are_compared_on_the_command_line(world, tmp_path):
    given = {
        "checkpoints": [str(world / name) for name in SNAPSHOTS],
        "signals": ["attention@0", "attention@1"],
    }
    curate.score(tokens=world / "tokens", out=tmp_path / "scores", attention_from="none", **given)
    command = [sys.executable, "-m", "sstoken.pipeline", "layers", str(tmp_path / "scores")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    found = curate.layers(tmp_path / "scores")
    assert {layer.layer for layer in found} == {0, 1}
    assert f"steadiest: layer {found[0].layer}; use it with: score --layer {found[0].layer}" in done.stdout
    assert found[0].stability > found[1].stability
