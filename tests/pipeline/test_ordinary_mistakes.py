"""Ordinary mistakes, each of which ends in one line that says what to do. More in test_bad_input.py."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sstoken.pipeline import api
from tests.pipeline.worlds import CommandLine, World, make_world


@dataclass(frozen=True)
class Place:
    """What a mistake is made with."""

    world: World
    masked: Path
    free: Path
    """An empty folder."""

    def file(self, name: str, content: str) -> Path:
        path = self.free / name
        path.write_text(content)
        return path


Mistake = Callable[[Place], list[object]]


def scoring(place: Place, *options: object) -> list[object]:
    return ["score", "--tokens", place.world.tokens, "--out", place.free / "out", *options]


def encoding(place: Place, *options: object) -> list[object]:
    return ["encode", "--out", place.free / "out", *options]


MISTAKES: dict[str, tuple[Mistake, tuple[str, ...]]] = {
    # what is wrong: (the command, what its one line has to say)
    "a GGUF file as the checkpoint": (
        lambda p: scoring(p, "--ckpt", p.file("model.gguf", "GGUF")),
        ("GGUF file", "llama.cpp", "save_pretrained"),
    ),
    "data and model exchanged": (
        lambda p: encoding(p, "--data", p.world.base, "--model", p.world.data),
        ("a model's folder", "--model", "exchanged"),
    ),
    "the page of a model in place of its id": (
        lambda p: encoding(
            p, "--data", p.world.data, "--model", "https://huggingface.co/Qwen/Qwen3-0.6B/tree/main"
        ),
        ("page of the Hub", "'Qwen/Qwen3-0.6B'"),
    ),
    "a blank behind the id of a model": (
        lambda p: encoding(p, "--data", p.world.data, "--model", "Qwen/Qwen3-0.6B "),
        ("'Qwen/Qwen3-0.6B '", "neither a folder nor a Hub id"),
    ),
    "text that a template rendered already": (
        lambda p: encoding(p, "--data", p.file("d.jsonl", '{"text": "w1 w2"}\n'), "--model", p.world.base),
        ("the column text alone", "messages", "prompt and completion"),
    ),
    "the dataset in place of its tokens": (
        lambda p: ["score", "--tokens", p.world.data, "--ckpt", p.world.base, "--out", p.free / "out"],
        ("is a file", "the folder that holds the tokens"),
    ),
    "a spreadsheet": (
        lambda p: encoding(p, "--data", p.file("d.xlsx", "PK"), "--model", p.world.base),
        (".xlsx is not one of", ".csv"),
    ),
    "a masked dataset to be exported that is tokens": (
        lambda p: ["export", p.world.tokens, "--to", "trl", "--out", p.free / "out"],
        ("written by 'encode'", "'select' wrote"),
    ),
    "a masked dataset given as tokens": (
        lambda p: ["anchor", "--tokens", p.masked, "--model", p.world.base, "--out", p.free / "out"],
        ("written by 'select'", "'encode' wrote"),
    ),
    "percent in place of a share": (
        lambda p: [
            "select", "--tokens", p.world.tokens, "--scores", p.world.scores, "--rho", 60, "--out", p.free / "out",
        ],
        ("rho is 60", "0 < rho <= 1"),
    ),
    "a decimal comma": (
        lambda p: ["run", p.file("c.yaml", "out: o\nencode: {data: d, model: m}\nselect: {rho: '0,6'}\n")],
        ("select.rho is '0,6'", "number"),
    ),
    "a program in place of a configuration": (
        lambda p: ["run", p.file("train.py", "print(1)\n")],
        ("train.py", "not a mapping", "encode"),
    ),
    "scores of tokens in place of the folder above": (
        lambda p: [
            "select", "--tokens", p.world.tokens, "--scores", p.world.scores / "base", "--out", p.free / "out",
        ],
        ("the scores of one checkpoint", "name the folder above"),
    ),
    "a tokenizer's folder as the checkpoint": (
        lambda p: scoring(p, "--ckpt", p.world.tokens / "tokenizer"),
        ("a tokenizer and no model", "name the model's folder"),
    ),
    "a device that is not there": (
        lambda p: scoring(p, "--ckpt", p.world.base, "--device", "cuda:77"),
        ("cuda:77", "cannot be used here", "cpu"),
    ),
    "an output that is the input": (
        lambda p: ["select", "--tokens", p.world.tokens, "--scores", p.world.scores, "--out", p.world.tokens],
        ("holds what 'encode' wrote", "choose another output folder"),
    ),
    "--set without a value": (
        lambda p: ["run", p.file("c.yaml", "out: o\nencode: {data: d, model: m}\n"), "--set", "select.rho"],
        ("--set 'select.rho'", "section.field=value"),
    ),
    "one dataset to compare": (
        lambda p: ["compare", p.masked],
        ("1 masked dataset given", "two or more"),
    ),
    "init over a configuration": (
        lambda p: ["init", "--data", p.world.data, "--model", p.world.base, "--file", p.file("c.yaml", "out: o\n")],
        ("exists already", "--force"),
    ),
    "another trainer's configuration for --into": (
        lambda p: ["export", p.masked, "--to", "verl", "--out", p.free / "out", "--into", p.file("c.yaml", "a: 1\n")],
        ("not configured by a YAML file alone", "axolotl"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world, out = make_world(), tmp_path_factory.mktemp("mistakes") / "masked"
    return api.select(tokens=world.tokens, scores=world.scores, out=out).folder


@pytest.mark.parametrize("case", MISTAKES)
def test_ends_in_one_line(
    case: str,
    masked: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    free = tmp_path / "free"
    free.mkdir()
    command, said = MISTAKES[case]
    cli = CommandLine(capfd)
    outcome = cli(*command(Place(make_world(), masked, free)))
    assert outcome.code in (1, 2), outcome
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    missing = [word for word in said if word not in line]
    assert not missing, f"{missing} not in: {line}"
    assert not list(free.rglob("manifest.json"))
