"""`layers` and `phases`: verbs over several snapshots of a training run."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import click
from pydantic import Field

from sstoken.errors import UsageError
from sstoken.pipeline.checkpoint_names import select_inputs
from sstoken.pipeline.cli_options import Option, json_option
from sstoken.pipeline.printing import print_result, print_table
from sstoken.pipeline.runner import Job, Result, execute
from sstoken.pipeline.saying import say
from sstoken.pipeline.sections import stage_of
from sstoken.pipeline.verbs.command import Output, Place, Seed, command, place, print_finished, verb
from sstoken.stages.attention_layers import LayerStability, layer_stability
from sstoken.stages.manifest import MANIFEST, Digests
from sstoken.stages.select import Select
from sstoken.stages.training.phases import phase_name

__all__ = ["layers", "phases"]


def layers(scores: Place, *, checkpoints: Sequence[str] = ()) -> list[LayerStability]:
    """Compare layers: whose prompt attention is steadiest between snapshots.

    The steadiest is a candidate for `score --layer`; nothing is chosen automatically. Score the snapshots with
    `--signal attention@0 --signal attention@1 ...` first.

    Example:
      sstoken-curate layers runs/layers --ckpt base --ckpt step-20

    Args:
        scores: the folder with the snapshots' scores, each with signals `attention@LAYER`.
        checkpoints: a snapshot in SCORES, in the order of training; default: all `step-*`.

    Returns:
        The layers, steadiest first.
    """
    folder = place(scores)
    return layer_stability([folder / name for name in _snapshots(folder, checkpoints)])


@command(layers, click.argument("scores"), click.option("--ckpt", "checkpoints", multiple=True), json_option)
def _layers(scores: str, checkpoints: tuple[str, ...], as_json: bool) -> None:
    found = layers(scores, checkpoints=checkpoints)
    if as_json:
        say(json.dumps([asdict(layer) for layer in found]))
        return
    rows = [[str(f.layer), *(f"{x:z.3f}" for x in (f.stability, f.spread, f.attention))] for f in found]
    print_table(["layer", "stability", "spread", "attention"], rows)
    best = found[0]
    say(f"steadiest: layer {best.layer}; use it with: score --layer {best.layer}")


class PhasesCall(Output, Select):
    """Write a masked dataset for each training phase, into OUT/phase-1, OUT/phase-2, ...

    Phase k compares snapshots k - 1 (history) and k (current), and so keeps what the model learns between them.

    Example:
      sstoken-curate phases --tokens runs/tokens --scores runs/scores --out runs/phases --ckpt base --ckpt step-20
    """

    tokens: Place
    """A finished tokens folder."""
    scores_folder: Place = Field(alias="scores")
    """The folder with the snapshots' scores."""
    checkpoints: Annotated[Sequence[str], Option(flag="--ckpt", value="NAME")] = ()
    """A snapshot in SCORES. Repeat it for each, in the order of training.  [default: all `step-*`]"""
    seed: Seed = 0
    """Seed of everything random."""

    def do(self) -> Result:
        """Select; `metrics` has each phase's metrics by name."""
        stage, scores, out = stage_of(self, Select), place(self.scores_folder), place(self.out)
        stage.check()
        digests, jobs = Digests(), {}
        for number, (history, current) in enumerate(pairwise(_snapshots(scores, self.checkpoints)), 1):
            inputs = select_inputs(stage.method, scores, {"history": history, "current": current})
            name = phase_name(number)
            jobs[name] = Job(stage, {"tokens": place(self.tokens), **inputs}, out / name, self.seed)
        results = {name: execute(job, digests, force=self.force) for name, job in jobs.items()}
        metrics = {name: result.metrics for name, result in results.items()}
        return Result(out, metrics, all(result.skipped for result in results.values()))


def _snapshots(scores: Path, given: Sequence[str]) -> list[str]:
    """The names of the snapshots, in the order of training."""
    names = list(given)
    if not names and scores.is_dir():
        found = [p.name for p in scores.iterdir() if (p / MANIFEST).is_file()]
        steps = [name for name in found if name.removeprefix("step-").isdigit()]
        names = sorted(steps, key=lambda name: int(name.removeprefix("step-")))
    if len(names) < 2:
        raise UsageError(
            f"{scores}: a phase lies between two snapshots, and there "
            f"{'is one' if names else 'is none'} ({', '.join(names) or 'no finished scores of step-*'}); name them "
            "in the order of training: --ckpt step-0 --ckpt step-20"
        )
    if len(set(names)) < len(names):
        raise UsageError(
            f"--ckpt names a snapshot twice ({', '.join(names)}); each phase needs two of its own"
        )
    return names


def _show(values: dict[str, Any], as_json: bool) -> None:
    result = phases(**values)
    if as_json:
        print_finished("phases", result, as_json)
        return
    for name, metrics in result.metrics.items():
        print_result(f"phases/{name}", Result(result.folder / name, metrics, result.skipped))


phases = verb(PhasesCall, _show)
