"""The verbs: each takes its options, calls the function of the same name in `sstoken.pipeline.api`, and prints."""

import json
from typing import Any

import click

from sstoken.pipeline import api
from sstoken.pipeline.cli_options import force_option as _force
from sstoken.pipeline.cli_options import given, pairs, stage_options
from sstoken.pipeline.cli_options import json_option as _json
from sstoken.pipeline.cli_options import out_option as _out
from sstoken.pipeline.config import LARGEST_SEED
from sstoken.pipeline.hub.verbs import publish as publish
from sstoken.pipeline.hub.verbs import pull as pull
from sstoken.pipeline.plan import Step
from sstoken.pipeline.printing import print_result, print_table
from sstoken.pipeline.runner import Result
from sstoken.stages.anchor import Anchor
from sstoken.stages.encode import Encode
from sstoken.stages.export import Export
from sstoken.stages.score import ScoreOptions
from sstoken.stages.select import Select

_seed = click.option(
    "--seed",
    type=click.IntRange(0, LARGEST_SEED),
    default=0,
    show_default=True,
    help="Seed of everything random.",
)


def _print(as_json: bool, name: str, result: Result) -> None:
    if as_json:
        click.echo(json.dumps({"folder": str(result.folder), "skipped": result.skipped, **result.metrics}))
    else:
        print_result(name, result)


@click.command()
@stage_options(Encode)
@_out
@_force
@_json
def encode(out: str, force: bool, as_json: bool, **fields: Any) -> None:
    """Turn a dataset into tokens with response masks.

    \b
    Example:
      sstoken-curate encode --data runs/demo/data.jsonl --model runs/demo/base --out runs/tokens
    """
    _print(as_json, "encode", api.encode(out=out, force=force, **given(fields)))


@click.command()
@click.option("--tokens", required=True, help="A finished tokens folder.")
@stage_options(Anchor)
@_out
@_seed
@_force
@_json
def anchor(tokens: str, out: str, seed: int, force: bool, as_json: bool, **fields: Any) -> None:
    """Fine-tune, and keep snapshots of the way.

    Works under torchrun and accelerate launch (`torchrun -m sstoken.pipeline anchor ...`).

    \b
    Example:
      sstoken-curate anchor --tokens runs/tokens --model runs/demo/base --out runs/history --max-steps 20
    """
    result = api.anchor(tokens=tokens, out=out, seed=seed, force=force, **given(fields))
    _print(as_json, "anchor", result)


@click.command()
@click.option("--tokens", required=True, help="A finished tokens folder.")
@click.option(
    "--ckpt",
    "checkpoints",
    multiple=True,
    required=True,
    metavar="[NAME=]M",
    help="A checkpoint: folder, LoRA adapter or Hub id. Give it once for each.",
)
@click.option(
    "--attention-from",
    metavar="M",
    help="The checkpoint whose attention is measured; `none`: no attention.  [default: the last --ckpt]",
)
@stage_options(ScoreOptions)
@_out
@_force
@_json
def score(
    tokens: str,
    checkpoints: tuple[str, ...],
    attention_from: str | None,
    out: str,
    force: bool,
    as_json: bool,
    **fields: Any,
) -> None:
    """Signals of every response token (--signal: loss, attention, entropy, rank, ...), into OUT/<checkpoint>.

    \b
    Example:
      sstoken-curate score --tokens runs/tokens --ckpt runs/demo/base --ckpt runs/history/step-20 --out runs/scores
    """
    result = api.score(
        tokens=tokens,
        checkpoints=checkpoints,
        attention_from=attention_from,
        out=out,
        force=force,
        listener=None if as_json else lambda name, result: print_result(f"score/{name}", result),
        **given(fields),
    )
    if as_json:
        _print(as_json, "score", result)


@click.command()
@click.option("--tokens", required=True, help="A finished tokens folder.")
@click.option("--scores", required=True, help="The folder that holds the checkpoints' scores.")
@stage_options(Select)
@click.option(
    "--role",
    "roles",
    multiple=True,
    metavar="NAME=VALUE",
    callback=pairs,
    help="Which checkpoint in SCORES plays a role that the method names.",
)
@click.option("--history", help="Name of the history checkpoint in SCORES.  [default: base, or step-0]")
@click.option("--current", help="Name of the current checkpoint in SCORES.  [default: the other one]")
@_out
@_seed
@_force
@_json
def select(tokens: str, scores: str, out: str, seed: int, force: bool, as_json: bool, **fields: Any) -> None:
    """Write the token-masked dataset.

    \b
    Example:
      sstoken-curate select --tokens runs/tokens --scores runs/scores --out runs/masked --rho 0.5
    """
    result = api.select(tokens=tokens, scores=scores, out=out, seed=seed, force=force, **given(fields))
    _print(as_json, "select", result)


@click.command()
@click.argument("masked")
@stage_options(Export)
@click.option("--check", is_flag=True, help="Read it back as the trainer would, and compare every token.")
@_out
@_force
@_json
def export(masked: str, check: bool, out: str, force: bool, as_json: bool, **fields: Any) -> None:
    """Write the masked dataset as a trainer takes it.

    OUT/README.md has the command that trains on it.

    \b
    Example:
      sstoken-curate export runs/masked --to trl --out runs/export-trl --check
    """
    result = api.export(masked=masked, out=out, check=check, force=force, **given(fields))
    _print(as_json, "export", result)
    if check and not as_json:
        c = result.metrics["checked"]
        click.echo(
            f"check: {c['examples']:,} examples read back; all {c['tokens']:,} tokens and {c['kept']:,} labels agree"
        )


