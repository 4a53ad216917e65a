"""`run` and `demo`: whole runs."""

import json
import shlex
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import click

from sstoken.errors import SstokenError, UsageError
from sstoken.pipeline.claim import claim
from sstoken.pipeline.cli_options import json_option
from sstoken.pipeline.config import LARGEST_SEED, RunConfig, load_config
from sstoken.pipeline.disk import naming_full_disk
from sstoken.pipeline.job import Job, Result, State, changes, state
from sstoken.pipeline.locks import one_run_at_a_time
from sstoken.pipeline.plan import Step, check_run, run_groups
from sstoken.pipeline.printing import print_result
from sstoken.pipeline.runner import execute_together
from sstoken.pipeline.saying import say
from sstoken.pipeline.verbs.command import Place, command, echo_results, local_place
from sstoken.stages import storage
from sstoken.stages.encode import Encode
from sstoken.stages.manifest import Digests
from sstoken.stages.remote_path import RemotePath
from sstoken.stages.sharded import ShardedStage

__all__ = ["Step", "demo", "run"]

DIGESTS = "digests.json"
_SOON = 60.0
"""Seconds that a rank waits for another one to claim the run's folder."""
Listener = Callable[[Step, Result], None]
overrides_option = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=V", help="Set a field, such as select.rho=0.4."
)


def demo(
    out: Place = "runs/demo", *, seed: int = 0, quiet: bool = False, model: str | None = None
) -> dict[str, Any]:
    """Run the whole pipeline on a generated example, in minutes on a laptop's CPU.

    Generates a small instruction set with planted noise, a tiny base model and its history; then counts what each
    method kept of the noise and of everything else.

    Example:
      sstoken-curate demo

    Args:
        out: the demo's folder; finished steps are not repeated.
        seed: seed of everything random.
        quiet: print to standard error only.
        model: score the data with this pretrained model instead, without training: a folder, a Hub id, or `smollm2`
            (SmolLM2-135M-Instruct).
    """
    from rich.console import Console

    from sstoken.pipeline.demo.run import run_demo

    folder = local_place(out)
    with naming_full_disk(folder):
        return run_demo(folder, seed, Console(stderr=True) if quiet else None, model=model)


@command(
    demo,
    click.option(
        "--out",
        help="The demo's folder; finished steps are not repeated.  [default: runs/demo, with --model "
        "runs/demo-pretrained]",
    ),
    click.option("--seed", type=click.IntRange(0, LARGEST_SEED), default=0, show_default=True),
    click.option("--model"),
    json_option,
)
def _demo(out: str | None, seed: int, model: str | None, as_json: bool) -> None:
    out = out or ("runs/demo" if model is None else "runs/demo-pretrained")
    found = demo(out, seed=seed, quiet=as_json, model=model)
    if as_json:
        say(json.dumps(found))


def run(
    config: str | Path | RunConfig,
    *,
    overrides: Iterable[str] = (),
    until: str | None = None,
    only: str | None = None,
    force: Iterable[str] = (),
    rank: int = 0,
    world_size: int = 1,
    listener: Listener | None = None,
) -> dict[str, Result]:
    """Run the unfinished steps of a configuration.

    Example:
      sstoken-curate run configs/demo.yaml --set select.rho=0.4

    Args:
        config: a YAML file or a configuration.
        overrides: `section.field=value`.
        until: the last step to run.
        only: the only step to run; those before it must be finished.
        force: a step to run again even if it is finished.
        rank: this process's rank, for a step whose work several processes share (see `only`).
        world_size: number of ranks; `commit` finishes the step once all are done.
        listener: called after each step.

    Returns:
        The result of each step, by name.
    """
    config = config if isinstance(config, RunConfig) else load_config(config, overrides)
    names = list(config.named)
    forced = set(force)
    for name in (*forced, *filter(None, (until, only))):
        if name not in names:
            raise UsageError(f"stage {name!r} is not in this run; legal: {', '.join(names)}")
    if until is not None and only is not None:
        raise UsageError(f"until is {until!r} and only is {only!r}; give one of them")
    if world_size > 1 and only is None:
        raise UsageError(f"world_size is {world_size}; ranks share one step: name it with --only")
    until = only or until
    check_run(config)
    digests = Digests(storage.of(config.folder).on_this_machine(config.folder / DIGESTS))
    anew = any(isinstance(config.named[name], Encode) for name in forced)
    # The tasks of an array begin together.
    with one_run_at_a_time(config.folder, "claim", wait=_SOON) if world_size > 1 else nullcontext():
        claim(config, digests, anew=anew)
    results: dict[str, Result] = {}
    for group in run_groups(config):
        if until is not None and names.index(group[0].step) > names.index(until):
            break
        jobs: list[Job] = []
        for step in group:
            assert step.job is not None, "a finished anchor run leaves a history"
            if only in (None, step.step):
                jobs.append(_placed(step.job, config, rank, world_size))
            elif (found := state(step.job, digests)) is not State.FINISHED:
                raise SstokenError(
                    f"{only}: needs {step.name}, which is not finished ({found.value}); run that first"
                )
        if not jobs:
            continue
        results |= _together(group, jobs, digests, group[0].step in forced, listener)
    return results


