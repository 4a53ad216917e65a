"""`report` and `plot`: an HTML page of a dataset, and figures for a paper."""

import json
from collections.abc import Sequence
from typing import Any

import click

from sstoken.errors import UsageError
from sstoken.pipeline.cli_options import json_option
from sstoken.pipeline.saying import say
from sstoken.pipeline.verbs.command import (
    Place,
    command,
    file_to_write,
    local_place,
    named_places,
    place,
    written_locally,
)

__all__ = ["plot", "report"]


def report(
    folders: Sequence[Place],
    *,
    out: Place | None = None,
    space: Place | None = None,
    scores: Sequence[Place] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Write an HTML page of a dataset: tokens coloured by score, distributions, what is kept most.

    The page is self-contained and below 5 MB: for a large dataset, it shows a sample and says so.

    Example:
      sstoken-curate report runs/demo/masked-sstoken runs/demo/masked-rel --out runs/report.html

    Args:
        folders: a masked or a tokens folder, or several masked folders of the same tokens; `NAME=FOLDER` names one.
        out: the page to write.
        space: write a folder instead that can be pushed as a static Space of the Hugging Face Hub.
        scores: a folder that `score` wrote; default: those in scores/ beside the first folder that fit.
        seed: seed of the samples.

    Returns:
        `examples`, `response_tokens`, `kept_share`, `shown`, `signals`, `notes` and `bytes`.
    """
    from sstoken.stages.report.page import write_page
    from sstoken.stages.report.space import PAGE, check_space, write_card

    if isinstance(folders, (str, bytes)):
        raise UsageError(f"folders is {folders!r}; give a list of folders")
    if (out is None) == (space is None):
        given = "nothing" if out is None else "both out and space"
        raise UsageError(f"{given} was given; name the page (--out) or a folder for a Space (--space)")
    named = named_places(folders)
    if space is not None:
        check_space(local_place(space))
    page = file_to_write(out, ".html") if out is not None else local_place(str(space)) / PAGE
    with written_locally(page) as file:
        facts = write_page(named, file, [place(each) for each in scores], seed)
    if space is not None:
        write_card(local_place(space), f"Tokens of {' and '.join(named)}")
    return {**facts, "page": str(page)}


@command(
    report,
    click.argument("folders", nargs=-1, required=True, metavar="FOLDER..."),
    click.option("--out"),
    click.option("--space"),
    click.option("--scores", multiple=True),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True),
    json_option,
)
def _report(folders: tuple[str, ...], as_json: bool, **options: Any) -> None:
    facts = report(folders, **options)
    if as_json:
        say(json.dumps(facts))
        return
    for note in facts["notes"]:
        say(f"note: {note}")
    say(f"signals: {', '.join(facts['signals']) or 'none was recorded'}")
    say(
        f"written: {facts['page']}, {facts['bytes'] / 1e6:.1f} MB, {facts['shown']:,} of {facts['examples']:,} examples"
    )


def plot(
    figure: str, folders: Sequence[Place], *, out: Place, scores: Sequence[Place] = (), seed: int = 0
) -> None:
    """Draw one figure of a report as an SVG, PDF or PNG file.

    Example:
      sstoken-curate plot rho runs/demo/masked-sstoken --out runs/rho.pdf

    Args:
        figure: its name; an unknown one lists them all.
        folders: as for `report`.
        out: file to write: .svg, .pdf or .png.
        scores: a folder that `score` wrote; default: those in scores/ beside the first folder that fit.
        seed: seed of the samples.
    """
    from sstoken.stages.report.drawing import save
    from sstoken.stages.report.figures import check_name, pick
    from sstoken.stages.report.folders import open_folders
    from sstoken.stages.report.statistics import measure

    file = file_to_write(out)
    check_name(figure, file)
    found = open_folders(named_places(folders), [place(each) for each in scores])
    with written_locally(file) as local:
        save(pick(measure(found, seed), figure), local)


@command(
    plot,
    click.argument("figure"),
    # Not required, so that a folder in the place of FIGURE is spoken of first.
    click.argument("folders", nargs=-1, metavar="FOLDER..."),
    click.option("--out", required=True),
    click.option("--scores", multiple=True),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True),
)
def _plot(figure: str, folders: tuple[str, ...], out: str, scores: tuple[str, ...], seed: int) -> None:
    plot(figure, folders, out=out, scores=scores, seed=seed)
    say(f"written: {out}")
