"""Every verb as a function. What the command line does beyond these is to print.

All raise `UsageError` for a wrong request and `SstokenError` where the work fails, with one line to show.
A call that finds its output finished returns at once (`result.skipped`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from sstoken.errors import SstokenError, UsageError
from sstoken.pipeline.claim import claim
from sstoken.pipeline.config import RunConfig, load_config, validated
from sstoken.pipeline.hub.api import publish as publish
from sstoken.pipeline.hub.api import pull as pull
from sstoken.pipeline.plan import (
    NO_ATTENTION,
    Step,
    check_run,
    named_checkpoints,
    run_steps,
    score_job,
    select_inputs,
)
from sstoken.pipeline.runner import Job, Result, State, execute, state, superseded
from sstoken.stages import manifest as manifests
from sstoken.stages.anchor import Anchor
from sstoken.stages.encode import Encode
from sstoken.stages.export import Export
from sstoken.stages.exporting import get_target
from sstoken.stages.exporting.check import check_export
from sstoken.stages.manifest import MANIFEST, Digests
from sstoken.stages.score import ScoreOptions
from sstoken.stages.score_from_training import Observed
from sstoken.stages.select import Select
from sstoken.stages.stage import Stage

_DIGESTS = "digests.json"
S = TypeVar("S", bound=Stage)
Listener = Callable[[Step, Result], None]


def encode(*, data: str, model: str, out: str | Path, force: bool = False, **fields: Any) -> Result:
    """Turn a dataset into tokens. `fields`: those of `sstoken.stages.encode.Encode`."""
    stage = _stage(Encode, data=str(data), model=str(model), **fields)
    return execute(Job(stage, {}, _place(out), seed=0), Digests(), force=force)


def anchor(
    *,
    tokens: str | Path,
    model: str,
    out: str | Path,
    seed: int = 0,
    force: bool = False,
    **fields: Any,
) -> Result:
    """Fine-tune, and keep snapshots of the way. `fields`: those of `sstoken.stages.anchor.Anchor`."""
    stage = _stage(Anchor, model=str(model), **fields)
    return execute(Job(stage, {"tokens": _place(tokens)}, _place(out), seed), Digests(), force=force)


def score(
    *,
    tokens: str | Path,
    checkpoints: Sequence[str],
    out: str | Path,
    attention_from: str | None = None,
    force: bool = False,
    listener: Callable[[str, Result], None] | None = None,
    **fields: Any,
) -> Result:
    """Measure signals of every response token under each checkpoint: the loss, and prompt attention under one.

    Args:
        tokens: a finished tokens folder.
        checkpoints: folders, Hub ids or LoRA adapters; `NAME=PATH` names one.
        out: gets a folder for each checkpoint.
        attention_from: the one whose attention is measured (name or path); None: the last; `none`: no attention.
        force: score again what is finished.
        listener: called with `(name, result)` after each checkpoint.
        fields: those of `sstoken.stages.score.ScoreOptions`.

    Returns:
        `metrics` holds each checkpoint's, by name.
    """
    named = named_checkpoints(checkpoints)
    attended = attention_from or list(named)[-1]
    if attended not in named and attended != NO_ATTENTION:
        same = [name for name, ref in named.items() if ref == attended]
        extra = {} if same else named_checkpoints([attended])
        attended = (same or list(extra))[0]
        named |= extra
    options = _stage(ScoreOptions, **fields).model_dump()
    digests = Digests()
    jobs = {
        name: score_job(ref, name == attended, options, _place(tokens), _place(out) / name)
        for name, ref in named.items()
    }
    for job in jobs.values():  # refuse before the first forward pass
        job.stage.check()
    results = {}
    following = dict(pairwise(named))
    for name, job in jobs.items():
        ahead = named.get(following.get(name, ""))
        results[name] = execute(job, digests, force=force, next_checkpoint=ahead)
        if listener is not None:
            listener(name, results[name])
    metrics = {name: result.metrics for name, result in results.items()}
    return Result(_place(out), metrics, all(result.skipped for result in results.values()))


def observed(
    *, recorded: str | Path, tokens: str | Path, out: str | Path, force: bool = False, **fields: Any
) -> Result:
    """Make scores of the losses that in-loop training saw, such as `scores/epoch-1`.

    `recorded`: the folder given to `ObservedLosses`. `fields`: those of `sstoken.stages.score_from_training.Observed`.
    """
    stage = _stage(Observed, recorded=str(recorded), **fields)
    return execute(Job(stage, {"tokens": _place(tokens)}, _place(out), seed=0), Digests(), force=force)


def select(
    *,
    tokens: str | Path,
    scores: str | Path,
    out: str | Path,
    history: str | None = None,
    current: str | None = None,
    roles: Mapping[str, str] | None = None,
    seed: int = 0,
    force: bool = False,
    **fields: Any,
) -> Result:
    """Write the masked dataset.

    Args:
        tokens: a finished tokens folder.
        scores: holds a folder of scores for each checkpoint.
        out: a fresh folder.
        history: short for `roles={"history": NAME}`.
        current: short for `roles={"current": NAME}`.
        roles: the name of the checkpoint in each role that the method asks for.
        seed: of the method `random`.
        force: select again what is finished.
        fields: those of `sstoken.stages.select.Select` (method, params, scope, ...).
    """
    stage = _stage(Select, **fields)
    stage.check()
    given = {"history": history, "current": current}
    for role, name in (roles or {}).items():
        if given.setdefault(role, name) not in (None, name):
            raise UsageError(f"role {role!r} is given twice: {given[role]!r} and {name!r}; give it once")
        given[role] = name
    inputs = select_inputs(stage.method, _place(scores), given)
    return execute(
        Job(stage, {"tokens": _place(tokens), **inputs}, _place(out), seed), Digests(), force=force
    )


def export(
    *,
    masked: str | Path,
    to: str,
    out: str | Path,
    check: bool = False,
    force: bool = False,
    **fields: Any,
) -> Result:
    """Write the masked dataset as a trainer takes it.

    Args:
        masked: a finished masked folder.
        to: the trainer; `sstoken.stages.exporting.TARGETS` lists them.
        out: a fresh folder.
        check: read it back as the trainer would, also where it was finished already, and compare every token.
        force: export again what is finished.
        fields: those of `sstoken.stages.export.Export` (weights, max_length, ...).

    Returns:
        With `check`, `metrics["checked"]` counts what was compared.
    """
    stage = _stage(Export, to=to, **fields)
    job = Job(stage, {"masked": _place(masked)}, _place(out), seed=0)
    result = execute(job, Digests(), force=force)
    if not check:
        return result
    for problem in manifests.problems(result.folder, manifests.finished(result.folder, "export")):
        raise SstokenError(f"{problem}; export it again (--force)")
    checked = check_export(
        _place(masked), result.folder, get_target(to), stage.max_length, weighted=stage.weights
    )
    return replace(result, metrics={**result.metrics, "checked": checked})


def run(
    config: str | Path | RunConfig,
    *,
    overrides: Iterable[str] = (),
    until: str | None = None,
    force: Iterable[str] = (),
    listener: Listener | None = None,
) -> dict[str, Result]:
    """Run what is not finished of a configuration, in order.

    Args:
        config: a YAML file or a configuration.
        overrides: `section.field=value`.
        until: the last stage to run.
        force: stages to run again though they are finished.
        listener: called after each step.

    Returns:
        The result of each step, by name.
    """
    config = config if isinstance(config, RunConfig) else load_config(config, overrides)
    stages = ["encode", *(["anchor"] if config.anchor else []), "score", "select"]
    forced = set(force)
    for name in [*forced, *([until] if until else [])]:
        if name not in stages:
            raise UsageError(f"stage {name!r} is not in this run; legal: {', '.join(stages)}")
    check_run(config)
    digests = Digests(config.folder / _DIGESTS)
    claim(config, digests, anew="encode" in forced)
    results: dict[str, Result] = {}
    for step in run_steps(config):
        if until is not None and stages.index(step.stage) > stages.index(until):
            break
        assert step.job is not None, "a finished anchor run leaves a history"
        results[step.name] = execute(
            step.job,
            digests,
            replace=True,
            force=step.stage in forced,
            next_checkpoint=step.next_checkpoint,
        )
        if listener is not None:
            listener(step, results[step.name])
    return results


@dataclass(frozen=True)
class Planned:
    """What `run` would do with a step."""

    step: str
    folder: Path | None
    state: str
    """`finished`, or why it runs."""
    superseded: Path | None = None
    """Unfinished work of other settings or inputs, which is in nobody's way; the step removes it when it runs."""


