"""What `encode` shows of its first example, and what --quiet and --verbose change."""

import io
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from sstoken.pipeline import saying
from sstoken.pipeline.first_example import print_first_example
from tests.pipeline.worlds import CommandLine, World


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    monkeypatch.setattr(saying, "_level", "normal")
    return CommandLine(capfd)


def text_of(tokens: Path) -> str:
    console = Console(file=io.StringIO(), width=80)
    print_first_example(tokens, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_encode_prints_the_layout_and_an_example(world: World, cli: CommandLine, tmp_path: Path) -> None:
    out = cli.works("encode", "--data", world.data, "--model", world.base, "--out", tmp_path / "tokens")
    assert "  layout: qa (question, answer)\n" in out
    assert "  the tokenizer has no chat template: a plain one is used" in out
    assert "  the first example, response between « and »:\n" in out
    assert out.count("«") == 2
    assert "w1w2w9" in out.rpartition("«")[2].replace(" ", "")


def test_long_stretches_are_cut(world: World, cli: CommandLine, tmp_path: Path) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text('{"question": "' + "w1 " * 300 + '", "answer": "' + "w2 " * 100 + '"}\n')
    tokens = tmp_path / "tokens"
    cli.works("encode", "--data", data, "--model", world.base, "--out", tokens, "--max-length", 2000)
    shown = text_of(tokens)
    assert shown.count("tokens ...]") == 2
    assert 100 < shown.count("w1") + shown.count("w2") <= 160


def test_quiet_prints_notes_alone(world: World, cli: CommandLine, tmp_path: Path) -> None:
    same = ("--quiet", "select", "--tokens", world.tokens, "--scores", world.scores, "--method", "rel")
    right = cli(*same, "--history", "base", "--current", "later", "--out", tmp_path / "right")
    exchanged = cli(*same, "--history", "later", "--current", "base", "--out", tmp_path / "exchanged")
    for outcome in (right, exchanged):
        assert (outcome.code, outcome.out) == (0, "")
    said = [
        o.err for o in (right, exchanged) if "mean REL" in o.err
    ]  # of random models either may be the better
    assert len(said) == 1
    assert said[0].startswith("select: note: mean REL is -")
    assert cli("--quiet", "select", "--tokens", tmp_path, "--scores", "x", "--out", "y").err.startswith(
        "error: "
    )


def test_verbose_shows_the_traceback_of_an_error(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        outcome = cli("--verbose", "verify", tmp_path / "absent")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: ")