def _together(
    group: list[Step], jobs: list[Job], digests: Digests, force: bool, listener: Listener | None
) -> dict[str, Result]:
    """Run the steps of a group; each result says what it replaced."""
    replaced = [changes(step.step, job, digests) for step, job in zip(group, jobs, strict=True)]
    results: dict[str, Result] = {}

    def done(index: int, result: Result) -> None:
        step = group[index]
        results[step.name] = result if result.skipped else replace(result, replaced=replaced[index])
        if listener is not None:
            listener(step, results[step.name])

    execute_together(jobs, digests, done, replace=True, force=force)
    return {step.name: results[step.name] for step in group}


def _placed(job: Job, config: RunConfig, rank: int, world_size: int) -> Job:
    """Give a job the engine that the run's configuration names, and this process's rank."""
    stage = job.stage
    if not isinstance(stage, ShardedStage):
        if world_size > 1:
            raise UsageError(
                f"world_size is {world_size}, and {stage.name} cannot be shared by ranks; leave it out"
            )
        return job
    engine = {name: getattr(config, name) for name in ("engine", "ray_address", "ray_env")}
    given = {k: v for k, v in engine.items() if v is not None and k not in stage.model_fields_set}
    ranks = {"rank": rank, "world_size": world_size} if world_size > 1 else {}
    return replace(job, stage=stage.model_copy(update={**given, **ranks}))


@command(
    run,
    click.argument("config"),
    overrides_option,
    click.option("--until", metavar="STEP"),
    click.option("--only", metavar="STEP"),
    click.option("--force", multiple=True, metavar="STEP"),
    click.option("--rank", type=int, default=0, show_default=True),
    click.option("--world-size", type=int, default=1, show_default=True),
    click.option(
        "--dry-run",
        is_flag=True,
        help="Run nothing; write the resolved configuration, and scripts for SLURM, to OUT.slurm.",
    ),
    click.option(
        "--ranks",
        type=click.IntRange(1),
        default=8,
        show_default=True,
        help="For --dry-run: tasks of each job array.",
    ),
    json_option,
)
def _run(
    config: str, overrides: tuple[str, ...], dry_run: bool, ranks: int, as_json: bool, **options: Any
) -> None:
    if dry_run:
        _write_scripts(load_config(config, overrides), ranks, as_json)
        return

    def report(step: Step, result: Result) -> None:
        if not as_json:
            print_result(step.name, result, step.kind)

    results = run(config, overrides=overrides, listener=report, **options)
    if as_json:
        echo_results(results)


def _write_scripts(config: RunConfig, ranks: int, as_json: bool) -> None:
    from sstoken.pipeline.slurm import write_scripts

    check_run(config)
    out: PurePath = config.folder
    name = f"{out.name}.slurm"  # on a disk, from which bash and sbatch read scripts
    folder = Path(name) if isinstance(out, RemotePath) else config.folder.with_name(name)
    files = write_scripts(config, folder, ranks)
    if as_json:
        say(json.dumps({"files": list(map(str, files))}))
        return
    for file in files:
        say(f"{file}: written")
    say(f"nothing was run; submit with: bash {shlex.quote(str(files[-1]))}")
