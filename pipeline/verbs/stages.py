"""The verbs that run one stage: finished folders in, one finished folder out.

All raise `UsageError` for a wrong request and `SstokenError` for failed work, each with a one-line message. A call
whose output is finished returns at once (`result.skipped`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import click
from pydantic import Field

from sstoken.errors import SstokenError, UsageError
from sstoken.methods.presets import PRESETS
from sstoken.pipeline.checkpoint_names import given_roles, named_checkpoints, select_inputs
from sstoken.pipeline.cli_options import Option, json_option
from sstoken.pipeline.config import validated
from sstoken.pipeline.job import Job, Result
from sstoken.pipeline.plan import score_job
from sstoken.pipeline.printing import print_result
from sstoken.pipeline.roles import NO_ATTENTION
from sstoken.pipeline.runner import execute, execute_together
from sstoken.pipeline.saying import say
from sstoken.pipeline.sections import chosen, combinations, label, stage_of, swept
from sstoken.pipeline.verbs.command import (
    Internal,
    Output,
    Place,
    Seed,
    api_only,
    command,
    echo_results,
    place,
    print_finished,
    verb,
)
from sstoken.stages import manifest as manifests
from sstoken.stages import storage
from sstoken.stages.anchor import Anchor
from sstoken.stages.critical import Critical
from sstoken.stages.encode import Encode
from sstoken.stages.export import Export
from sstoken.stages.exporting import get_target
from sstoken.stages.exporting.check import check_export
from sstoken.stages.exporting.into import check_into, write_into
from sstoken.stages.manifest import Digests
from sstoken.stages.score import ScoreOptions, compared
from sstoken.stages.score_from_training import Observed
from sstoken.stages.select import Select
from sstoken.stages.stage import Stage

__all__ = ["Result", "anchor", "commit", "critical", "encode", "export", "observed", "score", "select"]


def _execute(call: Output, stage: type[Stage], inputs: Mapping[str, Place], seed: int = 0) -> Result:
    """Run the stage whose fields a call has, from folders by name into `out`."""
    folders = {name: place(folder) for name, folder in inputs.items()}
    job = Job(stage_of(call, stage), folders, place(call.out), seed)
    return execute(job, Digests(), force=call.force)


class EncodeCall(Output, Encode):
    """Turn a dataset into tokens with response masks.

    Example:
      sstoken-curate encode --data runs/demo/data.jsonl --model runs/demo/base --out runs/tokens
    """

    def do(self) -> Result:
        return _execute(self, Encode, {})


encode = verb(EncodeCall)


class AnchorCall(Output, Anchor):
    """Fine-tune a model, and keep snapshots along the way.

    Trains on the responses of --tokens, or on the kept tokens of --masked. Runs in several processes under torchrun:
    `torchrun --no-python --nproc-per-node 2 sstoken-curate anchor ...`.

    Example:
      sstoken-curate anchor --tokens runs/tokens --model runs/demo/base --out runs/history --max-steps 20
    """

    tokens: Place | None = None
    """A finished tokens folder."""
    masked: Place | None = None
    """A finished masked folder, instead of --tokens. Its weights, if any, multiply the tokens' losses."""
    seed: Seed = 0
    """Seed of everything random."""

    def do(self) -> Result:
        given = {"tokens": self.tokens, "masked": self.masked}
        inputs = {name: folder for name, folder in given.items() if folder is not None}
        if len(inputs) != 1:
            said = ", ".join(f"{name} is {str(folder)!r}" for name, folder in given.items() if folder)
            raise UsageError(f"{said or 'neither tokens nor masked is given'}; name one of them to train on")
        return _execute(self, Anchor, inputs, self.seed)


anchor = verb(AnchorCall)


