"""Real trainers read our exports: what reaches the model is ours, token by token, and they train.

`make test-trainers` makes their environments and runs this; a trainer whose environment is not there is skipped.
"""

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sstoken.pipeline import api
from tests.factories import save_model
from tests.pipeline.small_run import save_conversations
from tests.support import PATIENCE
from tests.trainers.install import installed, interpreter

pytestmark = pytest.mark.trainers
HERE = Path(__file__).parent
EXAMPLES = 30
TRAINERS = {
    "trl": "trl",
    "trl-1.6": "trl",
    "transformers": "transformers",
    "axolotl": "axolotl",
    "llamafactory": "llamafactory",
    "torchtune": "torchtune",
    "swift": "swift",
    "nemo": "nemo",
    "verl": "verl",
    "litgpt": "litgpt",
}
"""And what it is called as a target of `export`."""
PACKERS = {"trl", "trl-1.6", "transformers", "axolotl", "torchtune", "nemo"}
"""Whose packing is run. LLaMA-Factory, verl and LitGPT do not pack such rows; ms-swift needs FlashAttention."""
PACKED_ATTENTION = {"trl", "trl-1.6", "torchtune"}
"""Whose packs attend within each example on a CPU: the loss of a pack can be checked too."""
OURS_STEPS = {"nemo", "verl"}
"""Whose loading, collator and loss are run, in steps of ours: the trainer itself needs a GPU."""
LEAVES_OUT = {"axolotl"}
"""Whose sampler gives each epoch as many packs as the first, and leaves out what is over."""
Example = tuple[tuple[int, ...], tuple[int, ...]]
Report = dict[str, Any]
chosen = [name for name in TRAINERS if name in os.environ.get("TRAINERS", " ".join(TRAINERS)).split()]
every_trainer = pytest.mark.parametrize("trainer", chosen)


@cache
def make_masked() -> Path:
    """A masked dataset, and beside it the model that it is for."""
    folder = Path(mkdtemp(prefix="sstoken-trainers-"))
    model = AutoModelForCausalLM.from_pretrained(save_model(folder / "base", vocabulary=160, positions=256))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder / "later")
    data = save_conversations(folder / "data.jsonl", EXAMPLES)
    base = str(folder / "base")
    api.encode(data=str(data), model=base, out=folder / "tokens", shard_rows=11, workers=1)
    api.score(tokens=folder / "tokens", checkpoints=[base, str(folder / "later")], out=folder / "scores")
    return api.select(tokens=folder / "tokens", scores=folder / "scores", out=folder / "masked").folder


@cache
def run_worker(trainer: str) -> Report:
    """Train on a fresh export; what the trainer saw."""
    masked = make_masked()
    if not installed(trainer):
        pytest.skip(f"no environment of {trainer}; make test-trainers TRAINERS={trainer}")
    out = masked.parent / "trainers" / trainer
    export = api.export(masked=masked, to=TRAINERS[trainer], out=out / "export", check=True).folder
    return worker(trainer, export, out)


def worker(trainer: str, export: Path, out: Path) -> Report:
    script = HERE / "workers" / f"run_{trainer.partition('-')[0]}.py"
    with open(out / "log", "w") as log:
        done = subprocess.run(
            [interpreter(trainer), script, export, make_masked().parent / "base", out],
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1"},
        )
    assert done.returncode == 0, (out / "log").read_text()[-3000:]
    return json.loads((out / "report.json").read_text())


def ours() -> Counter[Example]:
    """By the keep mask alone."""
    table = pl.read_parquet(make_masked() / "part-*.parquet", columns=["input_ids", "keep_mask"])
    assert len(table) == EXAMPLES
    return Counter(
        (tuple(ids), (-100, *(i if kept else -100 for i, kept in zip(ids[1:], keep[1:], strict=True))))
        for ids, keep in table.iter_rows()
    )


