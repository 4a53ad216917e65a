"""`show`, `compare`, `verify`, `methods` and `doctor`: they look at datasets, runs, methods and this machine."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click

from sstoken.errors import SstokenError, UsageError
from sstoken.pipeline.cli_options import json_option
from sstoken.pipeline.printing import print_comparison, print_table
from sstoken.pipeline.saying import say
from sstoken.pipeline.verbs.command import Place, command, file_to_write, named_places, place, written_locally
from sstoken.stages import folders
from sstoken.stages import manifest as manifests
from sstoken.stages.manifest import MANIFEST

__all__ = ["compare", "doctor", "methods", "show", "verify"]


def show(
    masked: Place,
    *,
    row: int | None = None,
    rows: int = 1,
    search: str | None = None,
    sort: Literal["row", "surprise"] = "row",
    signal: str | None = None,
    pager: bool = False,
    svg: Place | None = None,
) -> None:
    """Show tokens in the terminal: kept and dropped, coloured by score.

    Example:
      sstoken-curate show runs/demo/masked-sstoken --row 2

    Args:
        masked: a finished masked folder, or a tokens folder.
        row: number of the first row, from 0.
        rows: number of rows.
        search: only rows whose text contains this; ignores case.
        sort: `surprise`: rows in which two signals disagree most come first.
        signal: colour by this instead of the score: rel, attention, weight, or CHECKPOINT.SIGNAL of scores/ beside it.
        pager: show one screen at a time, on a terminal.
        svg: write an SVG picture to this file instead.
    """
    from sstoken.stages.report.show import save_svg
    from sstoken.stages.report.show import show as show_examples

    if svg is not None:
        if pager:
            raise UsageError("pager and svg are given; a picture has no pages, leave one of them out")
        with written_locally(file_to_write(svg, ".svg")) as file:
            save_svg(place(masked), file, row, rows, search=search, sort=sort, signal=signal)
    else:
        show_examples(place(masked), row, rows, search=search, sort=sort, signal=signal, pager=pager)


@command(
    show,
    click.argument("masked"),
    click.option("--row", type=int),
    click.option("--rows", type=click.IntRange(min=1), default=1, show_default=True),
    click.option("--search"),
    click.option("--sort", type=click.Choice(["row", "surprise"]), default="row", show_default=True),
    click.option("--signal"),
    click.option("--pager", is_flag=True),
    click.option("--svg"),
)
def _show(masked: str, svg: str | None, **options: Any) -> None:
    show(masked, svg=svg, **options)
    if svg is not None:
        say(f"written: {svg}")


def methods() -> list[dict[str, Any]]:
    """List every selection method: signals, formula, policy, parameters and source.

    Example:
      sstoken-curate methods
    """
    from sstoken.methods.listing import facts

    return facts()


@command(methods, json_option)
def _methods(as_json: bool) -> None:
    from sstoken.methods.listing import print_rows
    from sstoken.methods.presets import PRESETS
    from sstoken.methods.registry import broken_entry_points

    if as_json:
        say(json.dumps(methods()))
    else:
        print_table(*print_rows())
        for preset in PRESETS.values():
            say(preset.line)
    for line in broken_entry_points():
        say(line, err=True)


def compare(masked: Sequence[Place], *, examples: int = 5) -> dict[str, Any]:
    """Compare masked datasets of the same tokens: how far they agree, and where they differ.

    Example:
      sstoken-curate compare runs/demo/masked-sstoken runs/demo/masked-rel

    Args:
        masked: finished masked folders, two or more; `NAME=FOLDER` names one.
        examples: number of examples to list for each pair, those that differ most.

    Returns:
        `kept` by name; `pairs` with Jaccard, Cohen's kappa, and the differences by position, token class and example.
    """
    from sstoken.stages.report.compare import compare_masked

    return compare_masked(named_places(masked), examples)


@command(
    compare,
    click.argument("masked", nargs=-1, required=True),
    click.option("--examples", type=click.IntRange(min=0), default=5, show_default=True),
    json_option,
)
def _compare(masked: tuple[str, ...], examples: int, as_json: bool) -> None:
    facts = compare(masked, examples=examples)
    if as_json:
        say(json.dumps(facts))
    else:
        print_comparison(facts)


def verify(folder: Place) -> tuple[list[Path], list[str]]:
    """Check every manifest and checksum below a folder.

    Example:
      sstoken-curate verify runs/demo

    Returns:
        The finished folders that were checked, and one line per problem.
    """
    root = place(folder)
    if not root.is_dir():
        raise UsageError(f"{folder}: no such folder; name a run or a stage's output")
    checked = sorted(path.parent for path in folders.files_below(root) if path.name == MANIFEST)
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


@command(verify, click.argument("folder", metavar="RUN"), json_option)
def _verify(folder: str, as_json: bool) -> None:
    checked, wrong = verify(folder)
    if as_json:
        say(json.dumps({"checked": [str(path) for path in checked], "wrong": wrong}))
    else:
        for line in wrong:
            say(line)
        say(f"{len(checked)} finished folders checked, {len(wrong)} problems")
    if wrong:
        raise click.exceptions.Exit(1)


def doctor() -> dict[str, Any]:
    """Show what this machine can run: devices, backends, versions.

    Example:
      sstoken-curate doctor
    """
    from sstoken.pipeline.doctor import examine

    return examine()


@command(doctor, json_option)
def _doctor(as_json: bool) -> None:
    from sstoken.pipeline.doctor import advice, missing

    facts = doctor()
    if as_json:
        say(json.dumps(facts))
        return
    devices = "; ".join(
        ", ".join(f"{k} {v}" for k, v in device.items() if k != "gflops") for device in facts["devices"]
    )
    multiplies = ", ".join(
        f"{dtype} {rate:g} GFLOP/s" for dtype, rate in facts["devices"][0]["gflops"].items()
    )
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    rows = [
        ("sstoken", f"{facts['sstoken']} on Python {facts['python']}, {facts['platform']}"),
        (
            "machine",
            f"{facts['cores']} cores, {facts['memory_available_gib']} of {facts['memory_gib']} GiB free",
        ),
        ("devices", devices),
        ("multiplies", f"{multiplies} (the processor, all threads)"),
        ("used", facts["default_device"]),
        ("backends", ", ".join(facts["backends"])),
        *(("faster", line) for line in advice(facts)),
        ("packages", packages),
        *(("not installed", f"{name} ({purpose})") for name, purpose in missing(facts).items()),
    ]
    print_table(("", ""), rows)
