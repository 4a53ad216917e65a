"""The verbs of a whole run, which one configuration file describes."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from sstoken.errors import UsageError
from sstoken.pipeline.changes import changes
from sstoken.pipeline.claim import claim
from sstoken.pipeline.cli_options import json_option
from sstoken.pipeline.config import LARGEST_SEED, RunConfig, load_config
from sstoken.pipeline.job import Result, State, state, superseded
from sstoken.pipeline.plan import Step, check_run, run_steps
from sstoken.pipeline.printing import print_result, print_table
from sstoken.pipeline.runner import execute
from sstoken.pipeline.verbs.command import Place, command, place
from sstoken.stages import storage
from sstoken.stages.encode import Encode
from sstoken.stages.manifest import Digests

__all__ = ["Planned", "Step", "demo", "plan", "run"]

_DIGESTS = "digests.json"
Listener = Callable[[Step, Result], None]
_overrides = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=V", help="Set a field, such as select.rho=0.4."
)


def demo(
    out: Place = "runs/demo", *, seed: int = 0, quiet: bool = False, model: str | None = None
) -> dict[str, Any]:
    """The whole pipeline on an embedded example, in minutes on a laptop's CPU.

    Makes a small instruction set with planted noise, a tiny base model and its history; then counts what each
    method kept of the noise and of everything else.

    Example:
      sstoken-curate demo

    Args:
        out: where it works; finished steps are kept.
        seed: of everything random.
        quiet: print on standard error, and nothing on standard output.
        model: a pretrained model that scores the data instead, without training: a folder, a Hub id, or `smollm2`
            (SmolLM2-135M-Instruct).
    """
    from rich.console import Console

    from sstoken.pipeline.demo.run import run_demo

    return run_demo(place(out), seed, Console(stderr=True) if quiet else None, model=model)


@command(
    demo,
    click.option(
        "--out",
        help="Where it works; finished steps are kept.  [default: runs/demo, or runs/demo-pretrained with --model]",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, LARGEST_SEED),
        default=0,
        show_default=True,
        help="Seed of everything random.",
    ),
    click.option(
        "--model",
        help="Have this pretrained model score the data, without training: a folder, a Hub id, or smollm2.",
    ),
    json_option,
)
def _demo(out: str | None, seed: int, model: str | None, as_json: bool) -> None:
    out = out or ("runs/demo" if model is None else "runs/demo-pretrained")
    found = demo(out, seed=seed, quiet=as_json, model=model)
    if as_json:
        click.echo(json.dumps(found))


def run(
    config: str | Path | RunConfig,
    *,
    overrides: Iterable[str] = (),
    until: str | None = None,
    force: Iterable[str] = (),
    listener: Listener | None = None,
) -> dict[str, Result]:
    """Run what is not finished of a configuration.

    Example:
      sstoken-curate run configs/demo.yaml --set select.rho=0.4

    Args:
        config: a YAML file or a configuration.
        overrides: `section.field=value`.
        until: the last step to run.
        force: steps to run again though they are finished.
        listener: called after each step.

    Returns:
        The result of each step, by name.
    """
    config = config if isinstance(config, RunConfig) else load_config(config, overrides)
    names = list(config.named)
    forced = set(force)
    for name in [*forced, *([until] if until else [])]:
        if name not in names:
            raise UsageError(f"stage {name!r} is not in this run; legal: {', '.join(names)}")
    check_run(config)
    digests = Digests(storage.of(config.folder).on_this_machine(config.folder / _DIGESTS))
    claim(config, digests, anew=bool(forced & {n for n, s in config.named.items() if isinstance(s, Encode)}))
    results: dict[str, Result] = {}
    for step in run_steps(config):
        if until is not None and names.index(step.step) > names.index(until):
            break
        assert step.job is not None, "a finished anchor run leaves a history"
        replaced = changes(step.step, step.job, digests)
        result = execute(
            step.job,
            digests,
            replace=True,
            force=step.step in forced,
        )
        results[step.name] = result if result.skipped else replace(result, replaced=replaced)
        if listener is not None:
            listener(step, results[step.name])
    return results


@command(
    run,
    click.argument("config"),
    _overrides,
    click.option("--until", metavar="STAGE", help="The last stage to run."),
    click.option(
        "--force", multiple=True, metavar="STAGE", help="Run this stage again though it is finished."
    ),
    json_option,
)
def _run(
    config: str, overrides: tuple[str, ...], until: str | None, force: tuple[str, ...], as_json: bool
) -> None:
    def report(step: Step, result: Result) -> None:
        if not as_json:
            print_result(step.name, result, step.kind)

    results = run(config, overrides=overrides, until=until, force=force, listener=report)
    if as_json:
        facts = {
            name: {"folder": str(result.folder), "skipped": result.skipped, "metrics": result.metrics}
            for name, result in results.items()
        }
        click.echo(json.dumps(facts))


@dataclass(frozen=True)
class Planned:
    """What `run` would do with a step."""

    step: str
    folder: Path | None
    state: str
    """`finished`, or why it runs."""
    superseded: Path | None = None
    """Unfinished work of other settings or inputs, which is in nobody's way; the step removes it when it runs."""
    changed: tuple[str, ...] = ()
    """How the finished output that is there differs: `select.rho 0.6 -> 0.4`."""


def plan(config: str | Path | RunConfig, *, overrides: Iterable[str] = ()) -> list[Planned]:
    """What `run` would do, and why, without doing it.

    Example:
      sstoken-curate plan configs/demo.yaml

    Args:
        config: a YAML file or a configuration.
        overrides: `section.field=value`.
    """
    config = config if isinstance(config, RunConfig) else load_config(config, overrides)
    check_run(config)
    digests = Digests(storage.of(config.folder).on_this_machine(config.folder / _DIGESTS))
    planned: list[Planned] = []
    waiting: set[str] = set()
    for step in run_steps(config):
        awaited = [name for name in step.after if name in waiting]
        why = f"waits for {awaited[0]}" if awaited else ""
        if step.job is not None:
            why = why or state(step.job, digests).value
        if why != State.FINISHED.value:
            waiting.add(step.name)
        other = superseded(step.job, digests) if step.job is not None and not awaited else None
        differs: tuple[str, ...] = ()
        if step.job is not None and not awaited and why != State.FINISHED.value:
            differs = changes(step.step, step.job, digests)
        planned.append(Planned(step.name, step.job.out if step.job else None, why, other, differs))
    return planned


@command(plan, click.argument("config"), _overrides, json_option)
def _plan(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    planned = plan(config, overrides=overrides)
    if as_json:
        facts = [
            vars(p) | {"folder": str(p.folder or ""), "superseded": str(p.superseded or "")} for p in planned
        ]
        click.echo(json.dumps(facts))
        return
    rows = [
        (p.step, str(p.folder or ""), f"{'; '.join(p.changed)}: runs again" if p.changed else p.state)
        for p in planned
    ]
    print_table(("step", "folder", "state"), rows)
    for folder in (p.superseded for p in planned if p.superseded):
        click.echo(
            f"{folder}: unfinished work of other settings or inputs; go on with those, or remove it", err=True
        )