def plan(config: str | Path | RunConfig, *, overrides: Iterable[str] = ()) -> list[Planned]:
    """What `run` would do, and why, without doing it."""
    config = config if isinstance(config, RunConfig) else load_config(config, overrides)
    check_run(config)
    digests = Digests(config.folder / _DIGESTS)
    planned: list[Planned] = []
    waiting: dict[Path, str] = {}
    for step in run_steps(config):
        awaited = [
            waiting[folder] for folder in (step.job.inputs.values() if step.job else ()) if folder in waiting
        ]
        if step.stage in ("score", "select") and "anchor" in waiting.values():
            awaited = ["anchor"]  # it decides which checkpoints there are
        why = f"waits for {awaited[0]}" if awaited else ""
        if step.job is not None:
            why = why or state(step.job, digests).value
            if why != State.FINISHED.value:
                waiting[step.job.out] = step.name
        other = superseded(step.job, digests) if step.job is not None and not awaited else None
        planned.append(Planned(step.name, step.job.out if step.job else None, why, other))
    return planned


def verify(folder: str | Path) -> tuple[list[Path], list[str]]:
    """Re-check every manifest and checksum below a folder.

    Returns:
        The finished folders that were checked, and a line for each thing that is wrong.
    """
    root = _place(folder)
    if not root.is_dir():
        raise UsageError(f"{folder}: no such folder; name a run or a stage's output")
    checked = sorted(path.parent for path in root.rglob(MANIFEST))
    if not checked:
        raise SstokenError(f"{folder}: no finished work below it (no {MANIFEST})")
    wrong: list[str] = []
    for finished in checked:
        try:
            manifest = manifests.read_manifest(finished)
        except SstokenError as error:
            wrong.append(str(error))
        else:
            assert manifest is not None
            wrong += manifests.problems(finished, manifest)
            wrong += [
                f"{path}: not in {finished / MANIFEST}, so it is never read; move it out of the folder"
                for path in manifests.unlisted(finished, manifest)
            ]
    return checked, wrong


def _place(path: str | Path) -> Path:
    return Path(path).expanduser()


def _stage(stage: type[S], **fields: Any) -> S:
    return validated(stage, fields, getattr(stage, "name", "score"))