_overrides = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=V", help="Set a field, such as select.rho=0.4."
)


@click.command()
@click.argument("config")
@_overrides
@click.option("--until", metavar="STAGE", help="The last stage to run.")
@click.option("--force", multiple=True, metavar="STAGE", help="Run this stage again though it is finished.")
@_json
def run(
    config: str, overrides: tuple[str, ...], until: str | None, force: tuple[str, ...], as_json: bool
) -> None:
    """Run what is not finished of a configuration.

    \b
    Example:
      sstoken-curate run configs/demo.yaml --set select.rho=0.4
    """

    def report(step: Step, result: Result) -> None:
        if not as_json:
            print_result(step.name, result)

    results = api.run(config, overrides=overrides, until=until, force=force, listener=report)
    if as_json:
        facts = {
            name: {"folder": str(result.folder), "skipped": result.skipped, "metrics": result.metrics}
            for name, result in results.items()
        }
        click.echo(json.dumps(facts))


@click.command()
@click.argument("config")
@_overrides
@_json
def plan(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """What `run` would do, and why, without doing it.

    \b
    Example:
      sstoken-curate plan configs/demo.yaml
    """
    planned = api.plan(config, overrides=overrides)
    rows = [(p.step, str(p.folder or ""), p.state) for p in planned]
    left = [(str(p.superseded or ""),) for p in planned]
    if as_json:
        names = ("step", "folder", "state", "superseded")
        click.echo(
            json.dumps([dict(zip(names, a + b, strict=True)) for a, b in zip(rows, left, strict=True)])
        )
        return
    print_table(("step", "folder", "state"), rows)
    for (folder,) in left:
        if folder:
            click.echo(
                f"{folder}: unfinished work of other settings or inputs; go on with those, or remove it",
                err=True,
            )


@click.command()
@_json
def methods(as_json: bool) -> None:
    """Every selection method: its signals, formula, cost and source.

    \b
    Example:
      sstoken-curate methods
    """
    from sstoken.methods.listing import facts, print_rows

    if as_json:
        click.echo(json.dumps(facts()))
    else:
        print_table(*print_rows())


@click.command()
@click.argument("folder", metavar="RUN")
@_json
def verify(folder: str, as_json: bool) -> None:
    """Re-check every manifest and checksum below RUN.

    \b
    Example:
      sstoken-curate verify runs/demo
    """
    checked, wrong = api.verify(folder)
    if as_json:
        click.echo(json.dumps({"checked": [str(path) for path in checked], "wrong": wrong}))
    else:
        for line in wrong:
            click.echo(line)
        click.echo(f"{len(checked)} finished folders checked, {len(wrong)} problems")
    if wrong:
        raise click.exceptions.Exit(1)


@click.command()
@_json
def doctor(as_json: bool) -> None:
    """What this machine can do: devices, backends, versions.

    \b
    Example:
      sstoken-curate doctor
    """
    from sstoken.pipeline.doctor import examine, missing

    facts = examine()
    if as_json:
        click.echo(json.dumps(facts))
        return
    devices = "; ".join(", ".join(f"{k} {v}" for k, v in device.items()) for device in facts["devices"])
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    rows = [
        ("sstoken", f"{facts['sstoken']} on Python {facts['python']}, {facts['platform']}"),
        (
            "machine",
            f"{facts['cores']} cores, {facts['memory_available_gib']} of {facts['memory_gib']} GiB free",
        ),
        ("devices", devices),
        ("used", facts["default_device"]),
        ("backends", ", ".join(facts["backends"])),
        ("packages", packages),
        *(("not installed", f"{name} ({purpose})") for name, purpose in missing(facts).items()),
    ]
    print_table(("", ""), rows)


@click.command()
@click.option(
    "--out", default="runs/demo", show_default=True, help="Where it works; finished steps are kept."
)
@_seed
@_json
def demo(out: str, seed: int, as_json: bool) -> None:
    """The whole pipeline on an embedded example, in minutes on a laptop's CPU.

    Makes a small instruction set with planted noise, a tiny base model and its history; then counts what each
    method kept of the noise and of everything else.

    \b
    Example:
      sstoken-curate demo
    """
    from pathlib import Path

    from rich.console import Console

    from sstoken.pipeline.demo.run import run_demo

    found = run_demo(Path(out).expanduser(), seed, Console(stderr=True) if as_json else None)
    if as_json:
        click.echo(json.dumps(found))


@click.command()
@click.argument("masked")
@click.option("--row", type=int, help="Number of the row, from 0.  [default: the first]")
@click.option(
    "--rows", "num_examples", type=click.IntRange(min=1), default=1, show_default=True, help="How many."
)
@click.option("--svg", help="Write the picture to this file instead.")
def show(masked: str, row: int | None, num_examples: int, svg: str | None) -> None:
    """Tokens in the terminal: kept and dropped, coloured by score.

    \b
    Example:
      sstoken-curate show runs/demo/masked-sstoken --row 2
    """
    from pathlib import Path

    from sstoken.stages.report.show import save_svg
    from sstoken.stages.report.show import show as show_examples

    folder = Path(masked).expanduser()
    if svg is not None:
        save_svg(folder, Path(svg).expanduser(), row, num_examples)
        click.echo(f"written: {svg}")
    else:
        show_examples(folder, row, num_examples)
