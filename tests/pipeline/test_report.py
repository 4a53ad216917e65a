"""`report` and `plot` as commands: what they write, say and refuse."""

import json
from pathlib import Path

import pytest
import yaml

from sstoken import curate
from sstoken.errors import UsageError
from tests.pipeline.worlds import CommandLine, World


@pytest.fixture(scope="module")
def masked(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("report")
    return {
        method: curate.select(
            tokens=world.tokens, scores=world.scores, out=root / method, method=method, history="base", current="later"
        ).folder
        for method in ("sstoken", "rel")
    }  # fmt: skip


def test_one_folder_with_its_scores(
    world: World, masked: dict[str, Path], tmp_path: Path, cli: CommandLine
) -> None:
    page = tmp_path / "new" / "page.html"
    out = cli.works("report", masked["sstoken"], "--scores", world.scores, "--out", page)
    assert out.startswith("signals: rel, attention, base.loss, later.loss, later.attention\nwritten: ")
    assert "24 of 24 examples" in out
    assert page.read_text().startswith("<!doctype html>")


def test_several_folders_by_name(masked: dict[str, Path], tmp_path: Path, cli: CommandLine) -> None:
    page = tmp_path / "page.html"
    names = [f"ours={masked['sstoken']}", f"theirs={masked['rel']}"]
    facts = json.loads(cli.works("report", *names, "--out", page, "--json"))
    assert facts["shown"] == facts["examples"] == 24
    assert "Cohen&#39;s kappa" in page.read_text()
    assert ">theirs</th>" in page.read_text()


def test_a_figure_for_a_paper(masked: dict[str, Path], tmp_path: Path, cli: CommandLine) -> None:
    cli.works("plot", "positions", masked["sstoken"], "--out", tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert cli.fails(2, "plot", "snapshots", masked["sstoken"], "--out", tmp_path / "a.pdf").startswith(
        f"error: no figure 'snapshots' for {masked['sstoken']}; legal: positions, classes"
    )
    assert "no figure" in cli.fails(2, "plot", masked["sstoken"], "--out", tmp_path / "a.pdf")
    assert "no folder given" in cli.fails(2, "plot", "rho", "--out", tmp_path / "a.pdf")
    assert "must end in .svg, .pdf, .png" in cli.fails(
        2, "plot", "rho", masked["rel"], "--out", tmp_path / "a"
    )


def test_what_is_refused(world: World, masked: dict[str, Path], tmp_path: Path, cli: CommandLine) -> None:
    page = tmp_path / "page.html"
    assert "no such folder" in cli.fails(2, "report", tmp_path / "none", "--out", page)
    assert "a folder of scores" in cli.fails(2, "report", world.scores / "base", "--out", page)
    assert "side by side" in cli.fails(2, "report", masked["rel"], world.tokens, "--out", page)
    assert "called 'rel'" in cli.fails(2, "report", masked["rel"], masked["rel"], "--out", page)
    with pytest.raises(UsageError, match="give a list"):
        curate.report(str(masked["rel"]), out=page)
    assert not page.exists()


def test_a_space_is_a_folder_ready_to_push(masked: dict[str, Path], tmp_path: Path, cli: CommandLine) -> None:
    space = tmp_path / "space"
    for _ in range(2):
        cli.works("report", masked["rel"], "--space", space)
    assert sorted(path.name for path in space.iterdir()) == ["README.md", "index.html"]
    assert (space / "index.html").read_text().startswith("<!doctype html>")
    front = yaml.safe_load((space / "README.md").read_text().split("---\n")[1])
    assert front["sdk"] == "static"
    assert front["app_file"] == "index.html"
    (space / "mine.txt").write_text("mine")
    assert "holds mine.txt" in cli.fails(2, "report", masked["rel"], "--space", space)
    assert "both out and space" in cli.fails(2, "report", masked["rel"], "--space", space, "--out", space)
    assert "nothing was given" in cli.fails(2, "report", masked["rel"])


def test_show_chooses_rows_and_signals(world: World, masked: dict[str, Path], cli: CommandLine) -> None:
    assert cli.works("show", masked["rel"], "--search", "W7 w8").startswith("row 6  data-6")
    assert cli.works("show", masked["rel"], "--sort", "surprise", "--rows", 2).count("rel rho 0.6") == 2
    assert "nothing is selected yet" in cli.works("show", world.tokens)
    assert cli.works("show", world.tokens, "--signal", "base.loss", "--pager").startswith("row 0  ")
    assert "legal: rel, attention, score" in cli.fails(2, "show", masked["rel"], "--signal", "entropy")
    assert "no row holds 'w99 w98'" in cli.fails(1, "show", masked["rel"], "--search", "w99 w98")
    assert "leave one of them out" in cli.fails(2, "show", masked["rel"], "--row", 1, "--search", "w1")