def received(report: Report) -> Counter[Example]:
    """Every example that reached the model. What has no label pads a pack: each of our rows has one."""
    return Counter(
        (tuple(ids), tuple(labels))
        for step in report["steps"]
        for ids, labels in step
        if any(label != -100 for label in labels)
    )


def times(examples: Counter[Example], epochs: int) -> Counter[Example]:
    return Counter({example: count * epochs for example, count in examples.items()})


def packings(report: Report) -> Iterator[Report]:
    yield from (part for name, part in report.items() if name.startswith("packed"))


@every_trainer
def test_loads(trainer: str, table: dict[str, dict[str, str]]) -> None:
    report = run_worker(trainer)
    table[trainer]["version"] = report["version"]
    loaded = Counter((tuple(ids), tuple(labels)) for ids, labels in report["loaded"])
    assert loaded == ours()
    table[trainer]["loads"] = f"{loaded.total()} rows"


@every_trainer
def test_labels_are_exact(trainer: str, table: dict[str, dict[str, str]]) -> None:
    plain = run_worker(trainer)["plain"]
    assert received(plain) == ours()
    tokens = sum(len(ids) for ids, _ in received(plain).elements())
    table[trainer]["labels"] = f"{tokens} tokens"


@every_trainer
def test_packing_is_exact(trainer: str, table: dict[str, dict[str, str]]) -> None:
    report = run_worker(trainer)
    assert (trainer in PACKERS) == any(packings(report))
    table[trainer]["packing"] = "none" if trainer not in PACKERS else ""
    for packed in packings(report):
        expected = times(ours(), packed.get("epochs", 1))
        assert not received(packed) - expected
        missing = (expected - received(packed)).total()
        assert missing <= (expected.total() * 0.1 if trainer in LEAVES_OUT else 0)
        largest = max(len(step) for step in packed["steps"])
        assert largest > 2
        table[trainer]["packing"] = f"up to {largest} examples"


@every_trainer
def test_trains(trainer: str, table: dict[str, dict[str, str]]) -> None:
    """At least three steps; the first loss is the mean over exactly the kept tokens, by another implementation."""
    report = run_worker(trainer)
    model = AutoModelForCausalLM.from_pretrained(make_masked().parent / "base").requires_grad_(False)
    runs = [report["plain"], *(p for p in packings(report) if p.get("trains", True))]
    for run in runs:
        assert len(run["losses"]) >= 3
        assert None not in run["losses"]
        assert run["moved"]
    checked = runs if trainer in PACKED_ATTENTION else runs[:1]
    for run in checked:
        assert run["losses"][0] == pytest.approx(kept_loss(model, run["steps"][0]), rel=1e-3)
    steps = len(report["plain"]["losses"])
    table[trainer]["trains"] = f"{steps} steps" + (" of ours" if trainer in OURS_STEPS else "")


def kept_loss(model: PreTrainedModel, step: list[list[list[int]]]) -> float:
    """The mean negative log-probability, in nats, of the labelled tokens of the examples, each by itself."""
    losses = []
    for ids, labels in step:
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-log_probs[i - 1, label] for i, label in enumerate(labels) if label != -100]
    return float(torch.stack(losses).mean())


@pytest.mark.skipif("trl-1.6" not in chosen, reason="not chosen")
def test_without_the_mask_column_trl_1_6_would_train_on_everything(tmp_path: Path) -> None:
    """Why the export has `assistant_masks`: this is what the check above would find."""
    run_worker("trl-1.6")
    export = api.export(masked=make_masked(), to="transformers", out=tmp_path / "export").folder
    script = api.export(masked=make_masked(), to="trl", out=tmp_path / "trl").folder / "train.py"
    (export / "train.py").write_text(script.read_text())
    report = worker("trl-1.6", export, tmp_path)
    assert received(report["plain"]) == ours()
    everything = Counter({(ids, (-100, *ids[1:])): count for (ids, _), count in ours().items()})
    assert received(report["packed"]) == times(everything, report["packed"]["epochs"])
