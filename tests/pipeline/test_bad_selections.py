"""Selections that cannot be: one line each, with the exit code that says whose fault it is, and nothing is lost."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.pipeline.worlds import CommandLine, World, copy_model, no_trace

FAILED, USAGE = 1, 2


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capfd)


def test_the_command_that_measures_what_is_missing_works_and_loses_nothing(
    world: World, cli: CommandLine, tmp_path: Path
) -> None:
    scores, out = tmp_path / "my scores", tmp_path / "masked"
    shutil.copytree(world.scores, scores)
    before = pl.read_parquet(scores / "later" / "part-*.parquet")
    for method in ("eksft-aligned", "ranktuner"):
        command = ("select", "--tokens", world.tokens, "--scores", scores, "--method", method, "--out", out)
        line = cli.fails(FAILED, *command)
        no_trace(out)
        asked = re.search(r"not measured; there are .*; run (sstoken-curate score .*)", line)
        assert asked, line
        cli.works(*shlex.split(asked[1])[1:])
        cli.works(*command)
        shutil.rmtree(out)
    after = pl.read_parquet(scores / "later" / "part-*.parquet")
    assert set(after.columns) == {*before.columns, "entropy", "kl@base", "rank", "ties", "max_prob"}
    for name in ("loss", "attention"):
        found, wanted = (table[name].explode().drop_nulls().to_numpy() for table in (after, before))
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--method eaft --param alpha=-1", "alpha is -1; legal is 0 <= alpha"),
        ("--method eaft --param alpha=x", "alpha is x; legal is 0 <= alpha"),
        ("--method eaft --param rho=0.5", "method 'eaft' has no parameter 'rho'; it has alpha"),
        ("--method eaft --rho 0.5", "method 'eaft' has no parameter 'rho'; it has alpha"),
        ("--method t3s --param rho=0.5", "method 't3s' has no parameter 'rho'; it has none"),
        ("--method eaft --param alpha", "legal is NAME=VALUE"),
        ("--method profit --param direction=up", "direction is up; legal is higher, lower, middle"),
        (
            "--method profit --param direction=middle --param tau=0.8 --param upper=0.2",
            "legal is 0.8 <= upper",
        ),
        ("--method eaft --scope global", "judges each token alone"),
        ("--method eaft --budget 9", "does not rank tokens"),
        ("--method rel --budget 0", "budget is 0"),
        ("--method rel --role histroy=base", "no method has the role 'histroy'; legal: history, current"),
        ("--method rel --role history=nobody", "no finished scores of 'nobody'; there are: base, later"),
        ("--method rel --role history=base --role current=base", "both 'base'; method 'rel' compares two"),
        ("--method rel --protect nothing", "legal is end_of_turn"),
        ("--method rel --pool paragraph", "'paragraph' is not one of"),
        ("--method relly", "method 'relly' is not known"),
    ],
)
def test_options(options: str, words: str, world: World, cli: CommandLine, tmp_path: Path) -> None:
    command = ("select", "--tokens", world.tokens, "--scores", world.scores, "--out", tmp_path / "masked")
    assert words in cli.fails(USAGE, *command, *options.split())
    no_trace(tmp_path / "masked")


def test_a_reference_with_another_tokenizer(world: World, cli: CommandLine, tmp_path: Path) -> None:
    other = copy_model(world.later, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(
        text.replace('"w1"', '"swap"').replace('"w2"', '"w1"').replace('"swap"', '"w2"')
    )
    checkpoints = ("--ckpt", world.base, "--ckpt", other)
    command = ("score", "--tokens", world.tokens, *checkpoints, "--signal", "loss", "--signal", "kl@other")
    line = cli.fails(FAILED, *command, "--out", tmp_path / "scores")
    assert "other: its tokenizer is not the one that made the tokens" in line
    assert not (tmp_path / "scores" / "base").exists()


def test_two_checkpoints_that_are_the_same(world: World, cli: CommandLine, tmp_path: Path) -> None:
    """One line says so: of the losses, and of every signal that is the same on each token."""
    scores = tmp_path / "scores"
    cli.works(
        *("score", "--tokens", world.tokens, "--ckpt", f"a={world.base}", "--ckpt", f"b={world.base}"),
        *("--signal", "loss", "--signal", "kl@a", "--signal", "entropy", "--out", scores),
    )
    for method, said in (
        ("rel", "history and current give every token the same loss"),
        ("eksft-aligned", "current.kl@history is 0 on every token"),
    ):
        command = ("select", "--tokens", world.tokens, "--scores", scores, "--method", method)
        roles = ("--role", "history=a", "--role", "current=b")
        printed = cli.works(*command, *roles, "--out", tmp_path / method)
        assert len([line for line in printed.splitlines() if line.strip().startswith(f"note: {said}")]) == 1


def test_attention_of_another_checkpoint_than_current_is_said(
    world: World, cli: CommandLine, tmp_path: Path
) -> None:
    command = ("select", "--tokens", world.tokens, "--scores", world.scores, "--out", tmp_path / "masked")
    printed = cli.works(*command, "--history", "later", "--current", "base")
    assert "history is later, current is base, attention is later" in printed