class ScoreCall(Output, ScoreOptions):
    """Measure signals of every response token (--signal: loss, attention, entropy, ...), into OUT/<checkpoint>.

    Example:
      sstoken-curate score --tokens runs/tokens --ckpt runs/demo/base --ckpt runs/history/step-20 --out runs/scores
    """

    tokens: Place
    """A finished tokens folder."""
    checkpoints: Annotated[Sequence[str], Option(flag="--ckpt", value="[NAME=]M")]
    """A checkpoint: folder, LoRA adapter or Hub id. Repeat it for each checkpoint."""
    attention_from: Annotated[str | None, Option(value="M")] = None
    """The checkpoint whose attention is measured, by name or path; `none`: no attention.  [default: the last --ckpt]"""
    listener: Annotated[Callable[[str, Result], None] | None, Internal] = None
    """Called with `(name, result)` as each checkpoint is finished."""

    def do(self) -> Result:
        """Score; `metrics` has each checkpoint's metrics by name."""
        named = named_checkpoints(self.checkpoints)
        attended = self.attention_from or list(named)[-1]
        if attended not in named and attended != NO_ATTENTION:
            same = [name for name, ref in named.items() if ref == attended]
            if not same and "/" not in attended and not place(attended).is_dir():
                raise UsageError(
                    f"attention_from is {attended!r}: no such folder, and none of {', '.join(named)}, {NO_ATTENTION}"
                )
            extra = {} if same else named_checkpoints([attended])
            attended = (same or list(extra))[0]
            named |= extra
        options = stage_of(self, ScoreOptions).model_dump()
        out = place(self.out)
        jobs = {
            name: score_job(
                ref, name == attended, compared(options, name, named), place(self.tokens), out / name
            )
            for name, ref in named.items()
        }
        names = list(jobs)

        def done(index: int, result: Result) -> None:
            if self.listener is not None:
                self.listener(names[index], result)

        results = execute_together([*jobs.values()], Digests(), done, force=self.force)
        metrics = {name: result.metrics for name, result in zip(names, results, strict=True)}
        return Result(out, metrics, all(result.skipped for result in results))


