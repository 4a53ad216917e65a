"""`plan`: what a run would do, and what it would cost."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sstoken.errors import SstokenError
from sstoken.pipeline.claim import check_claim
from sstoken.pipeline.cli_options import json_option
from sstoken.pipeline.config import RunConfig, load_config
from sstoken.pipeline.job import State, changes, identify, state, superseded
from sstoken.pipeline.plan import check_run, run_steps
from sstoken.pipeline.printing import SUPERSEDED, print_table
from sstoken.pipeline.saying import say
from sstoken.pipeline.verbs.command import command
from sstoken.pipeline.verbs.runs import DIGESTS, overrides_option
from sstoken.stages import storage
from sstoken.stages.manifest import Digests

if TYPE_CHECKING:
    from sstoken.pipeline.estimates import Cost, Estimate

__all__ = ["Planned", "plan"]


@dataclass(frozen=True)
class Planned:
    """What `run` would do with a step."""

    step: str
    folder: Path | None
    state: str
    """`finished`, or why it runs."""
    superseded: Path | None = None
    """A partial folder of other settings or inputs; the step deletes it when it runs."""
    changed: tuple[str, ...] = ()
    """How the existing output differs: `select.rho 0.6 -> 0.4`."""


def plan(config: str | Path | RunConfig, *, overrides: Iterable[str] = ()) -> list[Planned]:
    """Show what `run` would do, and why.

    Example:
      sstoken-curate plan configs/demo.yaml

    Args:
        config: a YAML file or a configuration.
        overrides: `section.field=value`.
    """
    config = config if isinstance(config, RunConfig) else load_config(config, overrides)
    return _planned(config, _digests(config))


def _digests(config: RunConfig) -> Digests:
    return Digests(storage.of(config.folder).on_this_machine(config.folder / DIGESTS))


def _planned(config: RunConfig, digests: Digests) -> list[Planned]:
    check_run(config)
    planned: list[Planned] = []
    waiting: set[str] = set()
    for step in run_steps(config):
        job, awaited = step.job, [name for name in step.after if name in waiting]
        if job is None or awaited:
            why = f"waits for {awaited[0]}" if awaited else ""
            planned.append(Planned(step.name, None if job is None else job.out, why))
            waiting.add(step.name)
            continue
        found = state(job, digests)
        if found is not State.FINISHED:
            waiting.add(step.name)
        differs = () if found is State.FINISHED else changes(step.step, job, digests)
        other = superseded(job, identify(job, digests))
        planned.append(Planned(step.name, job.out, found.value, other, differs))
    return planned


@command(
    plan,
    click.argument("config"),
    overrides_option,
    click.option(
        "--cost",
        "with_cost",
        is_flag=True,
        help="Estimate each step's tokens, FLOPs, device-hours and bytes; show what finished steps took.",
    ),
    click.option(
        "--tflops",
        type=click.FloatRange(0, min_open=True),
        default=100.0,
        show_default=True,
        help="For --cost: assumed speed of a device, in 10^12 FLOPs per second.",
    ),
    json_option,
)
def _plan(config: str, overrides: tuple[str, ...], with_cost: bool, tflops: float, as_json: bool) -> None:
    from sstoken.pipeline.estimates import estimates

    loaded = load_config(config, overrides)
    if with_cost:
        _print_costs(loaded, tflops, as_json)
        return
    digests = _digests(loaded)
    planned = _planned(loaded, digests)
    to_do = {p.step for p in planned if p.state != State.FINISHED.value}
    needed: list[Estimate] = []
    refused: SstokenError | None = None
    try:
        needed = estimates(loaded, to_do) if to_do else []
    except SstokenError as error:  # the data cannot be read for its size
        refused = error
    if as_json:
        by_step = {e.step: asdict(e) for e in needed}
        none = dict.fromkeys(("tokens", "seconds", "bytes", "guessed"))
        facts = [
            vars(p)
            | {"folder": str(p.folder or ""), "superseded": str(p.superseded or "")}
            | by_step.get(p.step, none)
            for p in planned
        ]
        say(json.dumps(facts))
        if refused is not None:
            raise refused
        return
    rows = [
        (p.step, str(p.folder or ""), f"{'; '.join(p.changed)}: runs again" if p.changed else p.state)
        for p in planned
    ]
    print_table(("step", "folder", "state"), rows)
    for folder in (p.superseded for p in planned if p.superseded):
        say(f"{folder}: {SUPERSEDED}", err=True)
    if refused is not None:
        raise refused
    try:
        check_claim(loaded, digests)
    except SstokenError as error:
        say(f"note: run will refuse this: {error}", err=True)
    if needed:
        _print_needed(needed, loaded.folder)


def _print_needed(needed: "list[Estimate]", out: Path) -> None:
    """Print what the remaining steps need, and the totals."""
    from sstoken.pipeline.disk import free_bytes, size_text
    from sstoken.pipeline.estimates import SAMPLE

    seconds = [e.seconds for e in needed if e.seconds is not None]
    size = sum(e.bytes or 0 for e in needed)
    rows = [
        (
            e.step,
            _number(e.tokens, "~" if e.guessed else ""),
            _hours(None if e.seconds is None else e.seconds / 3600, "~"),
            "-" if e.bytes is None else "~" + size_text(int(e.bytes)),
        )
        for e in needed
    ]
    # A sum without what is not known is a lower bound.
    about = "~" if len(seconds) == len(needed) else ">"
    disk = "~" if all(e.bytes is not None for e in needed) else ">"
    rows.append(
        ("all", "", _hours(sum(seconds) / 3600, about) if seconds else "-", disk + size_text(int(size)))
    )
    say()
    print_table(("still to do", "tokens", "time", "disk"), rows)
    if seconds:
        say("time: at the rate of the last run of each kind on this machine")
    if len(seconds) < len(needed):
        say(
            "time -: none of its kind has run here yet, with such a device, backend, signals and size of model; "
            "`plan --cost` estimates from the FLOPs"
        )
    if any(e.guessed for e in needed):
        say(f"tokens: from the first {SAMPLE} rows; exact once they are encoded")
    free = free_bytes(out)
    if free is not None and size > free:
        say(
            f"warning: {out}: about {size_text(int(size))} would be written, and {size_text(free)} are free",
            err=True,
        )


def _print_costs(config: RunConfig, tflops: float, as_json: bool) -> None:
    from sstoken.pipeline.estimates import SAMPLE, costs

    check_run(config)
    found = costs(config, tflops)
    if as_json:
        say(json.dumps({"tflops": tflops, "steps": [vars(each) for each in found]}))
        return
    print_table(("step", "tokens", "FLOPs", "device-hours", "bytes", "took", "wrote"), list(_rows(found)))
    say(f"device-hours: at {tflops:g} TFLOP/s per device; give the speed of yours with --tflops")
    if any(each.guessed for each in found):
        say(f"~: guessed from the first {SAMPLE} rows; exact once they are encoded")
    if any(each.flops is None for each in found):
        say("-: not known before the data is encoded")


def _rows(found: "list[Cost]") -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table, then its totals."""
    for cost in found:
        about = "~" if cost.guessed else ""
        yield (
            cost.step,
            _number(cost.tokens, about),
            _number(cost.flops or None, about),
            _hours(cost.device_hours or None, about),
            _number(cost.bytes, "~"),
            _hours(cost.took_hours),
            _number(cost.took_bytes),
        )
    known = [cost for cost in found if cost.flops is not None]
    about = "~" if any(cost.guessed for cost in known) else ""
    yield (
        "all",
        "",
        _number(sum(cost.flops or 0 for cost in known), about),
        _hours(sum(cost.device_hours or 0 for cost in known), about),
        _number(sum(cost.bytes or 0 for cost in known), "~"),
        "",
        "",
    )


def _number(value: float | None, about: str = "") -> str:
    """Return a number with a unit's prefix; `about` goes before it."""
    if value is None:
        return "-"
    for unit, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{about}{value / scale:.3g} {unit}"
    return f"{about}{value:.3g}"


def _hours(value: float | None, about: str = "") -> str:
    """Return hours as seconds, minutes or hours."""
    if value is None:
        return "-"
    if value < 1 / 60:
        return f"{about}{3600 * value:.2g} s"
    return f"{about}{60 * value:.2g} min" if value < 1 else f"{about}{value:,.1f} h"