def _show_scores(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_finished("score", score(**values), as_json)
    else:
        score(**values, listener=lambda name, result: print_result(f"score/{name}", result))


score = verb(ScoreCall, _show_scores)


class CriticalCall(Output, Critical):
    """Find the tokens on which a right answer depends (signal critical), by generation and a checker, into OUT.

    Example:
      sstoken-curate critical --tokens runs/tokens --ckpt runs/demo/base --checker exact --out runs/scores/critical
    """

    tokens: Place
    """A finished tokens folder."""
    checkpoint: Annotated[str, Option(flag="--ckpt", value="M")]
    """The checkpoint: folder, LoRA adapter or Hub id."""

    def do(self) -> Result:
        return _execute(self, Critical, {"tokens": self.tokens})


critical = verb(CriticalCall)


class ObservedCall(Output, Observed):
    """Turn the losses that in-loop training recorded into scores, such as `scores/epoch-1`."""

    tokens: Place
    """A finished tokens folder."""

    def do(self) -> Result:
        return _execute(self, Observed, {"tokens": self.tokens})


observed = api_only(ObservedCall)


class SelectCall(Output, Select):
    """Write the token-masked dataset.

    --method, --param, --rho, --gamma and --scope may be repeated: every combination is written into a folder of its own
    (OUT-rho-0.4, OUT-rho-0.6).

    Example:
      sstoken-curate select --tokens runs/tokens --scores runs/scores --out runs/masked --rho 0.5
    """

    tokens: Place
    """A finished tokens folder."""
    scores_folder: Place = Field(alias="scores")
    """The folder with the checkpoints' scores."""
    roles: dict[str, str] = Field(default_factory=dict)
    """The checkpoint in SCORES that plays a role of the method: ROLE=CHECKPOINT."""
    history: str | None = None
    """Short for `--role history=NAME`.  [default: base, or step-0]"""
    current: str | None = None
    """Short for `--role current=NAME`.  [default: the other one]"""
    seed: Seed = 0
    """Seed of everything random."""

    def job(self) -> Job:
        """What to run, its settings checked."""
        stage = stage_of(self, Select)
        stage.check()
        roles = given_roles(self.roles, self.history, self.current)
        inputs = select_inputs(stage.method, place(self.scores_folder), roles)
        return Job(stage, {"tokens": place(self.tokens), **inputs}, place(self.out), self.seed)

    def do(self) -> Result:
        return execute(self.job(), Digests(), force=self.force)


def _show_selections(values: dict[str, Any], as_json: bool) -> None:
    """Select for every combination of values, each into a folder of its own: OUT-rho-0.4, OUT-rho-0.6."""
    kept = swept(values, SelectCall)
    choices = combinations(kept.pop("sweep", {}))
    calls, results = {}, {}
    for choice in choices:
        name, out = "select", kept["out"]
        if choice:
            name, out = f"select/{label(choice)}", f"{str(out).rstrip('/')}-{label(choice)}"
        calls[name] = chosen(kept, choice) | {"out": out}
    if len(calls) > 1:  # refuse a wrong combination before the others are made
        for given in calls.values():
            validated(SelectCall, given, "select").job()
    for name, given in calls.items():
        results[name] = select(**given)
        if not as_json and given.get("method") in PRESETS:
            say(PRESETS[given["method"]].line)
        if not as_json or len(choices) == 1:
            print_finished(name, results[name], as_json)
    if as_json and len(choices) > 1:
        facts = {n: {"folder": str(r.folder), "skipped": r.skipped, **r.metrics} for n, r in results.items()}
        say(json.dumps(facts))


select = verb(SelectCall, _show_selections, sweep=("method", "params", "rho", "gamma", "scope"))


class ExportCall(Output, Export):
    """Write a masked dataset in a trainer's format.

    OUT/README.md has the command that trains on it.

    Example:
      sstoken-curate export runs/masked --to trl --out runs/export-trl --check
    """

    masked: Annotated[Place, Option(argument=True)]
    """A finished masked folder."""
    into: Place | None = None
    """Your own configuration of the trainer (YAML; trl, axolotl, llamafactory). A copy NAME-masked.yml is written
    beside it, with the necessary changes; comments and everything else stay."""
    read_back: Annotated[bool, Option(flag="--check")] = Field(default=False, alias="check")
    """Read it back as the trainer would, and compare every token; also if it was finished already."""

    def do(self) -> Result:
        """Export; `metrics["checked"]` counts what `check` compared, `metrics["into"]` has the file and its diff."""
        stage, masked = stage_of(self, Export), place(self.masked)
        if self.into is not None:
            check_into(place(self.into), get_target(self.to))
        result = _execute(self, Export, {"masked": masked})
        if self.into is not None:
            file, diff = write_into(
                place(self.into), get_target(self.to), result.folder, result.metrics, force=self.force
            )
            result = replace(result, metrics={**result.metrics, "into": {"file": str(file), "diff": diff}})
        if not self.read_back:
            return result
        for problem in manifests.problems(result.folder, manifests.finished(result.folder, "export")):
            raise SstokenError(f"{problem}; export it again (--force)")
        checked = check_export(
            masked,
            storage.local(result.folder),
            get_target(self.to),
            stage.max_length,
            weighted=stage.with_weights(masked),
        )
        return replace(result, metrics={**result.metrics, "checked": checked})


def _show_export(values: dict[str, Any], as_json: bool) -> None:
    result = export(**values)
    print_finished("export", result, as_json)
    if "into" in result.metrics and not as_json:
        for line in result.metrics["into"]["diff"] or ["nothing had to change"]:
            say(line)
        say(f"written: {result.metrics['into']['file']}")
    if "checked" in result.metrics and not as_json:
        c = result.metrics["checked"]
        say(
            f"check: {c['examples']:,} examples read back; all {c['tokens']:,} tokens and {c['kept']:,} labels agree"
        )


export = verb(ExportCall, _show_export)


def commit(out: Place) -> dict[str, Result]:
    """Finish the work of ranks (--rank, --world-size): check that all shards are there, and write the manifest.

    Example:
      sstoken-curate commit runs/tokens

    Args:
        out: the --out of the ranks.

    Returns:
        The result of each folder by name; for `score`, one per checkpoint.
    """
    from sstoken.pipeline.ranks import commit

    return commit(place(out))


@command(commit, click.argument("out"), json_option)
def _commit(out: str, as_json: bool) -> None:
    results = commit(out)
    if as_json:
        echo_results(results)
        return
    for name, result in results.items():
        stage = manifests.finished(result.folder, name).stage
        print_result(f"{stage}/{name}", result)
